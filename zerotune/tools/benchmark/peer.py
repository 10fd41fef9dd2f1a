"""Hugging Face's Trainer beside train.py: the same model, rows, batch, precision, optimizer and frozen parts, in interleaved runs.

Two settings a row: equal, where neither side groups rows by length, and defaults, where each does what it does unasked.
"""

import random
import statistics
import sys

from zerotune.engine.deepspeed_config import has_cuda
from zerotune.errors import UserError
from zerotune.tools.benchmark.cells import Cell, flag_words
from zerotune.tools.benchmark.report import ratio_of

# glibc keeps freed blocks, so that resident memory differs by a tenth between equal runs. With larger blocks mapped one by one it
# follows the tensors; that costs speed, so on a CPU memory is measured in runs of its own.
MAPPED = (("MALLOC_MMAP_THRESHOLD_", "65536"),)
SETTINGS = {"equal": {"group_by_length": False}, "defaults": {}}


def command(words):
    return [sys.executable, "-m", "zerotune.tools.benchmark.peer_trainer", *words]


def make_models(matrix, out):
    """Return {row: flags of its model and rows}; make what is missing: the demo's rows and tokenizer, or rows of words; weights."""
    import shutil

    from zerotune.tools.demo import build
    from zerotune.tools.synthetic import build_model, build_rows

    demo, flags = out / "data" / "demo", {}
    if not (demo / "done").exists():
        shutil.rmtree(demo, ignore_errors=True)
        build(demo)
        (demo / "done").touch()
    for name, row in matrix["rows"].items():
        if not isinstance(row, dict) or "model" not in row:
            raise UserError(f"rows: {name}: needs a model, such as {{model_type: t5, d_model: 256}}")
        folder = out / "data" / name
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build_model(folder, row.get("task", "seq2seq"), row["model"])
            if "rows" in row:
                build_rows(folder / "rows.jsonl", **row["rows"])
            else:
                for path in (demo / "model").glob("tokenizer*"):
                    shutil.copy(path, folder)
            (folder / "done").touch()
        rows = folder / "rows.jsonl" if "rows" in row else demo / "train.jsonl"
        flags[name] = {"model_name_or_path": str(folder), "train_file": str(rows)}
    return flags


def cells_of(matrix, out):
    """Return the cells of all repeats: row x setting x engine, shuffled in each repeat."""
    made, generator, cells = make_models(matrix, out), random.Random(matrix["seed"]), []
    num_steps = matrix["warmup_steps"] + matrix["measured_steps"]
    # profile_steps of train.py would make its last step slower than the Trainer's; one beyond the measured ones is harmless.
    steps = {"max_steps": num_steps + 1, "logging_steps": 1, "save_steps": 0, "profile_steps": 1}
    for repeat in range(matrix["repeats"]):
        order = []
        for name, row in matrix["rows"].items():
            own = {key: value for key, value in row.items() if key not in ("model", "rows")}
            for setting in matrix["settings"]:
                words = flag_words(made[name] | matrix["flags"] | own | SETTINGS[setting] | steps, matrix["more_flags"])
                for engine in ("zerotune", "trainer"):
                    order.append(Cell("single", name, setting, words, repeat, engine))
                    if not has_cuda() and repeat < matrix["memory_repeats"]:
                        order.append(Cell("single", name, setting, words, f"memory-{repeat}", engine, MAPPED))
        generator.shuffle(order)
        cells += order
    return cells


def ratios(sides, key):
    """Return the spread of ours / theirs over the repeats that both sides have, or None where a number is missing."""
    pairs = [(ours.get(key), sides[1][repeat].get(key)) for repeat, ours in sides[0].items() if repeat in sides[1]]
    return ratio_of(pairs) if pairs and all(map(all, pairs)) else None


def compare(cells):
    """Return a row for each of the matrix's and each setting: both engines' numbers and the ratios ours / Trainer."""
    rows = []
    for name, setting in dict.fromkeys(
        (cell["set"], cell["batch"]) for cell in sorted(cells, key=lambda c: (c["set"], c["batch"]))
    ):
        group = [cell for cell in cells if (cell["set"], cell["batch"]) == (name, setting)]
        row = {"set": name, "batch": setting, "status": "ok"}
        bad = [cell for cell in group if cell["status"] != "ok"]
        sides = [{str(c["repeat"]): c for c in group if c["engine"] == engine} for engine in ("zerotune", "trainer")]
        for_speed, for_memory = (
            [{r: c for r, c in side.items() if bool(c["setenv"]) == mapped} for side in sides] for mapped in (False, True)
        )
        if bad or not all(for_speed):
            reason = f"{bad[0]['engine']}: {bad[0]['reason']}" if bad else "no runs yet"
            rows.append(row | {"status": bad[0]["status"] if bad else "missing", "reason": reason})
            continue
        on_device = bool(group[0]["peak_device_memory_gib"])
        memory = "peak_device_memory_gib" if on_device else "peak_host_memory_gib"
        row["speed_ratio"] = ratios(for_speed, "mean_tokens_per_second")
        row["flops_ratio"] = ratios(for_speed, "flops_per_real_token")
        row["memory_ratio"] = ratios(for_speed if on_device else for_memory, memory)
        for engine, fast, mapped in zip(("zerotune", "trainer"), for_speed, for_memory, strict=True):
            runs, runs_of_memory = list(fast.values()), list((fast if on_device else mapped).values())
            losses = [statistics.fmean(values) for values in zip(*(run["losses"] for run in runs), strict=True)]
            row[engine] = {
                "tokens_per_second": statistics.median(run["mean_tokens_per_second"] for run in runs),
                "padding_fraction": statistics.fmean(run["padding_fraction"] for run in runs),
                memory: max((run[memory] for run in runs_of_memory), default=None),
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "losses": losses,
            }
        rows.append(row)
    return rows
