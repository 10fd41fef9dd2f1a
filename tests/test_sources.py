"""Rows of several files: weights, patterns, counts and losses by file; and steps that are cut by tokens."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, WORDS
from transformers import AutoTokenizer

from zerotune.errors import UserError
from zerotune.rows import cache
from zerotune.rows.batches import Stream, deal_by_tokens, evaluation_batches, rows_of_step
from zerotune.rows.collation import Collator, TrainingSteps, rows_of_labels
from zerotune.rows.data import Data
from zerotune.rows.sources import sources_of
from zerotune.run.arguments import Arguments, check_arguments
from zerotune.run.best import known_metrics, metric_key, smaller_is_better


def write(path, count, longest=6, seed=0, chats=False):
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for _ in range(count):
            source, target = (" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(2))
            turns = [{"role": "user", "content": source}, {"role": "assistant", "content": target}]
            file.write(json.dumps({"messages": turns * (1 + seed % 2)} if chats else {"source": source, "target": target}) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "sizes, weights", [((7, 5, 3), "1 2 1/2"), ((40, 1), "0.999 0.001"), ((3, 3, 3, 3), "1 1 1 1"), ((9,), "3")]
)
def test_draws_have_their_shares_and_each_source_its_own_passes(sizes, weights):
    """Over random places: exact shares at the ends of blocks, every row of a source once a pass, and no history needed."""
    weights, total = [Fraction(weight) for weight in weights.split()], sum(map(Fraction, weights.split()))
    stream, starts = Stream(3, sizes, weights), np.cumsum([0, *sizes])
    number = 5 * stream.block
    rows = stream.rows(0, number)
    sources = np.searchsorted(starts, rows, side="right") - 1
    for end in range(stream.block, number + 1, stream.block):
        counts = np.bincount(sources[:end], minlength=len(sizes))
        assert all(abs(count - end * weight / total) < 1 for count, weight in zip(counts, weights, strict=True))
    for source, size in enumerate(sizes):
        mine = rows[sources == source] - starts[source]
        passes = [mine[begin : begin + size].tolist() for begin in range(0, len(mine) - size + 1, size)]
        assert all(sorted(once) == list(range(size)) for once in passes)
        assert size < 3 or len(passes) < 3 or passes[0] != passes[1], "another permutation"
    generator = np.random.default_rng(0)
    for begin in generator.integers(0, number - 50, 20).tolist():
        fresh = Stream(3, sizes, weights)
        assert np.array_equal(fresh.rows(begin, begin + 50), rows[begin : begin + 50]), "a function of (seed, item) alone"
        assert np.array_equal(fresh.drawn(begin), np.bincount(sources[:begin], minlength=len(sizes)))
    if len(sizes) > 1:
        assert not np.array_equal(Stream(4, sizes, weights).rows(0, 256), rows[:256])


def test_without_weights_files_are_one_after_the_other():
    stream, whole = Stream(3, [7, 5]), Stream(3, [12])
    assert np.array_equal(stream.rows(0, 40), whole.rows(0, 40))
    sources = np.searchsorted([7], stream.rows(0, 40), side="right")
    for item in (0, 5, 12, 13, 30, 2, 40):  # in any order
        assert np.array_equal(stream.drawn(item), np.bincount(sources[:item], minlength=2))


def test_a_window_of_steps_keeps_a_mixture():
    """As many rows of each source in every window as without it, and a step needs no other to be known."""
    lengths = np.random.default_rng(0).integers(1, 100, 12)
    given = [7, 5], [Fraction(1), Fraction(3)]
    plain = [rows_of_step(step, Stream(3, *given), 6) for step in range(20)]
    steps = [rows_of_step(step, Stream(3, *given), 6, window=4, lengths=lengths) for step in range(20)]
    for begin in range(0, 20, 4):
        assert sorted(np.concatenate(steps[begin : begin + 4])) == sorted(np.concatenate(plain[begin : begin + 4]))
    assert any(sorted(mine) != sorted(other) for mine, other in zip(steps, plain, strict=True))


def test_numbers_of_one_of_several_files(tmp_path):
    """A file may be called as a metric begins, or as the records do: its own numbers are found, those of all rows first."""
    files = [write(tmp_path / f"{name}.jsonl", 1) for name in ("eval_web", "macro", "books")]
    args = Arguments(validation_file=files, task="classification")
    sources = ["eval_web", "macro", "books"]
    known = known_metrics(args)
    for name, key, smaller in (
        ("loss", "eval_loss", True), ("eval_loss", "eval_loss", True), ("macro_f1", "macro_f1", False),
        ("books_loss", "eval_books_loss", True), ("eval_books_loss", "eval_books_loss", True),
        ("eval_web_loss", "eval_eval_web_loss", True), ("macro_macro_f1", "eval_macro_macro_f1", False),
        ("macro_loss", "eval_macro_loss", True), ("books_accuracy", "eval_books_accuracy", False),
    ):  # fmt: skip
        assert metric_key(name, sources) == key and key in known and smaller_is_better(key) == smaller
    assert metric_key("hamming_loss", sources) == "hamming_loss" and not smaller_is_better("hamming_loss")


def test_words_of_the_flag(tmp_path):
    a, b, c = write(tmp_path / "a" / "rows.jsonl", 2), write(tmp_path / "b" / "rows.jsonl", 2), write(tmp_path / "c.v1.jsonl", 2)
    odd = write(tmp_path / "odd:2.jsonl", 1)
    found = sources_of([a, f"{b}:2", f"{c}:0.1"], "train_file")
    assert [(source.name, source.files, source.weight) for source in found] == [
        ("a/rows", (a,), 1), ("b/rows", (b,), 2), ("c.v1", (c,), Fraction(1, 10)),
    ]  # fmt: skip
    (pattern,) = sources_of([f"{tmp_path}/*/rows.jsonl"], "train_file")
    assert pattern.files == (a, b) and pattern.weight is None
    assert [source.name for source in sources_of([f"{tmp_path}/a/*.jsonl", odd], "train_file")] == ["a", "odd:2"]
    assert sources_of([], "test_file") == []
    for words, flag, line in (
        ([f"{a}:0"], "train_file", f"--train_file {a}:0: the weight 0 must be greater than 0; leave out a file"),
        ([f"{a}:x"], "train_file", f"--train_file {a}:x: the weight x is no number"),
        ([f"{tmp_path}/*.jsonl:", b], "train_file", "the weight  is no number"),
        (["none.jsonl:2"], "train_file", "--train_file none.jsonl:2: no such file"),
        ([f"{a}:-1"], "train_file", "the weight -1 must be greater than 0"),
        ([f"{a}:1e-9", b], "train_file", "is less than one draw in a million"),
        ([f"{a}:2"], "validation_file", "an evaluation counts each row once; leave out the weight (2)"),
        ([a, a], "train_file", f"--train_file {a}: is given twice; give it once, with a weight"),
        ([a, f"{tmp_path}/a/*"], "train_file", "is given twice"),
        ([f"{tmp_path}/*.csv"], "train_file", f"--train_file {tmp_path}/*.csv: matches no file"),
        (["none.jsonl"], "test_file", "--test_file none.jsonl: no such file"),
        ([f"{tmp_path}/c*", "README.md"], "train_file", "--train_file README.md: the ending must be one of .json .jsonl"),
    ):
        with pytest.raises(UserError) as error:
            sources_of(words, flag)
        assert any(line in problem for problem in error.value.problems) and len(error.value.problems) == 1
    given = {"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out")}
    problems = check_arguments(Arguments(**given, train_file=[f"{a}:0", "none.txt"]))
    assert len(problems) == 2
    best = {"metric_for_best_model": "b/rows_loss", "eval_steps": 1, "train_file": [a], "validation_file": [a, b]}
    assert not check_arguments(Arguments(**given | best))
    (problem,) = check_arguments(Arguments(**given | best | {"metric_for_best_model": "c_loss"}))
    assert "eval_b/rows_loss" in problem


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("t5"))


def test_rows_know_their_files(tmp_path, tokenizer):
    files = [write(tmp_path / f"{name}.jsonl", count, seed=count) for name, count in (("a", 3), ("b", 4), ("c", 5))]
    with open(files[1], "a") as file:
        file.write("{}\n")
    longest = write(tmp_path / "longest.jsonl", 9, 30, seed=9)
    lines = Path(longest).read_text().splitlines(keepends=True)
    Path(longest).write_text("".join([*lines[:4], "{}\n", *lines[4:]]))  # in the middle: others are cut off as a slice
    chosen = Data(Arguments(train_file=[longest], skip_bad_rows=True), tokenizer)
    assert chosen.lengths["train"].tolist() == [len(row["input_ids"]) + len(row["labels"]) for row in chosen.rows["train"]]
    with pytest.raises(UserError) as error:
        Data(Arguments(train_file=files), tokenizer)
    assert error.value.problems[0] == f"1 bad rows in {files[1]}; mend them or pass --skip_bad_rows"
    assert error.value.problems[1].startswith(f"{files[1]}:5: ") and len(error.value.problems) == 2
    words = [f"{tmp_path}/[ab].jsonl:2", files[2]]
    data = Data(Arguments(train_file=words, validation_file=files[1:], skip_bad_rows=True, max_eval_rows=2), tokenizer)
    assert data.names("train") == ["ab", "c"]
    assert data.stream(1).source_sizes == [7, 5] and data.stream(1).weights == [2, 1] and len(data.rows["validation"]) == 4
    assert data.lines("train", [0, 3, 7, 11]) == [f"{files[0]}:1", f"{files[1]}:1", f"{files[2]}:1", f"{files[2]}:5"]
    assert data.source_of("train", np.arange(12)).tolist() == [0] * 7 + [1] * 5
    sides = [data.rows["train"][side][:] for side in ("input_ids", "labels")]
    assert data.costs["train"].tolist() == [[len(source), len(target)] for source, target in zip(*sides, strict=True)]
    facts = data.report()["train"]
    assert facts["rows"] == 12 and facts["bad_rows"] == 1
    assert facts["sources"]["c"] == {"files": [files[2]], "rows": 5, "weight": 1.0, "share_of_draws": 0.333333}
    alone = [Data(Arguments(train_file=[file], skip_bad_rows=True), tokenizer) for file in files]
    assert data.rows["train"]["input_ids"][:] == [ids for one in alone for ids in one.rows["train"]["input_ids"][:]]
    assert not any(one.built() for one in alone), "each file's rows are cached by themselves"
    digests = {Data(Arguments(train_file=w, skip_bad_rows=True), tokenizer).digest("train") for w in (words, files, files[::-1])}
    assert len(digests) == 3

    def drawn(*words):
        found = Data(Arguments(train_file=list(words), skip_bad_rows=True), tokenizer)
        return found.digest("train"), found.stream(1).rows(0, 40).tolist()

    together, apart = drawn(f"{tmp_path}/[ab].jsonl", f"{files[2]}:1"), drawn(*files[:2], f"{files[2]}:1")
    assert together[0] != apart[0] and together[1] != apart[1], "files of one pattern are drawn as one"
    assert drawn(f"{files[0]}:3") == drawn(files[0]), "all draws are a single source's, whatever it weighs"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl: the train split has no rows"):
        Data(Arguments(train_file=[files[0], str(tmp_path / "empty.jsonl")]), tokenizer)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as error:
        Data(Arguments(train_file=[files[0], str(tmp_path / "bad.jsonl")], skip_bad_rows=True), tokenizer)
    assert error.value.problems == [f"{tmp_path}/bad.jsonl: no good row is left"]


def resident_kib():
    """Return the KiB of this process's memory that are pages of mapped files of rows."""
    maps = re.findall(r"rows\.arrow\n(?:\w+: .*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, maps))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no Linux")
def test_rows_stay_on_disk(tmp_path, tokenizer):
    """After a start, a step and a report no page of the rows' files is in this process's memory, and reading one brings it back."""
    words = [write(tmp_path / f"{name}.jsonl", 2000, 40, seed=number) for number, name in enumerate("ab")]
    args = Arguments(train_file=words, seed=5)
    data = Data(args, tokenizer)
    collator = Collator("seq2seq", 0, None, 1, lambda labels: labels)
    before = resident_kib()
    steps = TrainingSteps(data, collator, args, 1, 0)
    first = steps[0]
    data.report()
    assert resident_kib() == before
    assert data.rows["train"][[0, 3999]]["input_ids"] and resident_kib() > before
    data.release()
    assert resident_kib() == before and all(
        (mine["labels"] == other["labels"]).all() for mine, other in zip(first, steps[0], strict=True)
    )


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    import os

    path = tmp_path / "rows.txt"
    path.write_text("w1\n")
    monkeypatch.setattr(cache, "LARGE_FILE", 1)
    young = cache.file_sha256(path)
    monkeypatch.setattr(cache.time, "time_ns", lambda: os.stat(path).st_ctime_ns + 3_000_000_000)
    hashed, digest = [], cache.hashlib.file_digest
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *given: hashed.append(1) or digest(*given))
    assert cache.file_sha256(path) == young and len(hashed) == 1, "not kept while a change could leave its times as they are"
    assert cache.file_sha256(path) == young and len(hashed) == 1
    before = os.stat(path)
    path.write_text("w2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp --preserve` would leave it
    assert cache.file_sha256(path) != young and len(hashed) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("processes, multiple", [(1, 1), (2, 8), (3, 1)])
def test_micro_batches_by_tokens(packed, processes, multiple):
    """Over random rows: each row once, none above the limit, as many micro-batches and rows on all ranks, longest first."""
    generator = np.random.default_rng(processes)
    for _ in range(50):
        number = processes * int(generator.integers(1, 40))
        costs = -(-generator.integers(1, 60, (number, 2)) // multiple) * multiple
        costs = costs[np.argsort(-costs.sum(axis=1), kind="stable")]
        limit = int(costs.sum(axis=1).max() + generator.integers(0, 200))
        dealt = deal_by_tokens(np.arange(number), costs, limit, processes, packed)
        assert sorted(np.concatenate([rows for ranks in dealt for rows in ranks])) == list(range(number))
        for ranks, following in zip(dealt, [*dealt[1:], None], strict=True):
            assert len({len(rows) for rows in ranks}) == 1 and len(ranks) == processes

            def tokens(rows, costs=costs):
                return costs[rows].sum() if packed else len(rows) * costs[rows].max(axis=0).sum()

            assert all(tokens(rows) <= limit for rows in ranks)
            if following:  # no room is left for the next row of every rank
                more = [np.append(rows, after[0]) for rows, after in zip(ranks, following, strict=True)]
                assert any(tokens(rows) > limit for rows in more)
                assert min(costs[rows].sum(axis=1).min() for rows in ranks) >= costs[following[0]].sum(axis=1).max()
        batches = [evaluation_batches(costs, processes, rank, 4, limit, packed) for rank in range(processes)]
        assert len({len(mine) for mine in batches}) == 1
        assert sorted(row for mine in batches for rows, real in mine for row in rows[real]) == list(range(number))


@pytest.mark.parametrize("packed", [False, True])
def test_every_token_once_with_its_source(tmp_path, tokenizer, packed):
    """The batches of a step's ranks hold each row's tokens once, its labels with the row's own source, however they are cut."""
    words = [write(tmp_path / "a.jsonl", 30, 40, seed=1), write(tmp_path / "b.jsonl", 20, 9, seed=2) + ":2"]
    args = Arguments(train_file=words, per_device_train_batch_size=12, max_tokens_per_micro_batch=100, seed=5)
    data = Data(args, tokenizer)
    collator = Collator("seq2seq", 0, None, 1, lambda labels: labels, 16 if packed else None)
    ranks = [TrainingSteps(data, collator, args, 2, rank) for rank in range(2)]
    for step in range(6):
        rows = rows_of_step(step, data.stream(5), 24)
        batches = [batch for rank in ranks for batch in rank[step]]
        assert len({len(rank[step]) for rank in ranks}) == 1 and len(ranks[0][step]) > 2
        for side in ("input_ids", "labels"):
            tokens = np.concatenate([batch[side][batch[side] > 0].numpy() for batch in batches])
            expected = [token for row in rows for token in data.rows["train"][int(row)][side]]
            assert sorted(tokens) == sorted(expected)
        by_source = np.zeros(2)
        for batch in batches:
            assert batch["sources"].shape == batch["labels"].shape == rows_of_labels(batch).shape
            by_source += np.bincount(batch["sources"][batch["labels"] != -100].numpy(), minlength=2)
        counts, sources = np.array(data.rows["train"][rows]["num_targets"]), data.source_of("train", rows)
        assert by_source.tolist() == [counts[sources == source].sum() for source in (0, 1)]
    with pytest.raises(UserError) as error:
        Data(Arguments(train_file=words, max_tokens_per_micro_batch=60), tokenizer)
    (problem,) = error.value.problems
    line = int(problem.split("a.jsonl:")[1].split(":")[0])
    lengths = data.lengths["train"]
    assert lengths[line - 1] == lengths.max() > 60 and f"{lengths.max()} tokens are more than" in problem


FLAGS = {"learning_rate": 1e-3, "logging_steps": 1, "predict_with_generate": "false", "max_steps": 6, "save_steps": 3}


@pytest.mark.launch
@pytest.mark.parametrize("strategy, packing", [("ddp", False), ("zero2", True), ("zero3", False)])
def test_cut_by_tokens_over_sources_the_losses_are_those_of_one_process(train, tiny, tmp_path, strategy, packing):
    """Two processes, cut by tokens, with and without packing, beside one process cut by rows: steps, sources and evaluations."""
    a, b = write(tmp_path / "a.jsonl", 21, 30, seed=1), write(tmp_path / "b.jsonl", 9, 9, seed=2)
    flags = FLAGS | {
        "model_name_or_path": tiny("t5"), "train_file": [f"{a}:3", f"{b}"], "validation_file": [a, b], "test_file": [b, a],
        "num_train_epochs": 9, "eval_steps": 6,
    }  # fmt: skip
    plain = train(None, name="plain", per_device_train_batch_size=12, **flags)
    cut = {"per_device_train_batch_size": 6, "max_tokens_per_micro_batch": 120, "packing": packing}
    done = train(strategy, 2, **flags | cut)
    losses = [run.records("loss") for run in (done, plain)]
    assert len(losses[0]) == 6
    for mine, other in zip(*losses, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5) and mine["target_tokens"] == other["target_tokens"]
        assert list(mine["sources"]) == ["a", "b"]
        for name, part in mine["sources"].items():
            same = other["sources"][name]
            assert (part["rows"], part["target_tokens"]) == (same["rows"], same["target_tokens"])
            assert part["loss"] == pytest.approx(same["loss"], rel=1e-5)
        parts = mine["sources"].values()
        assert sum(part["target_tokens"] for part in parts) == mine["target_tokens"]
        total = sum(part["loss"] * part["target_tokens"] for part in parts if part["target_tokens"])
        assert total / mine["target_tokens"] == pytest.approx(mine["loss"], rel=1e-6)
        assert sum(part["rows"] for part in parts) == 12 * mine["step"]
    evaluated = [run.records("eval_loss")[-1] for run in (done, plain)]
    for name in ("eval_loss", "eval_a_loss", "eval_b_loss", "eval_b_perplexity"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], rel=1e-5)
    first, second = (evaluated[0][f"eval_{name}_target_tokens"] for name in "ab")
    mean = (evaluated[0]["eval_a_loss"] * first + evaluated[0]["eval_b_loss"] * second) / (first + second)
    assert mean == pytest.approx(evaluated[0]["eval_loss"], rel=1e-6)
    tested = [run.records("test_loss")[-1] for run in (done, plain)]
    assert tested[0]["test_b_rougeL"] == pytest.approx(tested[1]["test_b_rougeL"]) and "test_a_sacrebleu" in tested[0]
    lines = [json.loads(line) for line in (done.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [b] * 9 + [a] * 21 and lines[9]["line"] == 1
    assert (done.folder / "predictions.jsonl").read_text() == (plain.folder / "predictions.jsonl").read_text()
    assert "cut into micro-batches of at most 120 tokens" in done.output


TOKENS = "max_tokens_per_micro_batch"
CHATS = {"task": "causal", "messages_column": "messages", "chat_template": ROOT / "tests/chat_templates/words.jinja"}


@pytest.mark.launch
@pytest.mark.parametrize("family, rows", [("t5", {}), ("llama", CHATS)])
def test_a_mixture_goes_on_in_the_same_bits(train, tiny, tmp_path, family, rows):
    """Stopped in the middle of a pass of each source, with packing, tokens and dropout; another weight is another training."""
    a = write(tmp_path / "a.jsonl", 21, 30, seed=1, chats=bool(rows))
    b = write(tmp_path / "b.jsonl", 9, 9, seed=2, chats=bool(rows))
    flags = FLAGS | rows | {
        "model_name_or_path": tiny(family, 0.1), "train_file": [f"{a}:3", f"{b}"], "per_device_train_batch_size": 8,
        "max_tokens_per_micro_batch": 150, "packing": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = train(None, name="whole", **flags)
    train(None, name="part", **flags | {"max_steps": 3})
    again = train(None, name="part", **flags)
    assert again.run["resumed_from"].endswith("checkpoint-3")
    ours, theirs = again.records("loss"), whole.records("loss")
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    assert [record["sources"] for record in ours] == [record["sources"] for record in theirs]
    weights = [(run.folder / "final" / "model.safetensors").read_bytes() for run in (again, whole)]
    assert weights[0] == weights[1]
    other = train(None, name="part", check=False, **flags | {"train_file": [f"{a}:2", b]})
    assert other.code == 2 and "training rows was" in other.output and "--accept_change train_file" in other.output


@pytest.mark.launch
def test_auto_batch_takes_the_limit_or_a_half_of_it(train, tiny, tmp_path):
    """The limit where all fits, its half after a trial that did not; the same losses, and a resumed run keeps what was chosen."""
    flags = FLAGS | {
        "model_name_or_path": tiny("t5"), "train_file": write(tmp_path / "a.jsonl", 24, 20, seed=1), "max_steps": 3,
        "per_device_train_batch_size": 12, "max_tokens_per_micro_batch": 240,
    }  # fmt: skip
    hand, auto = train("ddp", 2, name="hand", **flags), train("ddp", 2, name="auto", auto_batch="true", **flags)
    tried = {"ZEROTUNE_MICRO_BATCH_LIMIT": "240"}  # what a trial that did not fit leaves for the process after it
    half = train("ddp", 2, name="half", auto_batch="true", environment=tried, **flags)
    for run, tokens in ((auto, 240), (half, 120)):
        found = run.run["auto_batch"]
        assert (found["given"], found["chosen"]) == ({TOKENS: 240}, {TOKENS: tokens}) and run.run["arguments"][TOKENS] == tokens
        for mine, other in zip(run.records("loss"), hand.records("loss"), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert "of line " in run.output and f"auto_batch: {tokens} tokens a micro-batch in place of 240" in run.output
    again = train(
        "ddp", 2, name="half", auto_batch="true", **flags | {"max_steps": 4, "lr_scheduler_type": "constant"}, check=False
    )
    assert again.code == 2 and "lr_scheduler_type" in again.output
    again = train("ddp", 2, name="half", auto_batch="true", **flags)
    assert again.run["arguments"][TOKENS] == 120 and "as the run began" in again.output
