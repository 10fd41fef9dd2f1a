"""From files to checked, tokenised rows, and from rows to padded batches.

A file is read row by row with its line numbers, checked and tokenised once; the result is a folder in the datasets cache, named by
the SHA-256 of all that went into it (file contents, tokenizer, flags), so that every other process, and the next run, only maps it
into memory. A row's columns:
    input_ids    list[int]  the encoder's (or classifier's) input; causal: prompt and target in one
    labels       list[int]  the tokens to predict; causal: as long as input_ids and already shifted, -100 where nothing is predicted
    label        str        the class (classification)
    reference    str        the target text as it was given
    prompt_length int       tokens of input_ids that are given at generation (causal pairs)
    length       int        tokens of the encoder's and the decoder's input together; longest_side: of the longer one
    num_targets, source_cut, target_cut, line   int; error  str, empty for a good row
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch

from zerotune.batches import deal, rows_of_step
from zerotune.errors import UserError, nearest
from zerotune.files import read_rows
from zerotune.loss import IGNORE

FORMAT = 2  # of the cached rows: raise it when encode() changes what it writes
FLAGS_OF_ROWS = (
    "task source_column target_column text_column label_column source_prefix source_suffix source_lang target_lang "
    "max_source_length max_target_length"
)
SPLITS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


def text_of(record, column, flag, allow_empty=False):
    """Return a text column of one row; raise ValueError with what is wrong."""
    if column not in record:
        raise ValueError(f"no column {column!r}{nearest(column, record)}; columns: {', '.join(record) or 'none'}; see --{flag}")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip() and not allow_empty:
        raise ValueError(f"column {column!r} is empty")
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


def encode(batch, tokenizer, args):
    """Return the tokenised columns (see the module's text) of a batch of {line, record, error} rows."""
    errors, fields = list(batch["error"]), []
    for index, record in enumerate(batch["record"]):
        try:
            fields.append(fields_of(json.loads(record), args) if not errors[index] else ("", "", ""))
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
        answers, target_cut = tokenise(tokenizer, targets, limit, add_special_tokens=alone)
        for index, answer in enumerate(answers):
            prompt = [] if alone else prompts[index] + suffix_ids
            ended = answer if target_cut[index] or answer[-1:] == eos else answer[: limit - len(eos)] + eos
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
    columns = {key: [] for key in ("input_ids", "labels", "prompt_length", "length", "longest_side", "num_targets")}
    for index, (ids, labels, prompt_length) in enumerate(rows):
        num_targets = sum(label != IGNORE for label in labels)
        if num_targets == 0 and not errors[index]:
            errors[index] = "no target token is left to learn from"
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["prompt_length"].append(prompt_length)
        columns["length"].append(len(ids) + (len(labels) if args.task == "seq2seq" else 0))
        columns["longest_side"].append(max(len(ids), len(labels)))
        columns["num_targets"].append(num_targets)
    texts = {"label": [label for _, _, label in fields], "reference": targets}
    return columns | texts | {"source_cut": source_cut, "target_cut": target_cut, "line": batch["line"], "error": errors}


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_identity(tokenizer):
    """Return a text that differs when the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return vocabulary + repr(tokenizer)


def load_split(split, args, tokenizer):
    """Return (tokenised rows, their SHA-256 name, whether this process did the work) of one split, or (None, None, False).

    The first process to come builds the folder beside its final name and renames it, so that no one reads half of it.
    """
    path = getattr(args, SPLITS[split])
    if path is None and args.dataset_name is None:
        return None, None, False
    if path is not None:
        identity = file_sha256(path)
    else:
        hub = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        if split not in hub:
            return None, None, False
        identity = hub[split]._fingerprint
    flags = (
        "task source_column target_column text_column label_column source_prefix source_suffix source_lang target_lang "
        "max_source_length max_target_length"
    )
    parts = [FORMAT, identity, Path(path).suffix if path else "", *(getattr(args, name) for name in flags.split())]
    digest = hashlib.sha256((json.dumps(parts) + tokenizer_identity(tokenizer)).encode()).hexdigest()[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "zerotune"
    folder, built = root / digest, False
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            rows = raw_rows(path, hub[split] if path is None else None, scratch)
            if rows is None or len(rows) == 0:
                raise UserError(f"{path or args.dataset_name}: the {split} split has no rows")
            rows = rows.map(
                encode,
                batched=True,
                remove_columns=rows.column_names,
                fn_kwargs={"tokenizer": tokenizer, "args": args},
                num_proc=args.preprocessing_num_workers if args.preprocessing_num_workers > 1 else None,
                cache_file_name=os.path.join(scratch, "tokenised.arrow"),
                desc=f"tokenise {split}",
            )
            rows.save_to_disk(os.path.join(scratch, "done"))
            try:
                os.rename(os.path.join(scratch, "done"), folder)
            except OSError:
                if not folder.exists():  # else another node was first, with the same rows
                    raise
        built = True
    return datasets.load_from_disk(str(folder)), digest, built


def raw_rows(path, hub_split, scratch):
    """Return a Dataset of {line, record, error}, None if there are no rows; tables (Parquet, hub) count rows in place of lines."""
    if path is None or Path(path).suffix == ".parquet":
        try:
            table = hub_split if path is None else datasets.Dataset.from_parquet(path, cache_dir=scratch)
        except Exception as error:  # the reader's own errors have no common base
            raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None
        generator, options = table_rows, {"table": table}
    else:
        generator, options = read_rows, {"path": str(path)}
    features = datasets.Features(
        {name: datasets.Value(kind) for name, kind in (("line", "int64"), ("record", "string"), ("error", "string"))}
    )
    try:
        return datasets.Dataset.from_generator(generator, features=features, cache_dir=scratch, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        return None


def table_rows(table):
    for number, record in enumerate(table, 1):
        yield {"line": number, "record": json.dumps(record, default=str), "error": ""}


def bad_rows(rows, name, known_labels=None):
    """Return (problem of each bad row as 'file:line: what', the good rows' indices)."""
    errors = rows["error"][:]
    if known_labels is not None:
        for index, label in enumerate(rows["label"][:]):
            if not errors[index] and label not in known_labels:
                errors[index] = f"label {label!r} is outside the set {', '.join(known_labels)}"
    lines = rows["line"][:]
    good = [index for index, error in enumerate(errors) if not error]
    return [f"{name}:{lines[index]}: {error}" for index, error in enumerate(errors) if error], good


def sort_labels(labels):
    """Return class names in order: numbers by value, texts by alphabet."""
    whole = all(label.lstrip("-").isdigit() for label in labels)
    return sorted(labels, key=int if whole else str)


class Data:
    """The splits of a run: rows[split] is a Dataset of good rows, lengths[split] an int array for cutting batches."""

    def __init__(self, args, tokenizer, model_labels=(), max_positions=None):
        """Load every split that is there. Raises UserError listing bad rows (all counted, the first ten shown).

        model_labels: class names that the model already knows. max_positions: the longest input that it can take, in tokens.
        """
        self.rows, self.lengths, self.digests, self.bad, self.built = {}, {}, {}, {}, {}
        names = {split: getattr(args, flag) or f"{args.dataset_name}[{split}]" for split, flag in SPLITS.items()}
        for split in SPLITS:
            rows, digest, built = load_split(split, args, tokenizer)
            if rows is not None:
                self.rows[split], self.digests[split], self.built[split] = rows, digest, built
        if "train" not in self.rows:
            raise UserError(f"{args.dataset_name}: no train split")
        self.labels = None
        if args.task == "classification":
            found = {label for label in set(self.rows["train"]["label"][:]) if label}
            self.labels = args.labels or (list(model_labels) if found <= set(model_labels) else sort_labels(found))
        problems = []
        for split, rows in self.rows.items():
            bad, good = bad_rows(rows, names[split], self.labels)
            self.bad[split] = len(bad)
            if bad and not args.skip_bad_rows:
                more = f" (the first ten of {len(bad)})" if len(bad) > 10 else ""
                problems += [f"{len(bad)} bad rows in {names[split]}{more}; mend them or pass --skip_bad_rows", *bad[:10]]
            elif bad:
                self.rows[split] = rows.select(good)
            if bad and not good:
                problems.append(f"{names[split]}: no good row is left")
            self.lengths[split] = np.asarray(self.rows[split]["length"][:])
            longest = max(self.rows[split]["longest_side"][:], default=0)
            if max_positions is not None and longest > max_positions:
                problems.append(
                    f"{names[split]}: the longest row has {longest} tokens, but the model has {max_positions} positions; "
                    "lower --max_source_length or --max_target_length"
                )
        if problems:
            raise UserError(*problems)

    def report(self):
        """Return {split: counts, length percentiles in tokens, truncations} for the log and run.json."""
        report = {}
        for split, rows in self.rows.items():
            lengths = self.lengths[split]
            facts = {"rows": len(rows), "bad_rows": self.bad[split], "sha256": self.digests[split]}
            facts["length_tokens"] = {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)}
            for part in ("source", "target"):
                cut = np.asarray(rows[f"{part}_cut"][:])
                facts[f"truncated_{part}s"] = {
                    "rows": int((cut > 0).sum()),
                    "tokens": int(cut.sum()),
                    "longest_cut": int(cut.max()),
                }
            if self.labels is not None:
                facts["labels"] = dict(Counter(rows["label"][:]))
            report[split] = facts
        return report


def describe(split, facts):
    """Return one line of text for the log from a split's part of Data.report."""
    lengths = " ".join(f"{name} {value}" for name, value in facts["length_tokens"].items())
    text = f"{split}: {facts['rows']:,} rows, {facts['bad_rows']} bad ones left out, tokens a row: {lengths}"
    for part in ("source", "target"):
        cut = facts[f"truncated_{part}s"]
        if cut["rows"]:
            text += f"; {cut['rows']:,} {part}s truncated by {cut['tokens']:,} tokens (one by {cut['longest_cut']:,})"
    return text


class Collator:
    """Pads rows to one batch of tensors on the CPU: input_ids, attention_mask, labels, and decoder_input_ids for seq2seq.

    pad_to_multiple_of: 8 on GPUs, whose matrix units want it. decoder_inputs: the model's own right shift of the labels.
    """

    def __init__(self, task, pad_token_id, labels=None, pad_to_multiple_of=1, decoder_inputs=None):
        self.task, self.pad, self.multiple = task, pad_token_id, pad_to_multiple_of
        self.class_numbers = {name: number for number, name in enumerate(labels or [])}
        self.decoder_inputs = decoder_inputs

    def pad_rows(self, rows, value, left=False):
        longest = max(len(row) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        padding = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])

    def __call__(self, columns):
        """columns: {name: list over rows}, as Dataset slicing returns; gives a dict of int64 tensors."""
        ids = columns["input_ids"]
        batch = {"input_ids": self.pad_rows(ids, self.pad), "attention_mask": self.pad_rows([[1] * len(row) for row in ids], 0)}
        if self.task == "classification":
            return batch | {"labels": torch.tensor([self.class_numbers[label] for label in columns["label"]])}
        # A cache of keys and values is for generation; in a training step it would only hold memory.
        batch |= {"labels": self.pad_rows(columns["labels"], IGNORE), "use_cache": False}
        if self.decoder_inputs is not None:
            batch["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        return batch

    def prompts(self, columns):
        """Return the inputs of generation: the source, or (causal) the prompt padded on the left."""
        ids, left = columns["input_ids"], self.task == "causal"
        if left:
            ids = [row[:length] for row, length in zip(ids, columns["prompt_length"], strict=True)]
        mask = self.pad_rows([[1] * len(row) for row in ids], 0, left)
        return {"input_ids": self.pad_rows(ids, self.pad, left), "attention_mask": mask}


class TrainingSteps(torch.utils.data.Dataset):
    """Item s is the list of this rank's collated micro-batches of optimizer step s; nothing else decides the data order."""

    def __init__(self, data, collator, args, num_processes, rank):
        self.rows, self.lengths, self.collator = data.rows["train"], data.lengths["train"], collator
        self.seed, self.accumulation, self.num_processes, self.rank = (
            args.seed,
            args.gradient_accumulation_steps,
            num_processes,
            rank,
        )
        self.batch_size = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps

    def __getitem__(self, step):
        rows = rows_of_step(step, len(self.rows), self.batch_size, self.seed)
        dealt = deal(rows, self.lengths[rows], self.accumulation, self.num_processes)
        return [self.collator(self.rows[ranks[self.rank]]) for ranks in dealt]


def count_tokens(batch):
    """Return (real tokens, tokens with padding) of a collated batch, as Python ints: encoder and decoder inputs together."""
    real, padded = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    if "decoder_input_ids" in batch:
        return real + int((batch["labels"] != IGNORE).sum()), padded + batch["labels"].numel()
    return real, padded
