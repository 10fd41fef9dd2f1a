"""From records to token ids: what of a row is learned, and what is wrong with it. A row's columns:

input_ids    list[int]  the encoder's (or classifier's) input; causal: prompt and target in one
labels       list[int]  the tokens to predict; causal: as long as input_ids and already shifted, -100 where nothing is predicted
label        str        the class (classification)
reference    str        the target text as it was given
prompt_length int       tokens of input_ids that are given at generation (causal pairs)
length       int        tokens of the encoder's and the decoder's input together; longest_side: of the longer one; largest_id
num_targets, source_cut, target_cut, line   int; error  str, empty for a good row
"""

import numpy as np
import pyarrow as pa

from zerotune.errors import nearest
from zerotune.rows import IGNORE

FORMAT = 3  # of the cached rows: raise it when encode() changes what it writes
LISTS = ("input_ids", "labels")


def text_of(record, column, flag, allow_empty=False):
    """Return a text column of one row; raise ValueError with what is wrong."""
    if column not in record:
        raise ValueError(f"no column {column!r}{nearest(column, record)}; columns: {', '.join(record) or 'none'}; see --{flag}")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip() and not allow_empty:
        raise ValueError(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} holds half a character (a lone surrogate) at {error.start}") from None
    return value


def fields_of(record, args):
    """Return (source or None, target or None, label) texts of one row for args.task; raise ValueError."""
    if args.task == "classification":
        text = text_of(record, args.text_column or "text", "text_column")
        label = record.get(args.label_column)
        if isinstance(label, float) or not isinstance(label, (str, int)) or label == "":
            found = "missing or empty" if label in (None, "") else f"{type(label).__name__}, not text or a whole number"
            raise ValueError(f"column {args.label_column!r} is {found}; see --label_column")
        return text, None, str(label)
    if args.task == "causal" and args.text_column:
        return None, text_of(record, args.text_column, "text_column"), ""
    source = text_of(record, args.source_column, "source_column", allow_empty=True)
    return source, text_of(record, args.target_column, "target_column"), ""


def tokenise(tokenizer, texts, max_length, side="text", **options):
    """Return (token ids of each text, tokens cut off each): special tokens are kept where the tokenizer adds them.

    side: "text", or "text_target", for which mBART-like tokenizers write the target language's marks.
    """
    options |= {"padding": False, "return_attention_mask": False, "verbose": False}
    ids = tokenizer(**{side: texts}, truncation=False, **options)["input_ids"]
    cut = [max(0, len(row) - max_length) for row in ids]
    for index in np.flatnonzero(cut):
        ids[index] = tokenizer(**{side: texts[index]}, truncation=True, max_length=max_length, **options)["input_ids"]
    return ids, cut


def encode(chunk, tokenizer, args):
    """Return the tokenised rows, a pyarrow.RecordBatch of the columns above, of a list of (line, record, error)."""
    errors, fields = [error for _, _, error in chunk], []
    for index, (_, record, error) in enumerate(chunk):
        try:
            fields.append(fields_of(record, args) if not error else ("", "", ""))
        except ValueError as error:
            errors[index] = str(error)
            fields.append(("", "", ""))
    sources = [f"{args.source_prefix}{source or ''}" for source, _, _ in fields]
    targets = [target or "" for _, target, _ in fields]
    rows = []
    if args.task == "causal":
        suffix = "\n" if args.source_suffix is None else args.source_suffix
        suffix_ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        prompts, source_cut = tokenise(tokenizer, sources, max(1, args.max_source_length - len(suffix_ids)))
        alone = bool(args.text_column)  # one text a row: the tokenizer's own special tokens, all of it learned
        limit = args.max_source_length if alone else args.max_target_length
        answers, target_cut = tokenise(tokenizer, targets, limit - len(eos), add_special_tokens=alone)
        for index, answer in enumerate(answers):
            prompt = [] if alone else prompts[index] + suffix_ids
            ended = answer if target_cut[index] or answer[-1:] == eos else answer + eos
            ids = prompt + ended
            labels = ([IGNORE] * len(prompt) + ended)[1:] + [IGNORE]
            rows.append((ids, labels, len(prompt)))
        source_cut = [0] * len(rows) if alone else source_cut
    else:
        suffixed = [source + (args.source_suffix or "") for source in sources]
        inputs, source_cut = tokenise(tokenizer, suffixed, args.max_source_length)
        if args.task == "seq2seq":
            labels, target_cut = tokenise(tokenizer, targets, args.max_target_length, side="text_target")
        else:
            labels, target_cut = [[0]] * len(inputs), [0] * len(inputs)  # the class number is filled in by the collator
        rows = [(ids, label, 0) for ids, label in zip(inputs, labels, strict=True)]
    ids, labels = (pa.array(part, pa.list_(pa.int32())) for part in ([row[0] for row in rows], [row[1] for row in rows]))
    # Over the flat tokens of all rows at once: a row's share of them lies between two offsets.
    lengths = [np.diff(part.offsets.to_numpy()) for part in (ids, labels)]
    num_targets = per_row(np.add, labels.flatten().to_numpy() != IGNORE, lengths[1])
    for index in np.flatnonzero(num_targets == 0):
        errors[index] = errors[index] or "no target token is left to learn from"
    largest = [per_row(np.maximum, part.flatten().to_numpy(), sizes) for part, sizes in zip((ids, labels), lengths, strict=True)]
    columns = {
        "input_ids": ids,
        "labels": labels,
        "prompt_length": [row[2] for row in rows],
        "length": lengths[0] + (lengths[1] if args.task == "seq2seq" else 0),
        "longest_side": np.maximum(*lengths),
        "largest_id": np.maximum(*largest),
        "num_targets": num_targets,
        "source_cut": source_cut,
        "target_cut": target_cut,
        "line": [line for line, _, _ in chunk],
    }
    texts = {"label": [label for _, _, label in fields], "reference": targets, "error": errors}
    arrays = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    for name, values in columns.items():
        arrays[name] = values if name in LISTS else pa.array(values, pa.int64())
    return pa.RecordBatch.from_pydict(arrays)


def per_row(operation, values, sizes):
    """Return operation.reduce over each row's part of `values`, 0 for an empty row; sizes: of the parts, in order."""
    result = np.zeros(len(sizes), dtype=np.int64)
    filled = np.flatnonzero(sizes)
    if len(filled):
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[filled]
        result[filled] = operation.reduceat(values.astype(np.int64), starts)
    return np.maximum(result, 0)
