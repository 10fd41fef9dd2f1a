"""What train.py's own work costs as ranks grow, counted on 1 to 16 processes of a tiny model: docs/scale.json.

    python tests/ranks.py --out docs/scale.json        about 10 minutes on 2 CPU cores

Counts do not depend on the machine; seconds are those of rank 0's own thread, so that ranks that share a core do not count. What
`python -m zerotune scale` makes of them is in docs/scale.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from forks import Server  # noqa: E402

STEPS = 6
RANKS = (1, 2, 4, 8, 16)
PARTS = ("start", "step", "save", "evaluation", "end")


def counts_of(server, folder, model, rows, strategy, ranks, accumulation):
    """Return {part: {what: number}} of one run, of rank 0 where it does not say otherwise."""
    name = f"{strategy}-{ranks}-{accumulation}"
    out = folder / name / "counts"
    out.mkdir(parents=True)
    flags = {
        "task": "causal",
        "model_name_or_path": model,
        "train_file": rows,
        "validation_file": rows,
        "output_dir": folder / name / "run",
    }
    flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": STEPS, "logging_steps": 1}
    flags |= {"save_steps": 3, "eval_steps": 3, "predict_with_generate": False, "end_report": False}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value).lower() if value is False else str(value))]
    environment = {**os.environ, "SCRIPT": "tests/counted.py", "COUNTS": str(out), "OMP_NUM_THREADS": "1"}
    code, output = server.run(strategy, ranks, words, folder / name / "log", environment)
    assert code == 0, output[-3000:]
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    parts = {}
    for part in PARTS:
        of_ranks = [[entry for entry in entries if entry["part"] == part] for entries in found]
        own = of_ranks[0][1:] if part == "step" else of_ranks[0]  # the first step has memory to take and buckets to make
        what = sorted({name for entry in own for name in entry} - {"part"})
        parts[part] = {name: statistics.median(entry.get(name, 0) for entry in own) for name in what}
        parts[part]["listings on any rank"] = max(entry.get("listings", 0) for entries in of_ranks for entry in entries)
    checkpoint = folder / name / "run" / f"checkpoint-{STEPS}"
    parts["checkpoint"] = {"files": sum(path.is_file() for path in checkpoint.rglob("*"))}
    parts["checkpoint"]["bytes of manifest"] = (checkpoint / "manifest.json").stat().st_size
    return parts


def files_imported():
    """Return how many files a rank reads before it begins: Python's, and shared libraries that are mapped."""
    code = "import sys, forks; forks.import_libraries(); modules = list(sys.modules.values())"
    code += "; print(sum(bool(getattr(module, '__file__', None)) for module in modules))"
    code += "; print(len({line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}))"
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = ['tests', '.']; {code}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return {"Python": int(found[-2]), "libraries": int(found[-1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from zerotune.run.records import environment_facts, write_json
    from zerotune.tools.synthetic import build_model, build_rows

    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"model_type": "llama", "vocab_size": 1004, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
        build_model(folder / "model", "causal", settings | {"num_attention_heads": 4})
        build_rows(folder / "rows.jsonl", 128, [4, 20], [4, 20])
        os.environ["HF_HUB_OFFLINE"] = "1"
        server = Server()
        for strategy in ("ddp", "zero2", "zero3"):
            for ranks in RANKS:
                for accumulation in (1, 4):
                    if (strategy, ranks) == ("ddp", 1) or (accumulation == 4 and ranks not in (2, 4)):
                        continue
                    parts = counts_of(server, folder, folder / "model", folder / "rows.jsonl", strategy, ranks, accumulation)
                    cells.append({"strategy": strategy, "ranks": ranks, "accumulation": accumulation, "parts": parts})
                    print(json.dumps(cells[-1]), flush=True)
        server.stop()
    facts = {"environment": environment_facts() | {"command_line": None}, "steps": STEPS, "files_imported": files_imported()}
    write_json(args.out, facts | {"cells": cells})


if __name__ == "__main__":
    main()
