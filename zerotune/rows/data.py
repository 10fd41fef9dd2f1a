"""From files to checked, tokenised rows, and from rows to padded batches.

A file is read row by row with its line numbers, checked and tokenised once; the result is a folder in the datasets cache, named by
the SHA-256 of all that went into it (file contents, tokenizer, flags), so that every other process, and the next run, only maps it
into memory. A row's columns:
    input_ids    list[int]  the encoder's (or classifier's) input; causal: prompt and target in one
    labels       list[int]  the tokens to predict; causal: as long as input_ids and already shifted, -100 where nothing is predicted
    label        str        the class (classification)
    reference    str        the target text as it was given
    prompt_length int       tokens of input_ids that are given at generation (causal pairs)
    length       int        tokens of the encoder's and the decoder's input together; longest_side: of the longer one; largest_id
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

from zerotune.errors import UserError, nearest
from zerotune.rows import IGNORE
from zerotune.rows.files import read_rows

FORMAT = 3  # of the cached rows: raise it when encode() changes what it writes
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
    columns = {key: [] for key in ("input_ids", "labels", "prompt_length", "length", "longest_side", "largest_id", "num_targets")}
    for index, (ids, labels, prompt_length) in enumerate(rows):
        num_targets = sum(label != IGNORE for label in labels)
        if num_targets == 0 and not errors[index]:
            errors[index] = "no target token is left to learn from"
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["prompt_length"].append(prompt_length)
        columns["length"].append(len(ids) + (len(labels) if args.task == "seq2seq" else 0))
        columns["longest_side"].append(max(len(ids), len(labels)))
        columns["largest_id"].append(max([*ids, *labels, 0]))
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


def load_hub(args):
    """Return the hub data set's splits, {} if the rows come from files; raise UserError if it cannot be had."""
    if args.dataset_name is None:
        return {}
    try:
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    except Exception as error:  # datasets raises whatever its loaders raise
        raise UserError(f"--dataset_name {args.dataset_name}: {' '.join(str(error).split())[:300]}") from None


def load_split(split, args, tokenizer, identity, hub):
    """Return (tokenised rows, their SHA-256 name, whether this process did the work) of one split, or (None, None, False).

    identity: tokenizer_identity, taken before the first use, which changes the tokenizer's state. hub: load_hub's splits. The
    first process to come builds the folder beside its final name and renames it, so that no one reads half of it.
    """
    path = getattr(args, SPLITS[split])
    if path is None and split not in hub:
        return None, None, False
    source = file_sha256(path) if path is not None else hub[split]._fingerprint
    parts = [FORMAT, source, Path(path).suffix if path else "", *(getattr(args, name) for name in FLAGS_OF_ROWS.split())]
    digest = hashlib.sha256((json.dumps(parts) + identity).encode()).hexdigest()[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "zerotune"
    folder, built = root / digest, False
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as scratch:
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

    def __init__(self, args, tokenizer, model_labels=(), max_positions=None, vocab_size=None):
        """Load every split that is there. Raises UserError listing bad rows (all counted, the first ten shown).

        model_labels: class names that the model already knows. max_positions: the longest input that it can take, in tokens.
        vocab_size: its number of embeddings. A hub's test split without a single good row (labels withheld) is left out.
        """
        self.rows, self.lengths, self.digests, self.bad, self.built = {}, {}, {}, {}, {}
        names = {split: getattr(args, flag) or f"{args.dataset_name}[{split}]" for split, flag in SPLITS.items()}
        identity, hub = tokenizer_identity(tokenizer), load_hub(args)
        for split in SPLITS:
            rows, digest, built = load_split(split, args, tokenizer, identity, hub)
            if rows is not None:
                self.rows[split], self.digests[split], self.built[split] = rows, digest, built
        if "train" not in self.rows:
            raise UserError(f"{args.dataset_name}: no train split")
        self.labels = None
        if args.task == "classification":
            found = {label for label in set(self.rows["train"]["label"][:]) if label}
            self.labels = args.labels or (list(model_labels) if found <= set(model_labels) else sort_labels(found))
        problems = []
        for split, rows in list(self.rows.items()):
            bad, good = bad_rows(rows, names[split], self.labels)
            if split == "test" and not good and args.test_file is None:
                del self.rows[split]
                continue
            self.bad[split] = len(bad)
            if bad and not args.skip_bad_rows:
                more = f" (the first ten of {len(bad)})" if len(bad) > 10 else ""
                problems += [f"{len(bad)} bad rows in {names[split]}{more}; mend them or pass --skip_bad_rows", *bad[:10]]
            elif bad:
                self.rows[split] = rows.select(good)
            if bad and not good:
                problems.append(f"{names[split]}: no good row is left")
            self.lengths[split] = np.asarray(self.rows[split]["length"][:])
            problems += self.limits(split, names[split], args, max_positions, vocab_size)
        if problems:
            raise UserError(*problems)

    def limits(self, split, name, args, max_positions, vocab_size):
        """Return problems with rows that do not fit the model: too long, generation too long, token ids without an embedding."""
        rows, problems = self.rows[split], []
        virtual = args.num_virtual_tokens if args.peft in ("prefix", "prompt") else 0  # they come first and take positions
        if max_positions is not None:
            longest = max(rows["longest_side"][:], default=0)
            room = max(rows["prompt_length"][:], default=0) + (args.generation_max_length or args.max_target_length)
            generates = split == "test" or (split == "validation" and args.predict_with_generate and bool(args.metric))
            generates = generates and args.task == "causal" and not args.text_column
            for tokens, what in (
                (longest, "the longest row has"),
                (room if generates else 0, "the longest prompt and generation have"),
            ):
                if tokens + virtual > max_positions:
                    problems.append(
                        f"{name}: {what} {tokens} tokens{f' beside {virtual} virtual ones' * bool(virtual)}, but the model has "
                        f"{max_positions} positions; "
                        "lower --max_source_length, --max_target_length or --generation_max_length"
                    )
        largest = max(rows["largest_id"][:], default=0)
        if vocab_size is not None and largest >= vocab_size:
            problems.append(
                f"{name}: the tokenizer gives token {largest}, but the model has {vocab_size} embeddings; "
                "give the model's own --tokenizer_name"
            )
        return problems

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
