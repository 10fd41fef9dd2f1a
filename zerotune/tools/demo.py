"""The embedded default: a small T5 and a real data set from what every machine with Python has, its standard library.

    python -m zerotune demo build OUTPUT_DIR
    python -m zerotune demo report RUN_DIR...

The first writes OUTPUT_DIR/{train,validation,test}.jsonl with rows {source, target, module}: a function's source without its
docstring, and the first sentence of the docstring; and OUTPUT_DIR/model, an untrained T5 with a BPE tokenizer trained on the
training rows. The second prints a table over finished runs on it.
"""

import ast
import hashlib
import json
import re
import sysconfig
from pathlib import Path

from zerotune.errors import UserError

NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
VOCABULARY, MAX_SOURCE_CHARACTERS, MIN_TARGET_CHARACTERS = 4096, 1500, 10
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # T5's, numbers 0, 1, 2


def first_sentence(docstring):
    """Return a docstring's first sentence on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0]


def without_docstring(source, node):
    """Return a function's source with its docstring's lines taken out."""
    lines, docstring = source.splitlines(), node.body[0]
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() or not node.col_offset else line for line in kept)


def functions(path):
    """Yield (source without docstring, first sentence of the docstring) of every documented function in a file."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # a few library files are test data in other encodings
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            docstring = ast.get_docstring(node)
            if docstring and node.body[0].lineno > node.lineno:
                yield without_docstring(source, node), first_sentence(docstring)


def rows_by_split():
    """Return {split: rows}, split by top-level module: about 80/10/10, and no source or target sentence in two splits."""
    root = Path(sysconfig.get_path("stdlib"))
    splits, seen = {"train": [], "validation": [], "test": []}, {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_LIBRARY & set(relative.parts):
            continue
        module = relative.parts[0].removesuffix(".py")
        # A hash, not an order: the same module falls into the same split on every Python version.
        bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 10
        split = {0: "validation", 1: "test"}.get(bucket, "train")
        for source, target in functions(path):
            texts = (source, target)
            if len(source) > MAX_SOURCE_CHARACTERS or len(target) < MIN_TARGET_CHARACTERS:
                continue
            if any(seen.get(text, split) != split for text in texts) or (texts in seen):
                continue  # "Return the length." stands in many modules: it stays with the first
            seen |= dict.fromkeys(texts, split) | {texts: split}
            splits[split].append({"source": source, "target": target, "module": module})
    return splits


def train_tokenizer(texts):
    """Return a byte-level BPE tokenizer that ends each text with </s>, as T5's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_model(vocabulary, *, d_model=192, num_layers=3, seed=0):
    """Return an untrained T5 1.1 (gated GELU, an output head of its own) with dropout 0.1."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=d_model,
        d_kv=d_model // 4,
        d_ff=2 * d_model,
        num_heads=4,
        num_layers=num_layers,
        num_decoder_layers=num_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    # transformers ties T5's head on construction; T5 1.1 has one of its own, told apart on loading by its different values.
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * d_model**-0.5)
    return model


def build(output_dir):
    """Write the data set, the tokenizer and the model; return {split: number of rows}."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    splits = rows_by_split()
    for split, rows in splits.items():
        (output_dir / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(text for row in splits["train"] for text in (row["source"], row["target"]))
    tokenizer.save_pretrained(output_dir / "model")
    build_model(len(tokenizer)).save_pretrained(output_dir / "model")
    return {split: len(rows) for split, rows in splits.items()}


def report(*folders):
    """Return the lines of a table over finished runs, then three of the last run's predictions and where its model is."""
    rows = [("", *(Path(folder).name for folder in folders))]
    runs = [json.loads((Path(folder) / "run.json").read_text()) for folder in folders]
    records = [[json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()] for folder in folders]

    def row(name, values):
        rows.append((name, *values))

    training = [[record for record in run if "loss" in record] for run in records]
    tests = [next(record for record in reversed(run) if "test_loss" in record) for run in records]
    row("strategy", (f"ZeRO-{run['engine']['zero_stage']}, offload {run['engine']['offload_param']}" for run in runs))
    row("processes, device", (f"{run['engine']['num_processes']}, {run['engine']['device']}" for run in runs))
    row("trainable parameters", (f"{run['parameters']['trainable']:,} of {run['parameters']['total']:,}" for run in runs))
    row("steps", (str(run["max_steps"]) for run in runs))
    row("training loss, first record", (f"{run[0]['loss']:.3f}" for run in training))
    row("training loss, last record", (f"{run[-1]['loss']:.3f}" for run in training))
    row("test loss", (f"{record['test_loss']:.3f}" for record in tests))
    row("test ROUGE-L", (f"{record['test_rougeL']:.3f}" for record in tests))
    speeds = (sorted(record["tokens_per_second"] for record in run)[len(run) // 2] for run in training)
    row("real tokens/s, median", (f"{speed:,.0f}" for speed in speeds))
    seconds = [sorted(record["step_seconds"] for record in run)[len(run) // 2] for run in training]
    saves = [[record["save_seconds"] for record in run if "save_seconds" in record] for run in records]
    if all(saves):  # 500 is the default of --save_steps
        shares = (max(run) / (max(run) + 500 * step) for run, step in zip(saves, seconds, strict=True))
        row("a save every 500 steps, share of the time", (f"{100 * share:.3f} %" for share in shares))
        sizes = ([r["checkpoint_bytes"] for r in run if "checkpoint_bytes" in r][-1] for run in records)
        row("checkpoint", (f"{size / 1e6:.1f} MB" for size in sizes))
    for kind in ("device", "host"):
        peaks = [max(record[f"peak_{kind}_memory_gib"] for record in run) for run in training]
        if any(peaks):
            row(f"peak {kind} memory of a process", (f"{peak:.2f} GiB" for peak in peaks))
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    predictions = [json.loads(line) for line in (Path(folders[-1]) / "predictions.jsonl").read_text().splitlines()]
    for sample in predictions[:: max(1, len(predictions) // 3)][:3]:
        lines += ["", f"function:   {sample['source'].splitlines()[0][:100]}"]
        lines += [f"reference:  {sample['reference'][:100]}", f"prediction: {sample['prediction'][:100]}"]
    return [*lines, "", f'load it:    AutoModelForSeq2SeqLM.from_pretrained("{Path(folders[-1]) / "final"}")']


def main(words):
    if len(words) == 2 and words[0] == "build":
        for split, count in build(words[1]).items():
            print(f"{split}: {count:,} rows")
    elif len(words) > 1 and words[0] == "report":
        print("\n".join(report(*words[1:])))
    else:
        raise UserError("needs build OUTPUT_DIR, or report RUN_DIR...")
    return 0
