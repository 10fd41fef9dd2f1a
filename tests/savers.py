"""Every memory saver x model x strategy: trains, resumes in the same bits, exports, loads again; or is refused, and why.

    .venv/bin/python tests/savers.py --out docs/savers.json     writes docs/savers.md beside it; goes on where it was stopped

tests/test_savers.py runs a few of them.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forks  # noqa: E402

SAVERS = {
    "lora": {"peft": "lora", "merge_adapter": "true"},
    "dora": {"peft": "dora"},
    "rslora": {"peft": "rslora"},
    "adalora": {"peft": "adalora", "lora_r": 4, "learning_rate": 0.1},
    "ia3": {"peft": "ia3", "learning_rate": 0.2, "eval_steps": 1},
    "prefix": {"peft": "prefix", "num_virtual_tokens": 4, "learning_rate": 1.0},
    "prompt": {"peft": "prompt", "num_virtual_tokens": 4, "learning_rate": 5.0, "eval_steps": 1},
    "trainable_tokens": {
        "peft": "trainable_tokens",
        "trainable_tokens": [*(f"w{n}" for n in range(1, 20)), "<mine>"],
        "merge_adapter": "true",
    },
    "lora, head learns": {"peft": "lora", "unfreeze": ["head"], "learning_rate": 0.005},
    "loss_chunks": {"loss_chunks": 3, "learning_rate": 0.005},
    "lora, loss_chunks, checkpointing": {"peft": "lora", "loss_chunks": 3, "gradient_checkpointing": "true"},
    "qlora (nf4, double)": {
        "quantize": "nf4",
        "double_quant": "true",
        "peft": "lora",
        "target_modules": ["all-linear"],
        "learning_rate": 0.005,
        "eval_steps": 1,
    },
    "int8, lora": {"quantize": "int8", "peft": "lora", "target_modules": ["all-linear"], "learning_rate": 0.005},
    "fp4, head learns": {"quantize": "fp4", "unfreeze": ["head"], "learning_rate": 0.005, "eval_steps": 1},
    "adamw_bnb_8bit": {"optim": "adamw_bnb_8bit", "learning_rate": 0.005},
    "lion_8bit": {"optim": "lion_8bit", "learning_rate": 0.002},
    "lion_32bit": {"optim": "lion_32bit", "learning_rate": 0.002},
    "muon": {"optim": "muon", "muon_learning_rate": 0.02, "learning_rate": 0.005, "max_grad_norm": 0},
    "packing": {"packing": "true", "learning_rate": 0.005},
    "cached prefix": {"freeze": ["FROZEN"], "frozen_eval": "true", "cache_frozen": "CACHE", "learning_rate": 0.005},
    "freeze_schedule": {"freeze_schedule": "gradual(3)", "learning_rate": 0.005},
    "checkpointing every:2, activation_offload": {
        "gradient_checkpointing": "every:2",
        "activation_offload": "true",
        "learning_rate": 0.005,
    },
    "torch_compile": {"torch_compile": "true", "learning_rate": 0.005},
    "torch_compile, qlora, checkpointing": {
        "torch_compile": "true",
        "quantize": "nf4",
        "peft": "lora",
        "target_modules": ["all-linear"],
        "gradient_checkpointing": "true",
        "learning_rate": 0.005,
        "eval_steps": 1,
    },
}
MODELS = ("t5", "bart", "gpt2", "llama", "phi3")
STRATEGIES = ("single", "ddp", "zero2", "zero3")
STEPS, SAVED = 6, 3


def fork(strategy, folder, flags):
    """Run train.py in forks of this process, which has imported the libraries once; return (exit code, output)."""
    log, environment = folder.with_suffix(".log"), {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    code = forks.run(strategy, None, [*flags, "--output_dir", str(folder)], log, environment, timeout=300)
    return code, log.read_text()


def in_a_fork(function, *arguments):
    """Return what the function returns, called in a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write, json.dumps(function(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(write)
    with open(read) as file:
        return json.loads(file.read())


def records(folder, key):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record[key] for record in lines if key in record]


def check(strategy, model, rows, options, folder):
    """Return "works" or "refused: why" for one place of the table; AssertionError for anything else.

    model: a folder with a tiny model; rows: a file, with validation.jsonl beside it; options: a saver's flags.
    """
    from conftest import check_engine, flags_of
    from state import state_hash

    from zerotune.engine.optimizer import BITSANDBYTES

    config = json.loads((Path(model) / "config.json").read_text())
    task = "seq2seq" if config.get("is_encoder_decoder") else "causal"
    common = {
        "model_name_or_path": model, "train_file": rows, "validation_file": rows.with_name("validation.jsonl"), "task": task,
        # 5 rows: with 2 ranks the last evaluation batch of one of them has no target at all.
        "per_device_eval_batch_size": 2, "predict_with_generate": "false",
        "learning_rate": 0.02, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4 if strategy == "single" else 2,
        "gradient_accumulation_steps": 4, "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1,
        "max_target_length": 32,
    }  # fmt: skip
    if config["model_type"] == "phi3" and options.get("peft", "prompt") not in ("prefix", "prompt", "trainable_tokens"):
        options = {"target_modules": ["all-linear"], **options}  # peft has no choice of its own for it
    if "cache_frozen" in options:
        frozen = ["encoder"] if task == "seq2seq" else ["embeddings", "layers[:1]"]
        options = {**options, "freeze": frozen, "cache_frozen": folder / "cache"}
    flags = flags_of(common | options)
    straight, again = folder / "straight", folder / "again"
    code, output = fork(strategy, straight, flags)
    if code == 2:
        (line, *_) = [line for line in output.splitlines() if "error: " in line]
        assert "Traceback" not in output
        return f"refused: {line.partition('error: ')[2]}"
    assert code == 0, output[-4000:]
    engine = json.loads((straight / "run.json").read_text())["engine"]
    optimizers = BITSANDBYTES | {"muon": "MuonWithAuxAdam"}
    assert engine.pop("base_optimizer", engine["optimizer"]) == optimizers.get(options.get("optim"), "AdamW")
    if not options.get("quantize"):  # quantised weights are sharded later, when DeepSpeed takes the model over
        check_engine(engine | {"base_optimizer": "AdamW"}, strategy, None)
    losses = records(straight, "loss")
    evaluated = records(straight, "eval_loss")  # without dropout, whose noise hides what a prompt on a small BART learns
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < sum(losses[:2]) or evaluated[-1] < evaluated[0], (losses, evaluated)

    shutil.copytree(straight, again)
    shutil.rmtree(again / f"checkpoint-{STEPS}")
    shutil.rmtree(again / "final")
    code, output = fork(strategy, again, flags)
    assert code == 0, output[-4000:]
    assert json.loads((again / "run.json").read_text())["resumed_from"].endswith(f"checkpoint-{SAVED}")
    assert records(again, "loss") == losses
    assert state_hash(again / f"checkpoint-{STEPS}") == state_hash(straight / f"checkpoint-{STEPS}")

    files = {path.name for path in (straight / "final").iterdir()}
    assert ("adapter_model.safetensors" in files) == bool(options.get("peft")) != ("model.safetensors" in files), files
    expected = evaluated[-1]
    for name in ("final", "merged") if options.get("merge_adapter") else ("final",):
        loss = in_a_fork(loss_of, straight, name)
        assert abs(loss - expected) <= 1e-4 * expected, (name, loss, expected)
    return "works"


def loss_of(run, name):
    """Return the loss of the validation rows under final/ or merged/, loaded as a user would: with transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from train import forward_loss
    from zerotune.model.loading import AUTO_CLASSES
    from zerotune.model.loss import count_targets
    from zerotune.model.quantization import quantization_config
    from zerotune.rows.collation import Collator
    from zerotune.rows.data import Data
    from zerotune.run.arguments import Arguments

    args = Arguments(**json.loads((run / "run.json").read_text())["arguments"])
    adapter = args.peft and name == "final"
    tokenizer = AutoTokenizer.from_pretrained(run / name)
    quantization = quantization_config(args, None, torch.float32, 0)
    folder = args.model_name_or_path if adapter else run / name
    base = AUTO_CLASSES[args.task].from_pretrained(folder, quantization_config=quantization)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
    for module in base.modules():  # bitsandbytes' product for evaluation on a CPU rounds to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = (PeftModel.from_pretrained(base, run / name) if adapter else base).eval()
    rows = Data(args, tokenizer).rows["validation"][:]
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    batch = Collator(args.task, tokenizer.pad_token_id, None, 1, shift)(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        return (forward_loss(model, batch, labels)[0] / count_targets({"labels": labels})).item()


def make_inputs(folder):
    """Return ({model: folder}, rows): tiny models and a file of 16 rows of unequal length."""
    import torch
    from conftest import save_tokenizer, text, tiny_config

    models = {}
    for name in MODELS:
        models[name] = folder / name
        if not models[name].exists():
            model_class, config = tiny_config(name, 0.1)
            # 64 is the block of the four-bit kernels on a CPU
            wide = {
                "d_model": 64,
                "hidden_size": 64,
                "n_embd": 64,
                "d_ff": 128,
                "intermediate_size": 128,
                "d_kv": 16,
                "head_dim": 16,
            }
            config.update({key: value for key, value in wide.items() if key in config.to_dict()})
            torch.manual_seed(1)
            model_class(config).save_pretrained(models[name])
            save_tokenizer(models[name])
    rows = [{"source": text(n, 1 + 3 * n), "target": text(n + 3, 1 + (n * 11) % 31)} for n in range(16)]
    for name, part in (("rows", rows), ("validation", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return models, folder / "rows.jsonl"


def write_table(results, path):
    """Write the results as a Markdown table: a row for each saver and strategy, a column for each model; reasons below."""
    lines = ["# Memory savers: what works where", "", f"Written by tests/savers.py; {results['environment']}.", ""]
    lines += ["| saver | strategy | " + " | ".join(MODELS) + " |", "|---|---|" + "---|" * len(MODELS)]
    reasons = []
    for saver in SAVERS:
        for strategy in STRATEGIES:
            cells = []
            for model in MODELS:
                found = results["cells"].get(f"{saver}/{strategy}/{model}", "")
                if found not in ("works", ""):
                    if found not in reasons:
                        reasons.append(found)
                    found = f"{found.partition(':')[0]} ({reasons.index(found) + 1})"
                cells.append(found)
            lines.append(f"| {saver} | `{strategy}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    lines += [
        "",
        "Flags; for phi3, of which peft has no choice of its own, the adapters on layers also get `--target_modules all-linear`; "
        "FROZEN is `encoder`, of a decoder `embeddings 'layers[:1]'`:",
        "",
    ]
    for saver, options in SAVERS.items():
        words = (f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in options.items())
        lines.append(f"- {saver}: `{' '.join(words)}`")
    Path(path).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    everything = [f"{saver}/{strategy}/{model}" for saver in SAVERS for strategy in STRATEGIES for model in MODELS]
    parser.add_argument("--only", nargs="+", metavar="SAVER/STRATEGY/MODEL", default=everything, choices=everything)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # threads do not outlive a fork
    forks.import_libraries()
    from zerotune.run.records import environment_facts, write_json

    facts = environment_facts()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft", "deepspeed"))
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    commit = facts["git_commit"][:12] + "-dirty" * facts["git_commit"].endswith("-dirty")
    with tempfile.TemporaryDirectory() as folder:
        models, rows = make_inputs(Path(folder))
        for name in args.only:
            saver, strategy, model = name.split("/")
            if results["cells"].get(name, "fails").startswith("fails"):
                run = Path(folder) / "runs"
                shutil.rmtree(run, ignore_errors=True)
                run.mkdir()
                try:
                    results["cells"][name] = check(strategy, models[model], rows, SAVERS[saver], run)
                except AssertionError as error:
                    said = [line for line in str(error).splitlines() if "Error" in line]
                    results["cells"][name] = f"fails: {(said or [str(error)[-300:]])[0]}"
                print(f"{name}: {results['cells'][name]}", flush=True)
                results.setdefault("commits", {})[name] = commit
                commits = ", ".join(sorted(set(results["commits"].values())))
                results["environment"] = f"{versions}; commit {commits} (each place's in savers.json)"
                write_json(args.out, results)
                write_table(results, args.out.with_suffix(".md"))
    return int(any(found.startswith("fails") for found in results["cells"].values()))


if __name__ == "__main__":
    sys.exit(main())
