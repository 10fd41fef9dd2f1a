"""Measure train.py over a matrix of strategies, sets of flags and batches, each cell a run of its own in real processes.

    python -m zerotune benchmark --matrix benchmarks/quickstart.yaml --out runs/benchmark
    python -m zerotune benchmark --out runs/mine --strategies zero2 zero3 --repeats 5 -- --model_name_or_path ... --train_file ...
    python -m zerotune benchmark --peer trainer --matrix benchmarks/peer.yaml --out runs/peer     beside Hugging Face's Trainer

benchmarks/README.md explains the keys of a matrix. A killed benchmark goes on with the cells that are missing. Running out of
memory, or a refusal, is a cell's result. The folder gets results.json, table.md and plots; runs/ in it holds the log of each cell.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml

from zerotune.errors import UserError, nearest
from zerotune.run.arguments import parse_arguments
from zerotune.run.records import environment_facts, write_json
from zerotune.tools.benchmark import peer, report
from zerotune.tools.benchmark.cells import Cell, cell_facts, flag_words

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = {
    "title": "",
    "data": None,
    "flags": {},
    "strategies": [],
    "sets": {"full": {}},
    "batches": [{}],
    "rows": {},
    "settings": [*peer.SETTINGS],
    "memory_repeats": None,
    "baseline": None,
    "num_processes": None,
    "warmup_steps": 3,
    "measured_steps": 10,
    "profile_steps": 3,
    "repeats": 1,
    "control": True,
    "memory_limit_gib": 0,
    "cell_timeout_seconds": 1800,
    "seed": 0,
}
DATA_KEYS = {"model", "rows", "dtype"}


def read_matrix(args):
    """Return the matrix of a command line: the YAML's keys, then the flags; raise UserError with every mistake."""
    content = {}
    if args.matrix:
        try:
            content = yaml.safe_load(Path(args.matrix).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--matrix {args.matrix}: {' '.join(str(error).split())}") from None
    problems = [f"{args.matrix}: {key!r} is no key of a matrix{nearest(key, DEFAULTS)}" for key in content if key not in DEFAULTS]
    matrix = DEFAULTS | content
    problems += [f"{args.matrix}: {line}" for line in wrong_shapes(matrix)]
    if problems:
        raise UserError(*problems)
    for name in ("strategies", "repeats", "num_processes"):
        if getattr(args, name) is not None:
            matrix[name] = getattr(args, name)
    matrix["memory_repeats"] = matrix["memory_repeats"] or matrix["repeats"]
    matrix["more_flags"], matrix["peer"] = args.train_flags, args.peer
    allowed = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    problems += [
        f"strategy {name!r} is not known{nearest(name, allowed)}; allowed: {', '.join(allowed)}"
        for name in matrix["strategies"]
        if name not in allowed
    ]
    if isinstance(matrix["data"], dict):
        problems += [
            f"data: {key!r} is not known; allowed: {', '.join(DATA_KEYS)}" for key in matrix["data"] if key not in DATA_KEYS
        ]
    elif matrix["data"] not in (None, "demo"):
        problems.append(f"data {matrix['data']!r}: must be demo, or model and rows to make, or absent with files in the flags")
    if not matrix["strategies"] and not problems:
        problems.append("no strategy to measure: give --strategies, or a --matrix with them")
    if args.peer and not matrix["rows"]:
        problems.append("--peer trainer: the matrix needs rows (see benchmarks/peer.yaml)")
    if problems:
        raise UserError(*problems)
    return matrix


def wrong_shapes(matrix):
    """Return a line for each key of a matrix that is of the wrong kind."""
    lines = [f"{key}: must be {{flag: value}}" for key in ("flags", "rows") if not isinstance(matrix[key], dict)]
    sets, batches = matrix["sets"], matrix["batches"]
    if not isinstance(sets, dict) or not all(isinstance(flags, dict) for flags in sets.values()):
        lines.append("sets: must be {name: {flag: value}}; a set without flags is {}")
    if not isinstance(batches, list) or not all(isinstance(flags, dict) for flags in batches):
        lines.append("batches: must be a list of {flag: value}")
    if not isinstance(matrix["settings"], list) or not set(matrix["settings"]) <= set(peer.SETTINGS):
        lines.append(f"settings: must be a list of {', '.join(peer.SETTINGS)}")
    if not isinstance(matrix["strategies"], list):
        lines.append("strategies: must be a list of names")
    for key, least in (("repeats", 1), ("measured_steps", 1), ("warmup_steps", 0), ("profile_steps", 2)):
        if not isinstance(matrix[key], int) or matrix[key] < least:
            lines.append(f"{key} {matrix[key]!r}: must be a whole number, at least {least}")
    return lines


def claim_folder(out, matrix):
    """Make the results folder, or raise UserError if it holds the results of another matrix."""
    path = out / "matrix.json"
    if path.exists():
        before = json.loads(path.read_text())
        differ = sorted(key for key in matrix.keys() | before.keys() if matrix.get(key) != before.get(key))
        if differ:
            raise UserError(
                f"--out {out}: holds the results of another matrix (different: {', '.join(differ)}); give another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is neither empty nor a benchmark's folder; give another one")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    write_json(path, matrix)


def prepare_data(matrix, out):
    """Return the flags of the model and rows that the matrix wants made, and make them if they are not there."""
    data, folder = matrix["data"], out / "data"
    if data is None:
        return {}
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if data == "demo":
            from zerotune.tools.demo import build

            build(folder)
        else:
            import torch

            from zerotune.tools.synthetic import build_model, build_rows

            folder.mkdir()
            task = matrix["flags"].get("task", "seq2seq")
            build_model(folder / "model", task, data.get("model", {}), getattr(torch, data.get("dtype", "float32")))
            build_rows(folder / "train.jsonl", **data.get("rows", {}))
        (folder / "done").touch()
    return {"model_name_or_path": str(folder / "model"), "train_file": str(folder / "train.jsonl")}


def cells_of(matrix, made):
    """Return the cells of all repeats in the order in which they run: shuffled in each repeat, a control first and last."""
    num_steps = matrix["warmup_steps"] + matrix["measured_steps"] + matrix["profile_steps"]
    steps = {"max_steps": num_steps, "logging_steps": 1, "profile_steps": matrix["profile_steps"]}
    first = []
    for batch in matrix["batches"]:
        for name, flags in matrix["sets"].items():
            for strategy in matrix["strategies"]:
                words = flag_words(made | {"save_steps": num_steps} | matrix["flags"] | steps | flags | batch, matrix["more_flags"])
                first.append(Cell(strategy, name, report.batch_label(batch), words))
    if not first:
        raise UserError("the matrix has no cells: it needs strategies, sets and batches")
    generator, cells = random.Random(matrix["seed"]), []
    for repeat in range(matrix["repeats"]):
        order = [cell.of_repeat(repeat) for cell in first]
        generator.shuffle(order)
        cells += order
    if matrix["control"]:
        cells = [first[0].of_repeat("control_first"), *cells, first[0].of_repeat("control_last")]
    return cells


def check_flags(cells):
    """Raise UserError for flags that train.py does not have, before anything runs."""
    problems = {}
    for cell in cells:
        try:
            parse_arguments([*cell.words, "--output_dir", "unused"])
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(*problems)


def child_limits(memory_limit_gib):
    """Return a function for a child process: it ends with this one, and may be held to an address space."""

    def limit():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed benchmark leaves no run behind
        if memory_limit_gib:
            size = int(memory_limit_gib * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return limit if sys.platform == "linux" else None


def end(process):
    """End a cell that is too slow, or not wanted any more: the second SIGINT ends a run without a checkpoint."""
    for seconds in (5, 60):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            return
    process.kill()
    process.wait()


def run_cell(cell, folder, matrix):
    """Run one cell in processes of its own; return its facts, whatever its end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin, log = time.perf_counter(), folder / "log"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "STRATEGY": cell.strategy, "PYTHON": sys.executable, "PYTHONPATH": path, **dict(cell.setenv)}
    if matrix["num_processes"] and cell.strategy != "single":
        environment["NUM_PROCESSES"] = str(matrix["num_processes"])
    command = peer.command(cell.words) if cell.engine == "trainer" else ["bash", str(ROOT / "scripts/launch.sh"), *cell.words]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--output_dir", str(folder / "run")],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=child_limits(matrix["memory_limit_gib"]),
        )
        try:
            code = process.wait(timeout=matrix["cell_timeout_seconds"])
        except BaseException as error:
            end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = "timeout"
    facts = cell_facts(cell, folder, code, log.read_text(errors="replace"), matrix["warmup_steps"], matrix["measured_steps"])
    for large in ("final", *(path.name for path in (folder / "run").glob("checkpoint-*"))):
        shutil.rmtree(folder / "run" / large, ignore_errors=True)
    commit = environment_facts()["git_commit"]
    return facts | {"wall_seconds": round(time.perf_counter() - begin, 1), "git_commit": commit}


def peak_of(out, mixed_precision):
    """Return {"flops_per_second", "source"} of this machine's device, measured once for a results folder."""
    path = out / f"peak_{mixed_precision}.json"
    if not path.exists():
        # In a process of its own: a CUDA context here would take memory from the cells.
        code = f"from zerotune.tools.hardware import peak_of_device; print(*peak_of_device({mixed_precision!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        flops, source = done.stdout.strip().splitlines()[-1].split(maxsplit=1)
        write_json(path, {"flops_per_second": float(flops), "source": source})
    return json.loads(path.read_text())


def run_matrix(matrix, out):
    """Run the cells that have no result yet, then write what the folder is to hold; return the results."""
    made = prepare_data(matrix, out)
    cells = peer.cells_of(matrix, out) if matrix["peer"] else cells_of(matrix, made)
    check_flags([cell for cell in cells if cell.engine == "zerotune"])
    began, done_before = time.perf_counter(), sum(cell.path(out).exists() for cell in cells)
    for number, cell in enumerate(cells, 1):
        if not cell.path(out).exists():
            write_json(cell.path(out), run_cell(cell, out / "runs" / cell.name, matrix))
            finished = sum(other.path(out).exists() for other in cells)
            left = (time.perf_counter() - began) / max(1, finished - done_before) * (len(cells) - finished)
            facts = json.loads(cell.path(out).read_text())
            print(f"[{number}/{len(cells)}] {report.one_line(facts)}; about {left / 60:.0f} min left", flush=True)
        write_results(matrix, out, cells)
    return write_results(matrix, out, cells, plots=True)


def write_results(matrix, out, cells, plots=False):
    """Write results.json and table.md of the cells that are done (and, at the end, the plots); return the results."""
    facts = [json.loads(cell.path(out).read_text()) for cell in cells if cell.path(out).exists()]
    for cell in facts:
        if cell["status"] == "ok" and cell.get("model_flops_per_second"):
            peak = peak_of(out, cell["mixed_precision"])
            cell["mfu"] = cell["model_flops_per_second"] / (peak["flops_per_second"] * cell["num_devices"])
    peaks = {path.stem.removeprefix("peak_"): json.loads(path.read_text()) for path in sorted(out.glob("peak_*.json"))}
    environment = environment_facts()
    commits = sorted({cell["git_commit"] for cell in facts if cell.get("git_commit")})
    environment["git_commit"] = ", ".join(commits) or environment["git_commit"]  # those that were measured
    results = {"environment": environment, "matrix": matrix, "peaks": peaks, "cells": facts}
    controls = [
        cell["tokens_per_second"]["median"] for cell in facts if "control" in str(cell["repeat"]) and cell["status"] == "ok"
    ]
    if len(controls) == 2:
        results["control_drift"] = controls[1] / controls[0] - 1
    ours = [cell for cell in facts if "control" not in str(cell["repeat"])]
    results["rows"] = peer.compare(ours) if matrix["peer"] else report.aggregate(ours, matrix)
    # Results are to be shown: in which folders they were made is nobody's business.
    results = json.loads(json.dumps(results).replace(str(out), "OUT").replace(f"{ROOT}/", ""))
    write_json(out / "results.json", results)
    (out / "table.md").write_text(report.markdown(results))
    if plots and not matrix["peer"]:
        report.draw(results, out)
    return results


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m zerotune benchmark", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--matrix", metavar="FILE.yaml", help="what to measure; see benchmarks/README.md")
    parser.add_argument("--out", type=Path, required=True, help="results folder; one that is there is gone on with")
    parser.add_argument("--strategies", nargs="+", help="in place of the matrix's: files of accelerate_configs/ without .yaml")
    parser.add_argument("--repeats", type=int, help="in place of the matrix's; ratios are quoted from 5 on")
    parser.add_argument("--num_processes", type=int, help="in place of the matrix's; default: all GPUs here, 2 on a CPU")
    parser.add_argument("--peer", choices=["trainer"], help="run Hugging Face's Trainer beside train.py")
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    args.train_flags, args.out = flags, args.out.resolve()
    return args


def main(words):
    args = parse(words)
    try:
        matrix = read_matrix(args)
        claim_folder(args.out, matrix)
        results = run_matrix(matrix, args.out)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is missing in {args.out}", file=sys.stderr)
        return 130
    print((args.out / "table.md").read_text())
    failed = statistics.fmean(cell["status"] == "ok" for cell in results["cells"]) == 0
    return 1 if failed else 0
