"""Reading, checking, tokenising and cutting rows: each format gives the same rows, each bad row is named by its line."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from zerotune.errors import UserError
from zerotune.rows.batches import Stream, deal, evaluation_batches, rows_of_step
from zerotune.rows.collation import Collator, TrainingSteps, count_tokens
from zerotune.rows.data import Data
from zerotune.rows.files import read_rows
from zerotune.run.arguments import Arguments

ROWS = [
    {"source": "w1 w2 w3", "target": "w4", "label": "yes"},
    {"source": 'w5, "w6"', "target": "w7 w8", "label": "no"},
    {"source": "None", "target": "1", "label": "yes"},
]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny("t5"))


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def load(path, tokenizer, **flags):
    return Data(Arguments(train_file=[str(path)], **flags), tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_formats_give_the_same_rows(tmp_path, tokenizer, suffix):
    rows = load(write(tmp_path / f"rows{suffix}"), tokenizer, source_prefix="w9 ").rows["train"]
    assert rows["references"][:] == [[row["target"]] for row in ROWS]
    assert rows["input_ids"][:] == [tokenizer("w9 " + row["source"])["input_ids"] for row in ROWS]
    assert rows["labels"][:] == [tokenizer(row["target"])["input_ids"] for row in ROWS]


def test_text_file_is_one_row_a_line(tmp_path, tokenizer):
    path = tmp_path / "rows.txt"
    path.write_text("w1 w2\n\nw3\u2028w4\n")
    rows = load(path, tokenizer, task="causal", text_column="text").rows["train"]
    assert rows["line"][:] == [1, 3]
    eos = tokenizer.eos_token_id
    first = tokenizer("w1 w2", add_special_tokens=False)["input_ids"]
    assert rows["input_ids"][0] == [*first, eos] and rows["labels"][0] == [first[1], eos, -100]


def test_causal_pairs_learn_the_target_alone(tmp_path, tokenizer):
    rows = load(write(tmp_path / "a.jsonl"), tokenizer, task="causal", source_suffix="").rows["train"]
    prompt, target = tokenizer("w1 w2 w3")["input_ids"], tokenizer("w4")["input_ids"]
    assert rows["input_ids"][0] == prompt + target and rows["prompt_length"][0] == len(prompt)
    assert rows["labels"][0] == [-100] * (len(prompt) - 1) + target + [-100]


def test_truncation_is_counted_and_keeps_the_end_token(tmp_path, tokenizer):
    data = load(write(tmp_path / "a.jsonl"), tokenizer, max_source_length=3, max_target_length=2)
    assert data.rows["train"]["input_ids"][0] == tokenizer("w1 w2")["input_ids"]
    report = data.report()["train"]
    assert report["truncated_sources"] == {"rows": 1, "tokens": 1, "longest_cut": 1}
    assert report["truncated_targets"] == {"rows": 1, "tokens": 1, "longest_cut": 1}


BAD = [
    ('{"source": "w1", "target": "w2"', "broken JSON"),
    ('{"source": "w1", "target": ""}', "column 'target' is empty"),
    ('{"source": 5, "target": "w2"}', "column 'source' is int, not text"),
    (
        '{"sorce": "w1", "target": "w2"}',
        r"no column 'source' \(did you mean sorce\?\); columns: sorce, target; see --source_column",
    ),
    ('["w1"]', "a JSON list, not an object"),
    ('{"source": "w1 \\ud83d", "target": "w2"}', "column 'source' holds half a character .a lone surrogate. at 3"),
]


def test_bad_rows_are_named_counted_and_can_be_skipped(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text("".join(f"{good}\n{bad}\n" for bad, _ in BAD * 3))
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    problems = caught.value.problems
    count = 3 * len(BAD)
    assert problems[0].startswith(f"{count} bad rows in {path} (the first ten of {count})") and "--skip_bad_rows" in problems[0]
    assert len(problems) == 11
    for index, (_, message) in enumerate(BAD):
        assert problems[index + 1].startswith(f"{path}:{2 * index + 2}: ")
        assert re.search(message, problems[index + 1]), problems[index + 1]
    data = load(path, tokenizer, skip_bad_rows=True)
    assert len(data.rows["train"]) == count and data.report()["train"]["bad_rows"] == count


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "source,target\nw1,w2\nw1,w2,w3\n", r"a.csv:3: 3 fields, but the header has 2"),
        ("b.csv", 'source,target\nw1,"w2\nw3', "b.csv:2: the rest of the file cannot be read"),
        ("c.json", '[{"source": "w1", "target": "w2"},\n{"source": }]', "c.json:2: broken JSON"),
        ("latin.csv", b"source,target\n\xe9,b\n", "latin.csv:1: the rest of the file cannot be read: 'utf-8' codec"),
        ("d.jsonl", b'{"source": "\xff"}\n', "d.jsonl:1: not UTF-8"),
        ("e.jsonl", "\n", "has no rows"),
        ("f.parquet", "no parquet", "f.parquet: not a Parquet file"),
    ],
)
def test_unreadable_files(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load(tmp_path / name, tokenizer)


def test_labels_come_from_the_training_rows(tmp_path, tokenizer):
    train = write(tmp_path / "train.jsonl", [{"text": "w1", "label": label} for label in (10, 2, 2)])
    flags = {"task": "classification", "validation_file": [str(write(tmp_path / "v.jsonl", [{"text": "w1", "label": 3}] * 2))]}
    with pytest.raises(UserError, match="(?s)2 bad rows in .*v.jsonl.*v.jsonl:1: label '3' is outside the set 2, 10"):
        load(train, tokenizer, **flags)
    assert load(train, tokenizer, labels=["3", "10", "2"], **flags).labels == ["3", "10", "2"]
    data = load(train, tokenizer, task="classification")
    batch = Collator("classification", 0, data.labels)(data.rows["train"][:])
    assert batch["labels"].tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="train.jsonl:1: column 'lable' is missing or empty"):
        load(train, tokenizer, task="classification", label_column="lable")


def test_rows_are_read_once_and_again_when_anything_changes(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    first, again = load(path, tokenizer), load(path, tokenizer)
    assert (first.built(), again.built()) == (True, False) and first.digest("train") == again.digest("train")
    assert load(path, tokenizer, max_source_length=4).built()
    write(path, ROWS[:2])
    changed = load(path, tokenizer)
    assert changed.built() and len(changed.rows["train"]) == 2


def test_processes_that_tokenise_do_not_change_a_byte(tmp_path, tokenizer, monkeypatch):
    """More rows than fit into a chunk, by one process and by three, into two caches; the second start reads no row."""
    path, files = (
        write(tmp_path / "many.jsonl", [dict(row, target=f"w{n} {row['target']}") for n in range(900) for row in ROWS]),
        [],
    )
    for workers in (1, 3):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / f"cache{workers}"))
        assert load(path, tokenizer, preprocessing_num_workers=workers).built()
        files += (tmp_path / f"cache{workers}").rglob("*.arrow")
    assert len(files) == 2 and files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr("zerotune.rows.cache.read_rows", None)
    again = load(path, tokenizer)
    assert not again.built() and again.rows["train"]["references"][:3] == [[f"w0 {row['target']}"] for row in ROWS]


def test_every_example_once_an_epoch():
    num_rows, batch_size = 13, 4
    stream = np.concatenate([rows_of_step(step, Stream(7, [num_rows]), batch_size) for step in range(13)])
    for epoch in range(4):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert not np.array_equal(stream[:num_rows], stream[num_rows : 2 * num_rows])
    assert not np.array_equal(stream[:4], rows_of_step(0, Stream(8, [num_rows]), batch_size))
    assert np.array_equal(
        rows_of_step(0, Stream(0, [3]), 12)[:3], rows_of_step(0, Stream(0, [3]), 3)
    )  # a batch larger than the data


def test_dealing_keeps_the_rows_and_their_lengths_together():
    generator = np.random.default_rng(0)
    rows, lengths = np.arange(100, 124), generator.integers(1, 500, 24)
    dealt = deal(rows, lengths, num_micro_batches=3, num_processes=2)
    assert [[len(rank) for rank in micro] for micro in dealt] == [[4, 4]] * 3
    assert sorted(np.concatenate([rank for micro in dealt for rank in micro])) == list(rows)
    spans = [(min(lengths[np.concatenate(micro) - 100]), max(lengths[np.concatenate(micro) - 100])) for micro in dealt]
    assert all(before[0] >= after[1] for before, after in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("num_rows", [1, 7, 8, 17])
def test_evaluation_counts_each_row_once_in_equally_many_batches(num_rows):
    lengths = np.arange(num_rows) % 5
    ranks = [evaluation_batches(np.stack([lengths, lengths], axis=1), 3, rank, batch_size=2) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for rows, real in batches for row in rows[real]) == list(range(num_rows))


def test_collator_pads_and_counts(tmp_path, tokenizer):
    data = load(write(tmp_path / "a.jsonl"), tokenizer)
    collator = Collator("seq2seq", 0, None, 8, decoder_inputs=lambda labels: labels)
    batch = collator(data.rows["train"][:])
    assert batch["input_ids"].shape == (3, 8) and batch["labels"].shape == (3, 8)
    sources = [len(tokenizer(row["source"])["input_ids"]) for row in ROWS]
    targets = [len(tokenizer(row["target"])["input_ids"]) for row in ROWS]
    assert batch["attention_mask"].sum(1).tolist() == sources
    assert (batch["labels"] != -100).sum(1).tolist() == targets
    assert count_tokens(batch) == (sum(sources) + sum(targets), 48)


@pytest.mark.parametrize("grouped", [True, False])
def test_ranks_and_micro_batches_of_a_step_are_its_rows(tmp_path, tokenizer, grouped):
    data = load(write(tmp_path / "a.jsonl", ROWS * 8), tokenizer)
    args = SimpleNamespace(
        seed=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        group_by_length=grouped,
        length_window=1,
        max_tokens_per_micro_batch=None,
        cache_frozen=None,
    )
    collator = Collator("seq2seq", 0)
    ranks = [TrainingSteps(data, collator, args, num_processes=2, rank=rank)[0] for rank in range(2)]
    assert all(len(batches) == 2 and all(batch["input_ids"].shape[0] == 3 for batch in batches) for batches in ranks)
    # micro-batch by micro-batch over the ranks
    batches = [batches[index] for index in range(2) for batches in ranks]
    seen = [tuple(t for t in row.tolist() if t) for batch in batches for row in batch["input_ids"]]
    rows = rows_of_step(0, Stream(3, [24]), 12)
    if not grouped:  # dealt to the ranks like cards
        rows = np.concatenate([half[rank::2] for half in np.split(rows, 2) for rank in range(2)])
    expected = [tuple(data.rows["train"][int(row)]["input_ids"]) for row in rows]
    assert sorted(seen) == sorted(expected)
    if grouped:
        lengths = [(batch["attention_mask"].sum(1) + (batch["labels"] >= 0).sum(1)).tolist() for batch in batches]
        assert min(lengths[0] + lengths[1]) >= max(lengths[2] + lengths[3]) and max(lengths[0]) > min(lengths[2])
    else:
        assert seen == expected


def test_read_rows_gives_line_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"x\ny"\n2,z\n')
    assert [(line, record) for line, record, _ in read_rows(path)] == [
        (2, {"a": "1", "b": "x\ny"}),
        (4, {"a": "2", "b": "z"}),
    ]


def test_data_set_by_name_and_several_workers(tmp_path, tokenizer):
    """A folder is what `datasets` takes in place of a hub name; two processes tokenise to the same rows as one."""
    folder = tmp_path / "named"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS * 20)
    write(folder / "test.jsonl")
    data = Data(Arguments(dataset_name=str(folder), preprocessing_num_workers=2), tokenizer)
    assert set(data.rows) == {"train", "test"} and all(part.built for parts in data.parts.values() for part in parts)
    assert (
        data.rows["train"]["input_ids"][:] == load(write(tmp_path / "a.jsonl", ROWS * 20), tokenizer).rows["train"]["input_ids"][:]
    )
    write(folder / "test.jsonl", [{"source": "w1", "target": ""}])  # as hubs publish test splits: without the answers
    assert set(Data(Arguments(dataset_name=str(folder)), tokenizer).rows) == {"train"}
    write(folder / "validation.jsonl", [{"source": "w1", "target": ""}])
    with pytest.raises(UserError, match=r"named\[validation\]:1: column 'target' is empty"):
        Data(Arguments(dataset_name=str(folder)), tokenizer)
    with pytest.raises(UserError, match="--dataset_name ./no/such: "):
        Data(Arguments(dataset_name="./no/such"), tokenizer)


def test_rows_longer_than_the_model_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="longest row has 4 tokens, but the model has 3 positions; lower --max_source_length"):
        Data(Arguments(train_file=[str(path)]), tokenizer, max_positions=3)
    Data(Arguments(train_file=[str(path)]), tokenizer, max_positions=4)
    virtual = Arguments(train_file=[str(path)], peft="prompt", num_virtual_tokens=2)
    with pytest.raises(UserError, match="longest row has 4 tokens beside 2 virtual ones, but the model has 5 positions"):
        Data(virtual, tokenizer, max_positions=5)
    with pytest.raises(UserError, match="gives token 12, but the model has 12 embeddings"):
        Data(Arguments(train_file=[str(write(tmp_path / "b.jsonl", [{"source": "w8", "target": "w1"}]))]), tokenizer, vocab_size=12)
    flags = {"task": "causal", "train_file": [str(path)], "test_file": [str(path)], "max_target_length": 8}
    with pytest.raises(UserError, match="longest prompt and generation have 12 tokens, but the model has 11 positions"):
        Data(Arguments(**flags), tokenizer, max_positions=11)


def test_several_references(tmp_path, tokenizer):
    rows = [{"source": "w1", "target": ["w2 w3", "w4"]}, {"source": "w5", "target": "w6"}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = load(path, tokenizer, validation_file=[str(path)])
    assert data.rows["train"]["references"][:] == [["w2 w3", "w4"], ["w6"]] and len(data.rows["train"]) == 2
    data = load(path, tokenizer, validation_file=[str(path)], targets="all")
    assert data.rows["train"]["labels"][:] == [tokenizer(target)["input_ids"] for target in ("w2 w3", "w4", "w6")]
    assert len(data.rows["validation"]) == 2, "an evaluation counts each row once"
    with pytest.raises(UserError, match="column 'target' is int, not text"):
        load(write(tmp_path / "bad.jsonl", [{"source": "w1", "target": ["w2", 3]}]), tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_compressed_files_and_the_first_rows(tmp_path, tokenizer, suffix):
    """The same rows with the same lines; a file that is cut short is an error in one line."""
    path, flags = write(tmp_path / f"rows{suffix}"), {}
    if suffix == ".txt":
        path.write_text("w1\n\nw2 w3\nw4\n")
        flags = {"task": "causal", "text_column": "text"}
    plain = load(path, tokenizer, **flags).rows["train"]
    for ending, codec in ((".gz", "gzip"), (".zst", "zstd")):
        compressed = tmp_path / f"rows{suffix}{ending}"
        with pa.output_stream(str(compressed), compression=codec) as file:
            file.write(path.read_bytes())
        rows = load(compressed, tokenizer, **flags).rows["train"]
        assert rows[:] == plain[:]
        compressed.write_bytes(compressed.read_bytes()[:-9])
        with pytest.raises(UserError, match="cannot be read"):
            load(compressed, tokenizer, **flags)
    first = load(path, tokenizer, max_train_rows=2, validation_file=[str(path)], max_eval_rows=1, **flags)
    assert len(first.rows["train"]) == 2 == len(first.lengths["train"]) and len(first.rows["validation"]) == 1
    assert first.rows["train"][:] == plain[:2] and first.report()["train"]["rows"] == 2


def test_a_window_of_steps_shares_its_rows_out_by_length():
    """As many rows as without it in each window, every row once an epoch, less padding; a step needs no other to be known."""
    lengths, (num_rows, size, window) = np.random.default_rng(0).integers(1, 100, 40), (40, 4, 5)
    plain = [rows_of_step(step, Stream(7, [num_rows]), size) for step in range(20)]
    steps = [rows_of_step(step, Stream(7, [num_rows]), size, window=window, lengths=lengths) for step in range(20)]
    for begin in range(0, 20, window):
        assert sorted(np.concatenate(steps[begin : begin + window])) == sorted(np.concatenate(plain[begin : begin + window]))
    together = rows_of_step(3, Stream(7, [num_rows]), size, 9, window=window, lengths=lengths)
    assert np.array_equal(together, np.concatenate(steps[3:12]))
    padded = [sum(lengths[rows].max() * size for rows in order) for order in (plain, steps)]
    assert padded[1] < 0.75 * padded[0]
    firsts = [lengths[rows].mean() for rows in steps[::window]]
    assert len(set(firsts)) > 1 and firsts != sorted(firsts, reverse=True), "not the longest first in every window"
