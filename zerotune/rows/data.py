"""From files to checked, tokenised rows on disk, mapped into memory.

A file is read row by row with its line numbers, checked and tokenised once; the result is an Arrow file in the datasets cache, in a
folder named by the SHA-256 of all that went into it (file contents, tokenizer, flags), so that every other process, and the next
run, only maps it. encoding.py says what columns a row has.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zerotune.errors import UserError
from zerotune.flags import ROWS, names_deciding
from zerotune.rows import IGNORE
from zerotune.rows.chat import Chats
from zerotune.rows.encoding import CUT_AWAY, FORMAT, encode
from zerotune.rows.files import kind_of, read_rows

ROWS_FILE = "rows.arrow"
LAYOUT = 2  # of the files in a folder of cached rows
CHUNK = 1000  # rows that are tokenised in one go
SPLITS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_identity(tokenizer):
    """Return a text that differs when the tokenizer does, wherever its files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return vocabulary + repr(tokenizer).replace(repr(tokenizer.name_or_path), "")


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
    flags = (getattr(args, name) for name in names_deciding(args, ROWS))
    parts = [FORMAT, source, kind_of(path) if path else "", *flags]
    chats = Chats(tokenizer, args) if args.messages_column else None
    parts += [tokenizer.chat_template] * bool(chats)
    all_targets = args.targets == "all" and split == "train"  # evaluations count each row once
    parts += ["all targets"] * all_targets
    digest = hashlib.sha256((json.dumps(parts) + identity).encode()).hexdigest()[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "zerotune"
    folder, built = root / f"{digest}-{LAYOUT}", False
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as scratch:
            done = Path(scratch) / "done"
            done.mkdir()
            records = records_of(path, hub[split] if path is None else None, scratch)
            if write_rows(done / ROWS_FILE, records, args, (tokenizer, args, chats, all_targets)) == 0:
                raise UserError(f"{path or args.dataset_name}: the {split} split has no rows")
            try:
                os.rename(done, folder)
            except OSError:
                if not folder.exists():  # else another node was first, with the same rows
                    raise
        built = True
    return datasets.Dataset.from_file(str(folder / ROWS_FILE)), digest, built


def write_rows(path, records, args, given):
    """Tokenise (line, record, error) tuples into an Arrow file, with several processes if the flags say so; return their number.

    given: the further arguments of encode.
    """
    count, writer = 0, None
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    with contextlib.ExitStack() as stack:
        for batch in encoded(chunks, args, given, stack):
            if writer is None:
                writer = stack.enter_context(
                    pa.RecordBatchStreamWriter(stack.enter_context(pa.OSFile(str(path), "wb")), batch.schema)
                )
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def encoded(chunks, args, given, stack):
    """Yield the record batches of chunks of records, in their order; not more than a few chunks are in memory at a time."""
    if args.preprocessing_num_workers == 1:
        for chunk in chunks:
            yield encode(chunk, *given)
        return
    workers, fork = args.preprocessing_num_workers, multiprocessing.get_context("fork")  # the tokenizer goes along unpickled
    pool = stack.enter_context(ProcessPoolExecutor(workers, fork, initializer=give, initargs=given))
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_given, chunk))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


GIVEN = []  # to a worker: the further arguments of encode


def give(*values):
    GIVEN[:] = values


def encode_given(chunk):
    return encode(chunk, *GIVEN)


def records_of(path, hub_split, scratch):
    """Return an iterator of (line, record, error); tables (Parquet, hub) count rows in place of lines."""
    if path is not None and kind_of(path) != ".parquet":
        return read_rows(str(path))
    try:
        table = hub_split if path is None else datasets.Dataset.from_parquet(path, cache_dir=scratch)
    except Exception as error:  # the reader's own errors have no common base
        raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None
    return table_rows(table)


def table_rows(table):
    for number, record in enumerate(table, 1):
        record = json.loads(json.dumps(record, default=str))  # dates and the like become texts
        yield number, {name: without_nulls(value) for name, value in record.items()}, ""


def without_nulls(value):
    """Return a nested value without the empty entries that a table's rows get for all that any other row has."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def column(rows, name):
    """Return a column of a Dataset as pyarrow's, without making Python objects of it."""
    return rows.select_columns(name).with_format("arrow")[:][name]


def numbers(rows, name):
    """Return a column of whole numbers as an array."""
    return column(rows, name).to_numpy()


def bad_rows(rows, name, known_labels=None):
    """Return (problem of each bad row as 'file:line: what', the good rows' indices)."""
    errors, lines = column(rows, "error"), numbers(rows, "line")
    found = {int(index): errors[int(index)].as_py() for index in np.flatnonzero(pc.not_equal(errors, "").to_numpy())}
    if known_labels is not None:
        labels = column(rows, "label")
        unknown = pc.invert(pc.is_in(labels, value_set=pa.array(list(known_labels), pa.string()))).to_numpy()
        for index in np.flatnonzero(unknown):
            problem = f"label {labels[int(index)].as_py()!r} is outside the set {', '.join(known_labels)}"
            found.setdefault(int(index), problem)
    good = np.delete(np.arange(len(rows)), sorted(found))
    bad = [f"{name}:{lines[index]}: {found[index]}" for index in sorted(found) if found[index] != CUT_AWAY]
    return bad, good


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
        self.rows, self.lengths, self.digests, self.bad, self.cut_away, self.built = {}, {}, {}, {}, {}, {}
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
            found = {label for label in pc.unique(column(self.rows["train"], "label")).to_pylist() if label}
            self.labels = args.labels or (list(model_labels) if found <= set(model_labels) else sort_labels(found))
        problems = []
        for split, rows in list(self.rows.items()):
            bad, good = bad_rows(rows, names[split], self.labels)
            if split == "test" and not len(good) and args.test_file is None:
                del self.rows[split]
                continue
            self.bad[split] = len(bad)
            if bad and not args.skip_bad_rows:
                more = f" (the first ten of {len(bad)})" if len(bad) > 10 else ""
                problems += [f"{len(bad)} bad rows in {names[split]}{more}; mend them or pass --skip_bad_rows", *bad[:10]]
            elif len(good) < len(rows):
                self.rows[split] = rows.select(good)
            self.cut_away[split] = len(rows) - len(good) - len(bad)
            limit = args.max_train_rows if split == "train" else args.max_eval_rows
            if limit is not None and limit < len(good):
                self.rows[split] = rows.select(good[:limit])
            if not len(good):
                problems.append(f"{names[split]}: no good row is left")
            self.lengths[split] = numbers(self.rows[split], "length")
            problems += self.limits(split, names[split], args, max_positions, vocab_size)
        if problems:
            raise UserError(*problems)

    def limits(self, split, name, args, max_positions, vocab_size):
        """Return problems with rows that do not fit the model: too long, generation too long, token ids without an embedding."""
        rows, problems = self.rows[split], []
        virtual = args.num_virtual_tokens if args.peft in ("prefix", "prompt") else 0  # they come first and take positions
        if max_positions is not None:
            longest = numbers(rows, "longest_side").max(initial=0)
            room = numbers(rows, "prompt_length").max(initial=0) + (args.generation_max_length or args.max_target_length)
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
        largest = numbers(rows, "largest_id").max(initial=0)
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
                cut = numbers(rows, f"{part}_cut")
                facts[f"truncated_{part}s"] = {
                    "rows": int((cut > 0).sum()),
                    "tokens": int(cut.sum()),
                    "longest_cut": int(cut.max()),
                }
            facts["rows_without_targets_after_the_cut"] = self.cut_away[split]
            if self.labels is not None:
                counts = pc.value_counts(column(rows, "label")).to_pylist()
                facts["labels"] = {count["values"]: count["counts"] for count in counts}
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
    if gone := facts["rows_without_targets_after_the_cut"]:
        text += f"; {gone:,} rows left out, of whose targets the cut left nothing"
    return text


def marked(row, tokenizer, limit=1000):
    """Return a causal row as text, what is learned of it between marks, and no more than about `limit` characters of each part."""
    learned = [False, *(label != IGNORE for label in row["labels"][:-1])]
    parts, count, done = [], 0, ""
    for learns, tokens in itertools.groupby(learned):
        count += len(list(tokens))
        text = tokenizer.decode(row["input_ids"][:count])  # of all so far: by itself a part loses the spaces at its ends
        part, done = text[len(done) :], text
        part = part if len(part) <= limit else f"{part[: limit // 2]} ... {part[-limit // 2 :]}"
        parts.append(f"⟦{part}⟧" if learns else part)
    return "".join(parts)
