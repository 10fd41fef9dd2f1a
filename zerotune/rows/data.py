"""The splits of a run: rows that are checked, tokenised and good, of one file or of several sources, with what is known of them."""

import hashlib
import itertools
import json
import mmap
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zerotune.errors import UserError
from zerotune.rows import IGNORE
from zerotune.rows.batches import Stream
from zerotune.rows.cache import load_file, load_hub, tokenizer_identity
from zerotune.rows.encoding import CUT_AWAY
from zerotune.rows.sources import Source, sources_of

SPLITS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


def column(rows, name):
    """Return a column of a Dataset as a pyarrow.ChunkedArray, without making Python objects of it.

    Of chosen rows `datasets` would gather one at a time, of all columns: seconds for a hundred thousand.
    """
    values, chosen = rows.data.column(name), rows._indices
    return values if chosen is None else values.take(chosen.column(0))


def numbers(rows, name):
    """Return a column of whole numbers as an array."""
    return column(rows, name).to_numpy()


def row_lengths(rows, task):
    """Return (tokens of each source, of each target) of tokenised rows; the targets of decoders alone, else zeros."""
    lengths, targets = numbers(rows, "length"), numbers(rows, "num_targets")
    targets = targets if task == "seq2seq" else np.zeros_like(lengths)
    return lengths - targets, targets


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


@dataclass
class Part:
    """The rows of one file, or of a hub's split (path None), on their way into a split."""

    source: Source
    path: str | None
    name: str  # in messages
    rows: datasets.Dataset
    mapped: mmap.mmap  # the file of all its rows
    digest: str
    built: bool
    bad: int = 0
    cut_away: int = 0


class Data:
    """The splits of a run: rows[split] is a Dataset of good rows, lengths[split] their tokens, costs[split] those of both sides.

    sources[split] are the Sources that its rows are of, source_starts[split] the first row of each.
    """

    def __init__(self, args, tokenizer, model_labels=(), max_positions=None, vocab_size=None):
        """Load every split that is there. Raises UserError listing bad rows (all counted, the first ten of a file shown).

        model_labels: class names that the model already knows. max_positions: the longest input that it can take, in tokens.
        vocab_size: its number of embeddings. A hub's test split without a single good row (labels withheld) is left out.
        """
        self.rows, self.lengths, self.costs, self.parts, self.sources, self.source_starts = {}, {}, {}, {}, {}, {}
        self.part_ends, self.task = {}, args.task
        identity, hub = tokenizer_identity(tokenizer), load_hub(args)
        for split, flag in SPLITS.items():
            sources = [(source, path) for source in sources_of(getattr(args, flag), flag) for path in source.files]
            sources = sources or [(Source(split, ()), None)] * (split in hub)
            loaded = [
                Part(source, path, path or f"{args.dataset_name}[{split}]", *load_file(split, path, args, tokenizer, identity, hub))
                for source, path in sources
            ]
            if loaded:
                self.parts[split] = loaded
        if "train" not in self.parts:
            raise UserError(f"{args.dataset_name}: no train split")
        self.labels = None
        if args.task == "classification":
            columns = [column(part.rows, "label") for part in self.parts["train"]]
            found = {label for labels in columns for label in pc.unique(labels).to_pylist() if label}
            self.labels = args.labels or (list(model_labels) if found <= set(model_labels) else sort_labels(found))
        problems = []
        for split, parts in list(self.parts.items()):
            for part in parts:
                problems += self.check(part, split, args, max_positions, vocab_size)
            if split == "test" and parts[0].path is None and not len(parts[0].rows):
                del self.parts[split]
        if problems:
            raise UserError(*problems)
        for split, parts in self.parts.items():
            self.put_together(split, parts)
        self.release()

    def check(self, part, split, args, max_positions, vocab_size):
        """Leave a part's good rows in it, and return what is wrong with it."""
        bad, good = bad_rows(part.rows, part.name, self.labels)
        part.bad, part.cut_away = len(bad), len(part.rows) - len(good) - len(bad)
        if split == "test" and not len(good) and part.path is None:
            part.rows = part.rows.select([])
            return []
        if bad and not args.skip_bad_rows:
            more = f" (the first ten of {len(bad)})" if len(bad) > 10 else ""
            return [f"{len(bad)} bad rows in {part.name}{more}; mend them or pass --skip_bad_rows", *bad[:10]]
        if not len(good):
            return [f"{part.name}: no good row is left"]
        limit = args.max_train_rows if split == "train" else args.max_eval_rows
        if len(good[:limit]) < len(part.rows):
            part.rows = part.rows.select(good[:limit])
        return self.limits(split, part.rows, part.name, args, max_positions, vocab_size)

    def put_together(self, split, parts):
        """Make one Dataset of a split's parts."""
        sources = list(dict.fromkeys(part.source for part in parts))
        self.rows[split] = parts[0].rows if len(parts) == 1 else datasets.concatenate_datasets([part.rows for part in parts])
        self.costs[split] = np.stack(row_lengths(self.rows[split], self.task), axis=1, dtype=np.int32, casting="same_kind")
        self.lengths[split] = self.costs[split].sum(axis=1, dtype=np.int32)
        self.part_ends[split] = np.cumsum([len(part.rows) for part in parts])
        sizes = [sum(len(part.rows) for part in parts if part.source == source) for source in sources]
        self.sources[split], self.source_starts[split] = sources, np.concatenate([[0], np.cumsum(sizes)])

    def digest(self, split):
        """Return a text that differs when a split's rows do, or their weights."""
        (first, *others) = self.parts[split]
        if not others:
            return first.digest
        numbers = {source: number for number, source in enumerate(self.sources[split])}  # files of one pattern are drawn as one
        parts = [(part.digest, len(part.rows)) for part in self.parts[split]]
        if first.source.weight is not None:
            parts = [(*facts, str(p.source.weight), numbers[p.source]) for facts, p in zip(parts, self.parts[split], strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def release(self):
        """Take the pages of rows that were read out of this process's memory; they stay in the system's, as long as it has room."""
        for part in (part for parts in self.parts.values() for part in parts):
            part.mapped.madvise(mmap.MADV_DONTNEED)

    def built(self):
        """Tell whether this process has tokenised any rows."""
        return any(part.built for parts in self.parts.values() for part in parts)

    def stream(self, seed):
        """Return the Stream of the training rows."""
        weights = [source.weight for source in self.sources["train"]]
        return Stream(seed, np.diff(self.source_starts["train"]).tolist(), weights if None not in weights else None)

    def source_of(self, split, rows):
        """Return the number of the source that each row is of, an int array."""
        return np.searchsorted(self.source_starts[split], rows, side="right") - 1

    def names(self, split):
        """Return the names of a split's sources, [] where there is one."""
        return [source.name for source in self.sources[split]] if len(self.sources[split]) > 1 else []

    def file_of(self, split, row):
        """Return the file that a row is of."""
        return self.parts[split][int(np.searchsorted(self.part_ends[split], row, side="right"))].name

    def lines(self, split, rows):
        """Return the line of each row in its file, as 'file:line' where a split has several."""
        lines = self.rows[split][rows]["line"]
        several = len(self.parts[split]) > 1
        return [f"{self.file_of(split, row)}:{line}" for row, line in zip(rows, lines, strict=True)] if several else lines

    def limits(self, split, rows, name, args, max_positions, vocab_size):
        """Return problems with rows that do not fit the model: too long, generation too long, token ids without an embedding."""
        problems = []
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
        if (most := args.max_tokens_per_micro_batch) and len(rows) and (lengths := numbers(rows, "length")).max() > most:
            longest = int(lengths.argmax())
            problems.append(
                f"{name}:{rows[longest]['line']}: {lengths[longest]} tokens are more than --max_tokens_per_micro_batch {most}; "
                "raise it, or lower --max_source_length or --max_target_length"
            )
        largest = numbers(rows, "largest_id").max(initial=0)
        if vocab_size is not None and largest >= vocab_size:
            problems.append(
                f"{name}: the tokenizer gives token {largest}, but the model has {vocab_size} embeddings; "
                "give the model's own --tokenizer_name"
            )
        return problems

    def source_facts(self, split):
        """Return {name of a source: its files, rows and, where draws are shared out, its weight and share of them}."""
        sources, counts = self.sources[split], np.diff(self.source_starts[split]).tolist()
        total, facts = sum(source.weight or 0 for source in sources), {}
        for source, count in zip(sources, counts, strict=True):
            facts[source.name] = {"files": list(source.files), "rows": count}
            if source.weight is not None:
                facts[source.name] |= {"weight": float(source.weight), "share_of_draws": round(float(source.weight / total), 6)}
        return facts

    def report(self):
        """Return {split: counts, length percentiles in tokens, truncations} for the log and run.json."""
        report = {}
        for split, rows in self.rows.items():
            lengths = self.lengths[split]
            bad, cut_away = (sum(getattr(part, name) for part in self.parts[split]) for name in ("bad", "cut_away"))
            facts = {"rows": len(rows), "bad_rows": bad, "sha256": self.digest(split)}
            facts["length_tokens"] = {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)}
            for part in ("source", "target"):
                cut = numbers(rows, f"{part}_cut")
                facts[f"truncated_{part}s"] = {
                    "rows": int((cut > 0).sum()),
                    "tokens": int(cut.sum()),
                    "longest_cut": int(cut.max()),
                }
            facts["rows_without_targets_after_the_cut"] = cut_away
            if self.names(split):
                facts["sources"] = self.source_facts(split)
            if self.labels is not None:
                counts = pc.value_counts(column(rows, "label")).to_pylist()
                facts["labels"] = {count["values"]: count["counts"] for count in counts}
            report[split] = facts
        self.release()
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
    for name, source in facts.get("sources", {}).items():
        share = f", {source['share_of_draws']:.2%} of the draws" if "weight" in source else ""
        text += f"; {name}: {source['rows']:,} rows{share}"
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
