"""One cell of a benchmark: what is run, and the numbers that its run directory and its log come to."""

import dataclasses
import json
import re
import statistics
from dataclasses import dataclass
from functools import lru_cache

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc|Signal 9 \(SIGKILL\)", re.IGNORECASE
)
EXPLAINED = "train.py: out of memory: "  # the lines of train.py's own report
REASON = re.compile(r"^(?:\[rank\d+\]: )?(?:train\.py: (?:error|out of memory)|launch\.sh|\S*Error|\S*Exception)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """strategy, set of flags and batch name a place in the table; words is train.py's command line; engine: zerotune or trainer.

    setenv: (name, value) pairs for the environment of the cell's processes.
    """

    strategy: str
    set: str
    batch: str
    words: tuple
    repeat: int | str = 0
    engine: str = "zerotune"
    setenv: tuple = ()

    @property
    def name(self):
        parts = (self.strategy, self.set, self.batch, self.engine, str(self.repeat))
        return re.sub(r"[^\w.=-]+", "_", "-".join(part for part in parts if part))

    def of_repeat(self, repeat):
        return dataclasses.replace(self, repeat=repeat)

    def path(self, out):
        return out / "cells" / f"{self.name}.json"


def flag_words(flags, more=()):
    """Return {flag: value} and further words as one command line; lists become several values, true and false words."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return (*words, *more)


def spread(values):
    """Return {"median", "min", "max"} of some numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@lru_cache(maxsize=32)
def flop_coefficients(words):
    """Return zerotune.tools.flops.coefficients for a command line of train.py, or None."""
    from transformers import AutoConfig

    from zerotune.run.arguments import parse_arguments
    from zerotune.tools.flops import coefficients

    args = parse_arguments([*words, "--output_dir", "unused"])
    if args.peft:
        return None  # the count knows the model alone
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    found = coefficients(config, args.task, tuple(args.freeze), tuple(args.unfreeze))
    return None if found is None else tuple(found)


def status_of(code, log):
    """Return (status, reason) of a run's exit code and log: ok, refused, out of memory, timeout or failed."""
    if code == 0:
        return "ok", ""
    if code == "timeout":
        return "timeout", "longer than cell_timeout_seconds"
    reasons = REASON.findall(log)
    if code == 2 and EXPLAINED not in log:
        return "refused", (reasons or ["no reason given"])[0][:300]
    if OUT_OF_MEMORY.search(log) or code in (-9, 137):
        return "out of memory", next((r for r in reasons if OUT_OF_MEMORY.search(r)), "killed").removeprefix(EXPLAINED)[:300]
    return "failed", (reasons or [f"exit code {code}"])[-1][:300]


def cell_facts(cell, folder, code, log, warmup_steps, measured_steps):
    """Return what a cell came to, as plain JSON values; its speed is that of the steps between warm-up and profiling."""
    facts = {key: value for key, value in dataclasses.asdict(cell).items() if key != "words"} | {"command": list(cell.words)}
    facts["status"], facts["reason"] = status_of(code, log)
    if facts["status"] != "ok":
        return facts
    run = json.loads((folder / "run" / "run.json").read_text())
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    unprofiled = training[: warmup_steps + measured_steps]  # tracing takes time and memory
    measured = unprofiled[warmup_steps:]
    seconds = sum(record["step_seconds"] for record in measured)
    real = sum(record["real_tokens"] for record in measured)
    processes = run["engine"]["num_processes"]
    facts |= {
        "num_processes": processes,
        "num_devices": processes if run["engine"]["device"] == "cuda" else 1,
        "device": run["engine"]["device"],
        "mixed_precision": run["arguments"]["mixed_precision"],
        "host_memory_before_model_gib": run.get("host_memory_before_model_gib"),
        "trainable_parameters": run["parameters"]["trainable"],
        "parameters": run["parameters"]["total"],
        "tokens_per_second": spread([record["tokens_per_second"] for record in measured]),
        "step_seconds": spread([record["step_seconds"] for record in measured]),
        # A token's mean over the measured steps: what the steps' padding and shapes cost, whatever their order.
        "mean_tokens_per_second": real / seconds,
        "padding_fraction": statistics.fmean(record["padding_fraction"] for record in measured),
        "losses": [record["loss"] for record in training],
        "final_loss": training[-1]["loss"],
        "peak_device_memory_gib": max(record["peak_device_memory_gib"] for record in unprofiled),
        "peak_host_memory_gib": max(record["peak_host_memory_gib"] for record in unprofiled),
    }
    for record in records:
        if "memory_gib" in record:
            facts |= {key: value for key, value in record.items() if key != "step"}
        if "checkpoint_bytes" in record:
            facts |= {"checkpoint_bytes": record["checkpoint_bytes"], "save_seconds": record["save_seconds"]}
    coefficients = flop_coefficients(cell.words)
    if coefficients is not None and "shape_terms" in measured[0]:
        flops = sum(c * term for record in measured for c, term in zip(coefficients, record["shape_terms"], strict=True))
        facts |= {"model_flops_per_second": flops / seconds, "flops_per_real_token": flops / real}
    return facts
