"""The embedded default: a small T5 and a real data set from what every machine with Python has, its standard library.

    python -m zerotune.demo OUTPUT_DIR

writes OUTPUT_DIR/{train,validation,test}.jsonl with rows {source, target, module}: a function's source without its docstring, and
the first sentence of the docstring; and OUTPUT_DIR/model, an untrained T5 with a BPE tokenizer trained on the training rows.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from pathlib import Path

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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m zerotune.demo OUTPUT_DIR")
    for split, count in build(sys.argv[1]).items():
        print(f"{split}: {count} rows")
