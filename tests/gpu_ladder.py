"""What each flag spares on one GPU: the sets of a matrix one after another in one process, whose start they share.

    python tests/gpu_ladder.py --matrix benchmarks/gpu_ladder.yaml --out benchmarks/gpu/ladder
    python tests/gpu_ladder.py --matrix benchmarks/gpu_ladder.yaml --out benchmarks/gpu/ladder --table     anew, of what is there

Each set is a run of train.py's own functions on a model with random weights, without a launcher; nothing is saved but its records.
--out gets results.json after each set, so that what is measured stays when time runs out, and table.md. --make FOLDER only builds
model and rows, --made FOLDER takes them from there.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from step_clock import begun  # noqa: E402

import train  # noqa: E402
from zerotune.errors import UserError  # noqa: E402
from zerotune.model.loading import AUTO_CLASSES  # noqa: E402
from zerotune.run.records import environment_facts, write_json  # noqa: E402
from zerotune.tools.benchmark.cells import flag_words  # noqa: E402
from zerotune.tools.hardware import known_peak  # noqa: E402
from zerotune.tools.synthetic import build_model, build_rows  # noqa: E402


def make(matrix, folder):
    """Write the matrix's model and rows."""
    data = matrix["data"]
    if not (folder / "rows.jsonl").exists():
        build_model(folder / "model", matrix["flags"]["task"], data["model"], getattr(torch, data.get("dtype", "float32")))
        build_rows(folder / "rows.jsonl", **data["rows"])


def run_set(words):
    """Take the steps of a command line; return what run.json and metrics.jsonl say of them."""
    from accelerate.state import AcceleratorState

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run, start = begun(words)
    train.train(run, start)
    run.monitor.watchdog.stop()
    folder = Path(run.args.output_dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    engine = json.loads((folder / "run.json").read_text())["engine"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"engine": engine, "records": [record for record in records if "loss" in record]}


def measure(matrix, folder, out):
    """Run the sets in the matrix's order; a set that fails is a line of the table."""
    results = {"environment": environment_facts() | {"command_line": None}, "sets": {}}
    steps = {"max_steps": matrix["warmup_steps"] + matrix["measured_steps"], "logging_steps": 1, "end_report": False}
    made = {"model_name_or_path": str(folder / "model"), "train_file": str(folder / "rows.jsonl")}
    out.mkdir(parents=True, exist_ok=True)
    for name, own in matrix["sets"].items():
        with tempfile.TemporaryDirectory() as scratch:
            if own.get("cache_frozen"):
                own = own | {"cache_frozen": f"{scratch}/cache"}
            words = flag_words(made | matrix["flags"] | own | steps | {"output_dir": f"{scratch}/run"})
            try:
                results["sets"][name] = run_set(list(words))
            except (Exception, SystemExit, UserError) as error:
                traceback.print_exc()
                results["sets"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        torch.cuda.empty_cache()
        write_json(out / "results.json", results)
        print(f"{name}: {results['sets'][name].get('error') or [r['tokens_per_second'] for r in results['sets'][name]['records']]}")
        sys.stdout.flush()
    return results


def table(matrix, results):
    """Return the results as Markdown: real tokens a second, beside the first set, padding, MFU, the GPU's memory and the loss."""
    from transformers import AutoConfig

    facts = results["environment"]
    lines = [
        f"{facts['device']}; torch {facts['versions']['torch']}; commit {facts['git_commit']}; one process, without a launcher",
        "",
        "| flags | tokens/s: median (least-most) | beside the first | padding | MFU | peak GiB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    model, flags, first = dict(matrix["data"]["model"]), matrix["flags"], None
    config = AutoConfig.for_model(model.pop("model_type"), **model)
    with torch.device("meta"):
        parameters = AUTO_CLASSES[flags["task"]].from_config(config).num_parameters()
    peak = known_peak(facts["device"], flags.get("mixed_precision", "no"))
    for name, found in results["sets"].items():
        if "error" in found:
            lines.append(f"| {name} | {found['error']} | - | - | - | - | - |")
            continue
        records = found["records"][matrix["warmup_steps"] :]
        own = flags | matrix["sets"][name]
        speeds = [record["tokens_per_second"] for record in records]
        tokens_per_second = sum(record["real_tokens"] for record in records) / sum(record["step_seconds"] for record in records)
        first = first or tokens_per_second
        words = "-"
        if (
            peak and not {"peft", "freeze"} & own.keys()
        ):  # 6 FLOPs a parameter and real token (Kaplan et al. 2020), without attention
            words = f"{6 * parameters * tokens_per_second / peak:.1%}"
        memory = max(record["peak_device_memory_gib"] for record in found["records"])
        padding = statistics.fmean(record["padding_fraction"] for record in records)
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"
        lines.append(
            f"| {name} | {speed} | {tokens_per_second / first:.2f} | {padding:.0%} | {words} | {memory:.1f} | "
            f"{records[-1]['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--matrix", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--made", type=Path)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.matrix.is_file():
        parser.error(f"--matrix {args.matrix}: no such file; benchmarks/gpu_ladder.yaml is one")
    if not (args.out or args.make):
        parser.error("give --out DIR, for the results, or --make FOLDER")
    matrix = yaml.safe_load(args.matrix.read_text())
    if args.make:
        make(matrix, args.make)
        return
    if args.table:
        results = json.loads((args.out / "results.json").read_text())
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = args.made or Path(name)
            make(matrix, folder)
            results = measure(matrix, folder, args.out)
    (args.out / "table.md").write_text(table(matrix, results))
    print(table(matrix, results))


if __name__ == "__main__":
    main()
