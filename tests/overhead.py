"""What a step of train.py costs beyond forward and backward, how it grows, and beside a bare PyTorch loop of the same products.

    python tests/overhead.py --matrix benchmarks/growth.yaml --out benchmarks/cpu/growth

Random weights and rows of exact lengths, float32. Each run is taken apart by step_clock.py, which takes every step with a bare loop
as well where one process runs; the first steps are left out. Python calls and bytes are counted, and do not depend on the machine.
The folder gets results.json and table.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from step_clock import PARTS, ROOT

from zerotune.run.records import environment_facts, write_json
from zerotune.tools.synthetic import build_model, build_rows

WARMUP = 3  # steps in which memory is taken and graphs are made


def run_cell(folder, model, strategy, processes, length, rows, accumulation, steps):
    """Return what step_clock.py finds; length: tokens of a row, source and target alike."""
    task = json.loads((folder / model / "task.json").read_text())
    data = folder / f"{length}.jsonl"
    if not data.exists():
        build_rows(data, 512, [length // 2, length // 2], [length - length // 2, length - length // 2])
    out, output = folder / "facts.json", tempfile.mkdtemp(dir=folder)
    flags = {"model_name_or_path": folder / model, "task": task, "train_file": data, "output_dir": output, "max_steps": steps}
    flags |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "save_steps": 0}
    flags |= {"max_source_length": length, "max_target_length": length, "lr_scheduler_type": "constant"}
    command = [sys.executable]
    if strategy != "single":
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", f"accelerate_configs/{strategy}.yaml"]
        command += ["--num_processes", str(processes)]
    command += ["tests/step_clock.py", str(out)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(out.read_text())


def summary(runs):
    """Return a cell's numbers: medians over steps, of all runs together; beside the bare loop the median of each run's own."""
    steps = [step for run in runs for step in run["steps"][WARMUP:]]
    own = [step["seconds"] - sum(step[part] for part in PARTS) for step in steps]
    facts = {"seconds": statistics.median(step["seconds"] for step in steps), "own_seconds": statistics.median(own)}
    facts["rows_seconds"] = statistics.median(step["rows"] for step in steps)
    facts["calls"], facts["parameters"] = sum(runs[0]["calls"].values()), runs[0]["parameters"]["total"]
    facts["collective_bytes"] = sum(runs[0]["collective_bytes"].values())
    if "bare_seconds" in steps[0]:
        facts["beside_bare"] = [
            statistics.median(step["bare_seconds"] / step["seconds"] for step in run["steps"][WARMUP:]) for run in runs
        ]
        pairs = [(step["bare_loss"], loss) for run in runs for step, loss in zip(run["steps"], run["losses"], strict=False)]
        facts["largest_loss_difference"] = max(abs(bare - loss) / loss for bare, loss in pairs)
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--matrix", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    matrix = yaml.safe_load(args.matrix.read_text())
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, settings in matrix["models"].items():
            task = settings.pop("task")
            build_model(folder / model, task, settings)
            (folder / model / "task.json").write_text(json.dumps(task))
        for model, strategy, processes, length, rows, accumulation, *more in matrix["cells"]:
            options = {"repeats": 1, "steps": 16} | (more[0] if more else {})
            place = {"model": model, "strategy": strategy, "processes": processes, "length": length, "rows": rows}
            place |= {"accumulation": accumulation, **options}
            runs = [
                run_cell(folder, model, strategy, processes, length, rows, accumulation, options["steps"])
                for _ in range(options["repeats"])
            ]
            cells.append(place | summary(runs) | {"most_called": dict(list(runs[0]["calls"].items())[:12])})
            print(json.dumps(cells[-1]), flush=True)
    results = {"environment": environment_facts() | {"command_line": None}, "cells": cells}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", results)
    (args.out / "table.md").write_text(table(results))
    print(table(results))


def table(results):
    """Return the results as Markdown: a step, what of it is neither a pass nor the optimizer's, calls, bytes, and the bare loop."""
    facts = results["environment"]
    lines = [
        f"{facts['device']}; torch {facts['versions']['torch']}; commit {facts['git_commit']}; medians over the steps",
        "",
        "| model | strategy | processes | tokens a row | rows x accumulation | step, ms | the loop's own, ms | share "
        "| of it rows, ms | Python calls | bytes sent | speed beside a bare loop |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in results["cells"]:
        bare = cell.get("beside_bare")
        words = "-" if not bare else f"{statistics.median(bare):.3f}"
        if bare and len(bare) > 1:
            words += f" ({min(bare):.3f}-{max(bare):.3f})"
        own, share = 1e3 * cell["own_seconds"], cell["own_seconds"] / cell["seconds"]
        lines.append(
            f"| {cell['model']} | {cell['strategy']} | {cell['processes']} | {cell['length']} | "
            f"{cell['rows']} x {cell['accumulation']} | {1e3 * cell['seconds']:.1f} | {own:.2f} | {share:.1%} | "
            f"{1e3 * cell['rows_seconds']:.2f} | {cell['calls']:,} | {cell['collective_bytes']:,} | {words} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
