"""Time whole epochs of a T5 with a frozen encoder: run each time, cached in the first epoch, and read from the first step on.

    python -m zerotune.tools.benchmark.epochs --out benchmarks/cpu/frozen_cache

Random weights of width 256 and texts of exact lengths (50 to 400 tokens in, 8 to 40 out, short ones more often); float32, one
process, micro-batches of 8. Speed is real tokens by the seconds of all steps, start and end left out, repeat by repeat against the
run without a cache. The folder gets results.json and table.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from zerotune.run.records import GIB, environment_facts, write_json
from zerotune.tools.synthetic import build_model, build_rows

ROOT = Path(__file__).resolve().parents[3]
T5 = {"model_type": "t5", "vocab_size": 2048, "d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 1024, "num_layers": 6}
MODELS = {"6 + 6 layers": {**T5, "num_decoder_layers": 6}, "6 + 1 layers": {**T5, "num_decoder_layers": 1}}
MODELS["12 + 1 layers"] = {**T5, "num_layers": 12, "num_decoder_layers": 1}
ROWS = 128
KINDS = {"each epoch": False, "cached in the first": True, "read from the first": True}  # the last finds what the second wrote


def train(folder, model, name, cache, epochs):
    """Train as the kind says; return (real tokens, seconds of the steps, peak GiB, last loss, facts of the cache)."""
    output = folder / name
    flags = ["--model_name_or_path", folder / model, "--train_file", folder / "rows.jsonl", "--output_dir", output]
    flags += ["--freeze", "encoder", "--frozen_eval", "--num_train_epochs", epochs, "--logging_steps", "1", "--save_steps", "0"]
    flags += ["--learning_rate", "1e-3", "--end_report", "false", *(["--cache_frozen", cache] if cache else [])]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step_seconds" in record]
    facts = json.loads((output / "run.json").read_text()).get("frozen_cache", {})
    facts.pop("folder", None)  # a temporary one
    peak = max(record["peak_host_memory_gib"] for record in steps)
    seconds = sum(record["step_seconds"] for record in steps)
    return sum(record["real_tokens"] for record in steps), seconds, peak, steps[-1]["loss"], facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_rows", type=int, default=ROWS)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=[*MODELS], help="the others' results stay as they are in --out"
    )
    args = parser.parse_args()
    path = args.out / "results.json"
    before = json.loads(path.read_text()) if path.exists() else None
    labels = {model: model if args.num_rows == ROWS else f"{model}, {args.num_rows} rows" for model in args.models}
    kept = [run for run in before["runs"] if run["model"] not in labels.values()] if before else []
    found = [*kept]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_rows(folder / "rows.jsonl", args.num_rows, [50, 400], [8, 40])
        for number, model in enumerate(args.models):
            build_model(folder / str(number), "seq2seq", MODELS[model])
            for repeat in range(args.repeats):
                for kind, cached in KINDS.items():
                    run = f"{number}-{repeat}-{kind.split()[0]}"
                    cache = folder / f"cache{number}-{repeat}" if cached else None
                    tokens, seconds, peak, loss, facts = train(folder, str(number), run, cache, args.epochs)
                    row = {
                        "model": labels[model],
                        "kind": kind,
                        "repeat": repeat,
                        "tokens_per_second": tokens / seconds,
                        "peak_gib": peak,
                    }
                    found.append(row | {"loss": loss, "cache": facts})
                    print(f"{labels[model]}, {kind}: {tokens / seconds:,.0f} tokens/s, last loss {loss:.6f}", flush=True)
    environment = environment_facts() | {"command_line": None}
    if kept:
        environment["git_commit"] = f"{before['environment']['git_commit']}, {environment['git_commit']}"
    results = {"environment": environment, "epochs": args.epochs, "rows": before["rows"] if kept else args.num_rows, "runs": found}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    (args.out / "table.md").write_text(table(results))
    print(table(results))


def table(results):
    """Return the results as Markdown: real tokens a second, and the speed beside the run without a cache, repeat by repeat."""
    facts = results["environment"]
    lines = [
        f"{results['epochs']} epochs of {results['rows']} rows; {facts['device']}; torch {facts['versions']['torch']}; commit "
        f"{facts['git_commit']}; {1 + max(run['repeat'] for run in results['runs'])} repeats",
        "",
        "| model | encoder | tokens/s: median (least-most) | speed | peak GiB | last loss | cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(run["model"] for run in results["runs"]):
        speeds = {kind: [r for r in results["runs"] if (r["model"], r["kind"]) == (model, kind)] for kind in KINDS}
        base = [run["tokens_per_second"] for run in speeds["each epoch"]]
        for kind, runs in speeds.items():
            values = [run["tokens_per_second"] for run in runs]
            ratios = [ours / other for ours, other in zip(values, base, strict=True)]
            size = runs[0]["cache"]
            words = f"{size['bytes'] / GIB:.3f} GiB, {size['bytes_a_token']:,} bytes a token" if size else "-"
            lines.append(
                f"| {model} | {kind} | {statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f}) | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
                f"{max(run['peak_gib'] for run in runs):.2f} | {runs[0]['loss']:.6f} | {words} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
