"""What happened in a run, as far as run.json, metrics.jsonl and predictions.jsonl of its folder tell; the model is not looked at.

The pages of zerotune/run/report/ and `python -m zerotune compare` are drawn from this alone, during a run and long after it.
"""

import json
import re
import statistics
from array import array
from itertools import islice
from pathlib import Path

from zerotune.errors import UserError

CURVES = (  # the numbers of a training record that are drawn
    "loss learning_rate grad_norm tokens_per_second step_seconds padding_fraction peak_device_memory_gib peak_host_memory_gib "
    "overflowed_steps"
).split()
NUM_SAMPLES = 10


class History:
    """A run's records, sorted by what they tell.

    steps, curves: an entry for each training record; nan in a curve where a record has no number, because all of its steps were
    skipped or the number was not finite. evaluations, tests, starts, saves, bad_steps, profiles: lists of records as they are.
    """

    def __init__(self, folder, run):
        self.folder, self.run = Path(folder), run
        self.arguments, self.engine = run.get("arguments") or {}, run.get("engine") or {}
        # Arrays, not dicts: a long run has a million records, and the process that reads them is training.
        self.steps, self.curves = array("d"), {name: array("d") for name in CURVES}
        self.target_tokens, self.real_tokens, self.padded_tokens = array("d"), 0, 0
        self.of_sources = {}  # name of a source: (steps, losses), arrays as well
        self.evaluations, self.tests, self.starts, self.saves, self.bad_steps, self.profiles = [], [], [], [], [], []
        self.last_step, self.epoch, self.samples = 0, None, []

    def add(self, record):
        self.last_step = max(self.last_step, record["step"])
        if "learning_rate" in record:
            self.add_training(record)
        for key, records in (
            ("eval_loss", self.evaluations),
            ("test_loss", self.tests),
            ("start_seconds", self.starts),
            ("save_seconds", self.saves),
            ("save_failed", self.saves),
            ("bad_step", self.bad_steps),
            ("memory_gib", self.profiles),
        ):
            if key in record:
                records.append(record)

    def add_training(self, record):
        self.steps.append(record["step"])
        for name, curve in self.curves.items():
            value = record.get(name)
            curve.append(float("nan") if value is None else value)
        self.target_tokens.append(record.get("target_tokens") or 0)
        self.epoch = record.get("epoch")
        for name, facts in (record.get("sources") or {}).items():
            steps, losses = self.of_sources.setdefault(name, (array("d"), array("d")))
            steps.append(record["step"])
            losses.append(float("nan") if facts["loss"] is None else facts["loss"])
        real = record.get("real_tokens") or 0
        self.real_tokens += real
        self.padded_tokens += real / (1 - min(record.get("padding_fraction") or 0, 0.9999))

    def points(self, name):
        """Return [(step, value)] of a curve, value None where there is none."""
        return [(step, None if value != value else value) for step, value in zip(self.steps, self.curves[name], strict=True)]

    def values(self, name):
        return [value for value in self.curves[name] if value == value]

    @property
    def seconds(self):
        """Return the seconds that the steps up to each training record took, together: without evaluations and saves."""
        total, before, sums = 0.0, 0, []
        for step, seconds in zip(self.steps, self.curves["step_seconds"], strict=True):
            total, before = total + (step - before) * (seconds if seconds == seconds else 0), step
            sums.append(total)
        return sums

    @property
    def max_steps(self):
        return self.run.get("max_steps")

    @property
    def legs(self):
        """Return the launches of the run: [{"from_step": int, ...}], the first one first, with what else is known of each."""
        if legs := self.run.get("legs"):
            return legs
        begun = [{"from_step": record["step"]} for record in self.starts]
        resumed = re.search(r"checkpoint-(\d+)/?$", str(self.run.get("resumed_from")))
        if resumed and int(resumed[1]) not in [leg["from_step"] for leg in begun[-1:]]:  # no step came after it
            begun.append({"from_step": int(resumed[1])})
        return begun if begun and begun[0]["from_step"] == 0 else [{"from_step": 0}, *begun]

    @property
    def strategy(self):
        """Return the strategy's name in accelerate_configs/ where it is known, or the engine in its words."""
        named = self.legs[-1].get("strategy")
        stage, offload = self.engine.get("zero_stage"), {self.engine.get(f"offload_{what}") for what in ("optimizer", "param")}
        if named or not self.engine:
            return named or "-"
        if stage:
            return f"zero{stage}" + ("_nvme" if "nvme" in offload else "_offload" if "cpu" in offload else "")
        return "single" if self.engine.get("num_processes") == 1 else "ddp"

    @property
    def status(self):
        """Return (a word: finished, stopped, failed, unfinished; what is known of it).

        `ended` is put into run.json at the end, and a resumed run writes run.json anew.
        """
        of_all = f"step {self.last_step:,.0f}" + (f" of {self.max_steps:,}" if self.max_steps else "")
        limit = self.arguments.get("max_bad_steps") or 0
        bad = [record["step"] for record in self.bad_steps[-limit:]] if limit else []
        if len(bad) == limit > 0 and bad[-1] - bad[0] == limit - 1 and bad[-1] == self.last_step:
            return "failed", f"{limit} bad steps in a row, at {of_all}"
        ended = self.run.get("ended")
        if ended == "all steps":
            return "finished", f"all {self.max_steps:,} steps are taken"
        if ended:
            return "stopped", f"by {ended}, after {of_all}"
        return "unfinished", f"running, or cut off, at {of_all}"


def read_history(folder, strict=False):
    """Return the History of a run's folder.

    Raises UserError if there is no run.json that can be read. A line of metrics.jsonl that is no record, as a kill in the middle of
    a write leaves it, is passed over; strict: it is a UserError.
    """
    folder = Path(folder)
    history = History(folder, read_run(folder))
    try:
        with open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    history.add(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    if strict:
                        raise UserError(
                            f"{folder}/metrics.jsonl:{number}: no whole record (a kill while it was written leaves one like "
                            "this); resume the run, which mends it, or take the line out"
                        ) from None
    except FileNotFoundError:  # before the first record
        pass
    except OSError as error:
        raise UserError(f"{folder}/metrics.jsonl: {error.strerror}; give a folder that can be read") from None
    if history.tests:  # else they are of a run that was in this folder before
        history.samples = read_samples(folder / "predictions.jsonl")
    return history


def read_run(folder):
    """Return run.json of a folder, a dict; raise UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --output_dir of a run")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no run.json; give the --output_dir of a run that has loaded its model") from None
    except OSError as error:
        raise UserError(f"{folder}/run.json: {error.strerror}; give a folder that can be read") from None
    except ValueError as error:
        raise UserError(f"{folder}/run.json: {error}; train.py writes JSON: give a folder as it left it") from None
    return run


def read_samples(path):
    """Return the first rows of predictions.jsonl, [] if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return [json.loads(line) for line in islice(lines, NUM_SAMPLES)]
    except (OSError, ValueError):
        return []


def results(history):
    """Return the numbers that a run is judged by, {name: value}; what there is no record of is None.

    Sizes in GiB (of the process with most) or bytes, times in seconds; tokens_per_second, step_seconds: medians of the records;
    training_seconds: of the steps alone; scores of the last evaluation and of the test as they are named in metrics.jsonl.
    """

    def last(values):
        return values[-1] if values else None

    def median(name):
        values = history.values(name)
        return statistics.median(values) if values else None

    evaluated = [record for record in history.evaluations if record["eval_loss"] is not None]
    best = min(evaluated, key=lambda record: record["eval_loss"], default={})
    saves = [record for record in history.saves if "save_seconds" in record]
    return {
        "status": history.status[0],
        "steps": int(history.last_step),
        "last_loss": last(history.values("loss")),
        "last_eval_loss": last(evaluated)["eval_loss"] if evaluated else None,
        "best_eval_loss": best.get("eval_loss"),
        "best_eval_step": best.get("step"),
        **scores(last(history.evaluations) or {}, "eval"),
        **({"test_loss": history.tests[-1]["test_loss"]} if history.tests else {}),
        **scores(last(history.tests) or {}, "test"),
        "tokens_per_second": median("tokens_per_second"),
        "step_seconds": median("step_seconds"),
        "padding_fraction": 1 - history.real_tokens / history.padded_tokens if history.padded_tokens else None,
        "peak_device_memory_gib": max(history.values("peak_device_memory_gib"), default=None),
        "peak_host_memory_gib": max(history.values("peak_host_memory_gib"), default=None),
        "training_seconds": last(history.seconds),
        "save_seconds": sum(record["save_seconds"] for record in saves) if saves else None,
        "checkpoint_bytes": saves[-1]["checkpoint_bytes"] if saves else None,
        "resumes": len(history.legs) - 1,
        "bad_steps": len(history.bad_steps),
        "failed_saves": len(history.saves) - len(saves),
    }


def scores(record, prefix):
    """Return {name: value} of what an evaluation's record says beside losses, sizes, its time and which step was the best."""
    beside = {"step", "best_step", f"{prefix}_seconds"}
    for counted in (name for name in record if name.endswith("target_tokens")):  # of all rows, and of each source
        part = counted.removesuffix("target_tokens")
        beside |= {counted, f"{part}loss"} | ({f"{part}perplexity"} if part != f"{prefix}_" else set())
    return {name: value for name, value in record.items() if name not in beside and isinstance(value, (int, float))}
