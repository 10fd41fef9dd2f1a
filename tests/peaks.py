"""The planner against real steps: predicted and measured peaks over models, what learns, checkpointing, pieces of the loss, shapes.

    .venv/bin/python tests/peaks.py --out docs/planner.json     docs/planner.md and .png beside it; goes on where it was stopped

Measured is what the events of torch's own allocator say of the last step of a real train.py on the CPU, on top of the weights and
optimizer states, counted at their tensors. tests/test_plan.py runs a few of them.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forks  # noqa: E402

NUM_WORDS = 4000
# None drops out: a CPU's attention would hold all its weights for that, which a GPU's does not.
T5 = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8, "dropout_rate": 0.0}
BART = {"d_model": 256, "dropout": 0.0}
BART |= {
    f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 4), ("attention_heads", 8), ("ffn_dim", 1024))
}
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
GPT2 = {"n_embd": 256, "n_layer": 8, "n_head": 8, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS = {
    "t5": ("seq2seq", {"model_type": "t5", **T5}),
    "bart": ("seq2seq", {"model_type": "bart", **BART}),
    "llama": ("causal", {"model_type": "llama", **LLAMA}),
    "gpt2": ("causal", {"model_type": "gpt2", **GPT2}),
    "phi3": ("causal", {"model_type": "phi3", "num_key_value_heads": 2, **LLAMA}),
}
LORA = {"peft": "lora", "target_modules": ["all-linear"]}
LEARNS = {  # task -> name -> flags
    "seq2seq": {
        "all": {},
        "frozen encoder": {"freeze": ["encoder"]},
        "last two blocks": {"freeze": ["all"], "unfreeze": ["decoder.layers[-2:]"]},
    },
    "causal": {
        "all": {},
        "frozen embeddings": {"freeze": ["embeddings"]},
        "last two blocks": {"freeze": ["all"], "unfreeze": ["layers[-2:]"]},
    },
}
for sets in LEARNS.values():
    sets["LoRA"] = LORA
    sets["QLoRA"] = LORA | {"quantize": "nf4", "double_quant": True}
SAVERS = {
    "": {},
    "checkpointing": {"gradient_checkpointing": True},
    "pieces": {"loss_chunks": 4},
    "checkpointing, pieces": {"gradient_checkpointing": True, "loss_chunks": 4},
}
SHAPES = {"short": (4, (20, 128), (10, 48)), "long": (2, 384, 96)}  # rows, source and target tokens: of unequal and of one length
# Beyond one process in float32: (strategy, precision), on one model of each kind.
STRATEGIES = [("single", "bf16"), ("zero1", "bf16"), *itertools.product(("ddp", "zero2", "zero3"), ("no", "bf16"))]


def cells():
    """Yield (name, model, strategy, flags) of each cell."""
    for model, saver, shape in itertools.product(MODELS, SAVERS, SHAPES):
        for learns, flags in LEARNS[MODELS[model][0]].items():
            if saver in ("checkpointing", "pieces") and learns not in ("all", "LoRA"):
                continue  # both together are tried on all
            yield (model, learns, saver, shape, "single", "no"), flags | SAVERS[saver]
    for (strategy, precision), model, saver in itertools.product(STRATEGIES, ("t5", "llama"), ("", "checkpointing, pieces")):
        yield (model, "all", saver, "short", strategy, precision), SAVERS[saver] | {"mixed_precision": precision}


def compare(name, flags, inputs, folder, run):
    """Return {"predicted", "measured"}, each with bytes of weights, optimizer states and of all at the peak, of one cell.

    inputs: a folder for models and rows, which are made once. run: forks.run, or another that starts a run and gives its code.
    """
    from zerotune.plan.forecast import Planner
    from zerotune.plan.machine import this_machine
    from zerotune.tools.plan import planner_of

    model, _, _, shape, strategy, _ = name
    task, settings = MODELS[model]
    rows, sources, targets = SHAPES[shape]
    processes = 1 if strategy == "single" else 2
    files = make(inputs, model, task, settings, shape, sources, targets, rows * processes)
    options = {
        "model_name_or_path": files[0], "train_file": files[1], "output_dir": folder, "task": task, "max_source_length": 512,
        "max_target_length": 512, "per_device_train_batch_size": rows, "max_steps": 3, "save_steps": 0, "logging_steps": 1,
        "profile_steps": 1, "learning_rate": 1e-3, "text_column": "source" if task == "causal" else None,
    } | flags  # fmt: skip
    log, environment = folder.with_suffix(".log"), {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    code = run(strategy, processes, words_of(options), log, environment)
    assert code == 0, log.read_text()[-3000:]
    record = next(r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "step_peak_gib" in r)
    measured = {kind: round(gib * 2**30) for kind, gib in record["before_step_gib"]["host"].items()}
    measured["step"] = round(record["step_peak_gib"] * 2**30)
    planner = planner_of(arguments(options))
    assert isinstance(planner, Planner)
    forecast = planner.forecast(strategy, this_machine(processes))
    assert not forecast.problem, forecast.problem
    return {
        "predicted": forecast.device,
        "measured": measured,
        "parameters": sum(p.numel for p in next(iter(planner.traced.values()))[0]),
    }


def make(inputs, model, task, settings, shape, sources, targets, num_rows):
    """Return (folder of the model, file of the rows), made at the first call; as many rows as a step takes: each step is alike."""
    from zerotune.tools.synthetic import build_model, build_rows

    folder, rows = inputs / model, inputs / f"{shape}{num_rows}.jsonl"
    if not folder.exists():
        build_model(folder, task, {"vocab_size": NUM_WORDS} | settings)
    if not rows.exists():
        build_rows(rows, num_rows, as_list(sources), as_list(targets))
    return folder, rows


def as_list(lengths):
    return lengths if isinstance(lengths, int) else list(lengths)


def words_of(options):
    from conftest import flags_of

    return flags_of({name: "true" if value is True else value for name, value in options.items()})


def arguments(options):
    from zerotune.run.arguments import parse_arguments

    return parse_arguments([str(word) for word in words_of(options)])


def total(result):
    """Return (predicted, measured) bytes at the peak."""
    return sum(result["predicted"].values()), sum(result["measured"].values())


def error_of(result):
    predicted, measured = total(result)
    return predicted / measured - 1


def summary(results):
    """Return {"cells", "median_error", "worst_error", "furthest_below"} over the cells."""
    errors = [error_of(result) for result in results.values()]
    return {
        "cells": len(errors),
        "median_error": statistics.median(map(abs, errors)),
        "worst_error": max(map(abs, errors)),
        "furthest_below": -min(0.0, *errors),
    }


def of(results, *starts):
    """Return the cells whose strategies' names start so."""
    return {name: result for name, result in results.items() if name[4].startswith(starts)}


def table(content):
    """Return the results as Markdown."""
    facts, results = content["environment"], {tuple(json.loads(k)): v for k, v in content["cells"].items()}
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "deepspeed", "peft"))
    lines = [
        "# The planner against real steps",
        "",
        f"Peaks of torch's allocator in real steps of train.py on the CPU, weights and optimizer states included. {versions}.",
        "Written by tests/peaks.py.",
        "",
        f"- One process: {sentence(of(results, 'single'))}",
        f"- DDP on two processes: {sentence(of(results, 'ddp'))}",
        "  What is below by more than 2 % is T5 in bf16 with checkpointing and the loss in pieces: by the size of one more",
        "  gradient of its tied embedding.",
        f"- ZeRO on two processes: {sentence(of(results, 'zero'))}",
        "  What is above 5 % is ZeRO-3, and ZeRO-2 in float32: buckets, gathered weights and gradients on their way are planned",
        "  at their most, all at once, while a step of so small a model meets them one by one.",
        "",
        "![predicted and measured peaks](planner.png)",
        "",
        "| model | learns | saved by | shape | strategy | precision | predicted, MB | measured, MB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        predicted, measured = total(result)
        lines.append(f"| {' | '.join(name)} | {predicted / 1e6:.2f} | {measured / 1e6:.2f} | {error_of(result):+.2%} |")
    return "\n".join(lines) + "\n"


def sentence(results):
    """Return the summary of some cells in words."""
    s = summary(results)
    return (
        f"{s['cells']} real steps: median error {s['median_error']:.3%}, worst {s['worst_error']:.2%}, at most "
        f"{s['furthest_below']:.2%} below what was measured."
    )


def draw(content, path):
    """Draw predicted against measured peaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {tuple(json.loads(k)): v for k, v in content["cells"].items()}
    figure, axes = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
    ends = [min(map(total, results.values()))[0] / 1e6 * 0.8, max(map(total, results.values()))[1] / 1e6 * 1.2]
    axes.plot(ends, ends, color="grey", linewidth=0.8, label="exact")
    axes.fill_between(ends, [e * 0.95 for e in ends], [e * 1.05 for e in ends], color="grey", alpha=0.2, label="5 %")
    for model, colour in zip(MODELS, pyplot.get_cmap("tab10").colors, strict=False):
        points = [total(result) for name, result in results.items() if name[0] == model]
        axes.scatter([m / 1e6 for _, m in points], [p / 1e6 for p, _ in points], s=14, color=colour, label=model)
    axes.set(xscale="log", yscale="log", xlabel="measured peak of a step, MB", ylabel="predicted, MB")
    axes.set_title(f"{len(results)} real steps on the CPU")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    from zerotune.run.records import environment_facts, write_json

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    args = parser.parse_args()
    os.environ.setdefault("HF_DATASETS_CACHE", str(args.out.parent.resolve() / "peaks_cache"))
    forks.import_libraries()
    content = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    facts = environment_facts() | {"command_line": None}
    content["environment"] = facts
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"
        for number, (name, flags) in enumerate(cells()):
            key = json.dumps(name)
            if key in content["cells"] or args.only not in " ".join(name):
                continue
            folder = Path(scratch) / f"run{number}"
            result = in_a_fork(compare, name, flags, Path(scratch), folder, forks.run)
            print(f"{' '.join(name)}: {error_of(result):+.3%}", flush=True)
            content["cells"][key] = result | {"git_commit": facts["git_commit"]}
            write_json(args.out, content)
            shutil.rmtree(folder, ignore_errors=True)
    args.out.with_suffix(".md").write_text(table(content))
    draw(content, args.out.with_suffix(".png"))
    print(summary({tuple(json.loads(k)): v for k, v in content["cells"].items()}))
    return 0


def in_a_fork(*arguments):
    from savers import in_a_fork

    return in_a_fork(*arguments)


if __name__ == "__main__":
    sys.exit(main())
