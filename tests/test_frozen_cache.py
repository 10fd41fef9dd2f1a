"""What is frozen runs once a row: its outputs kept on disk give the losses of a run without them, and are whole or absent."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags_of, text, tiny_config
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

from zerotune.errors import UserError
from zerotune.model.freezing import apply_rules
from zerotune.model.loading import stored_names
from zerotune.model.prefix import CachedPrefix, frozen_prefix, tokens_by_row, train_mode
from zerotune.model.unread import Unread
from zerotune.rows.batches import Stream, rows_of_step
from zerotune.rows.prefix_states import PrefixStates
from zerotune.run.arguments import Arguments, check_arguments
from zerotune.run.frozen_cache import Trial

EPOCHS = 3
CELLS = {  # name: (family, strategy, what is frozen, flags)
    "t5": ("t5", None, ["encoder"], {}),
    "t5-ddp": ("t5", "ddp", ["encoder"], {"packing": True, "gradient_checkpointing": True, "loss_chunks": 2}),
    "bart-zero2": ("bart", "zero2", ["encoder"], {"mixed_precision": "bf16"}),
    "t5-zero3": ("t5", "zero3", ["encoder"], {"max_tokens_per_micro_batch": 100}),
    "gpt2": ("gpt2", None, ["embeddings", "layers[:1]"], {"gradient_checkpointing": True}),
    "llama-zero3": ("llama", "zero3", ["embeddings", "layers[:2]"], {"packing": True}),
    "llama-lora-zero2": ("llama", "zero2", [], {"peft": "lora", "target_modules": ["layers.3.self_attn.q_proj"]}),
    "bert": ("bert", None, ["embeddings", "layers[:1]"], {"text_column": "source"}),
}
TASKS = {"t5": "seq2seq", "bart": "seq2seq", "gpt2": "causal", "llama": "causal", "bert": "classification"}


def options_of(cell, tiny, rows):
    family, _, freeze, more = CELLS[cell]
    return {
        "model_name_or_path": tiny(family, 0.1), "task": TASKS[family], "train_file": rows,
        "freeze": freeze or None, "frozen_eval": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": EPOCHS, "logging_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 0,
    } | more  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("cell", CELLS)
def test_losses_of_a_run_without_it(cell, train, tiny, rows16, tmp_path):
    """With dropout in what learns; the first epoch computes, the others read, and another run reads everything."""
    _, strategy, _, more = CELLS[cell]
    options = options_of(cell, tiny, rows16)
    plain = train(strategy, name="plain", **options)
    cached = train(strategy, name="cached", cache_frozen=tmp_path / "cache", **options)
    again = train(strategy, name="again", cache_frozen=tmp_path / "cache", **options)
    bound = 1e-5 if more.get("mixed_precision") != "bf16" else 2**-8
    for run in (cached, again):
        expected, found = ([record["loss"] for record in r.records("loss")] for r in (plain, run))
        assert len(found) >= 2 * EPOCHS and found == pytest.approx(expected, rel=bound)
    assert ["of frozen weights are not read" in run.output for run in (cached, again)] == [False, True]
    facts = [run.run["frozen_cache"] for run in (cached, again)]
    assert facts[0]["folder"] == facts[1]["folder"] and facts[0]["rows_there"] == facts[0]["rows"] == 16
    passes = [facts[number]["passes"] for number in (0, 1)]
    assert passes[1] == {"read": sum(passes[0].values()), "computed": 0} and passes[0]["read"] > passes[0]["computed"] > 0
    if "max_tokens_per_micro_batch" not in more:  # by which epochs are cut differently
        assert passes[0]["read"] == (EPOCHS - 1) * passes[0]["computed"]
    assert f"x {facts[0]['bytes_a_token']:,} bytes = " in cached.output


@pytest.mark.launch
@pytest.mark.parametrize("strategy", [None, "zero3"])
def test_killed_and_gone_on_with(strategy, train, tiny, rows16, tmp_path):
    """From the middle of the first epoch and of the second, with what the cache had been given by then: the same bits."""
    options = options_of("t5", tiny, rows16) | {"save_steps": 1, "save_total_limit": 20}
    straight = train(strategy, name="straight", cache_frozen=tmp_path / "cache", **options)
    last = straight.records("loss")[-1]["step"]
    (folder,) = (tmp_path / "cache").iterdir()
    for step, known in ((1, 1), (1, 2), (last // 2, last)):
        cut, half = tmp_path / f"cut{step}-{known}", tmp_path / f"cache{step}-{known}"
        shutil.copytree(straight.folder, cut)
        for later in range(step + 1, last + 1):
            shutil.rmtree(cut / f"checkpoint-{later}")
        shutil.rmtree(cut / "final")
        shutil.copytree(tmp_path / "cache", half)
        done = np.zeros(16, dtype=np.uint8)  # rows that are not marked are as good as not written
        done[rows_of_step(0, Stream(42, [16]), 4 * (1 if strategy is None else 2), known)] = 1
        (half / folder.name / "done.bin").write_bytes(done.tobytes())
        resumed = train(strategy, name=f"from{step}-{known}", **options | {"output_dir": cut, "cache_frozen": half})
        assert resumed.run["resumed_from"].endswith(f"checkpoint-{step}")
        assert all(torch.equal(weight, resumed.weights()[name]) for name, weight in straight.weights().items()), known


@pytest.mark.launch
def test_a_kill_leaves_whole_rows(train, tiny, tmp_path):
    """SIGKILL in the first epoch: what is marked in the cache are the states that the straight run has, and it is gone on with."""
    rows = [{"source": text(n, 1 + n % 40), "target": text(n + 3, 1 + n % 7)} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = options_of("t5", tiny, tmp_path / "rows.jsonl")
    options |= {"num_train_epochs": 2, "save_steps": 10, "logging_steps": 10, "end_report": "false"}
    folder = tmp_path / "run"
    flags = flags_of(options | {"output_dir": folder, "cache_frozen": tmp_path / "killed"})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    run = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, **quiet)
    try:
        while not (folder / "checkpoint-30").exists():
            assert run.poll() is None
            time.sleep(0.002)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    (killed,) = (tmp_path / "killed").iterdir()
    done = np.frombuffer((killed / "done.bin").read_bytes(), dtype=np.uint8)
    assert 30 * 4 <= done.sum() < 300

    straight = train(None, name="straight", cache_frozen=tmp_path / "cache", **options)
    (whole,) = (tmp_path / "cache").iterdir()
    contents = [np.frombuffer((path / "states.bin").read_bytes(), dtype=np.float32).reshape(-1, 32) for path in (killed, whole)]
    lengths = [1 + len(row["source"].split()) for row in rows]
    there = np.repeat(done == 1, lengths)
    assert np.array_equal(contents[0][there], contents[1][there]) and contents[0][there].any(axis=1).all()
    resumed = train(None, name="run", cache_frozen=tmp_path / "killed", **options)
    assert resumed.run["resumed_from"] and resumed.run["frozen_cache"]["rows_there"] == 300
    assert all(torch.equal(weight, resumed.weights()[name]) for name, weight in straight.weights().items())


def touched(file):
    """Return the most bytes of a file that any other process has mapped and touched, None if none has mapped it."""
    most = None
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.name != str(os.getpid()) and str(file) in (process / "maps").read_text():
                areas = (process / "smaps").read_text().split("\nVmFlags:")
                sizes = [re.search(r"\nRss: +(\d+) kB", area)[1] for area in areas if f" {file}\n" in area]
                most = max(most or 0, 1024 * sum(map(int, sizes)))
    return most


@contextlib.contextmanager
def watched(weights, folder):
    """Yield a list of what `touched` sees of the run in a folder, until it has taken four steps."""
    seen, ended = [], threading.Event()

    def watch():
        records = folder / "metrics.jsonl"
        while not ended.wait(0.005):
            now = touched(weights)
            if now and not (records.exists() and records.read_text().count('"loss":') >= 4):
                seen.append(now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


@pytest.mark.launch
@pytest.mark.parametrize("strategy, precision", [(None, "no"), ("zero2", "bf16"), ("zero3", "no")])
def test_weights_behind_a_whole_cache_are_not_read(strategy, precision, train, tiny, rows16, tmp_path):
    """A run that finds the cache whole does not touch the encoder's weights until it evaluates, and has no memory for them.

    The last evaluation and final/ are those of the run that fills it.
    """
    model_class, config = tiny_config("t5", 0.1)
    config.d_model, config.d_ff, config.num_layers = 256, 4096, 3
    shutil.copytree(tiny("t5"), tmp_path / "model")
    model = model_class(config)
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    size = sum(parameter.nbytes for parameter in model.encoder.block.parameters())
    options = options_of("t5", tiny, rows16) | {"model_name_or_path": tmp_path / "model", "cache_frozen": tmp_path / "cache"}
    options |= {"validation_file": rows16, "mixed_precision": precision, "predict_with_generate": "false", "end_report": True}
    most, held, losses, final = {}, {}, {}, {}
    for name in ("fills", "reads"):
        with watched(weights, tmp_path / name) as seen:
            run = train(strategy, name=name, **options)
        most[name], held[name] = max(seen, default=0), run.run["memory"]["measured_bytes"]["weights"]
        losses[name] = [record[key] for key in ("loss", "eval_loss") for record in run.records(key)]
        final[name] = {key: value for key, value in run.weights().items() if key.startswith("encoder.block")}
        assert run.run["frozen_cache"]["passes"]["read"] > 0
    assert losses["reads"] == pytest.approx(losses["fills"], rel=1e-5 if precision == "no" else 2**-8)
    stored = load_file(weights)
    for key, value in final["reads"].items():
        assert value.equal(final["fills"][key]) and value.equal(stored[key].to(value.dtype))
    # The kernel maps some pages around one that is asked for.
    most_allowed = weights.stat().st_size - size + size / 4
    assert most["reads"] < most_allowed, (most, size)
    if strategy is None:  # the others copy what they are given, and let go of the file
        assert most["fills"] > most_allowed, (most, size)
    mine = size / (2 if precision == "bf16" else 1) / (2 if strategy == "zero3" else 1)
    assert held["fills"] - held["reads"] == pytest.approx(mine, rel=0.05), (held, size)


@pytest.mark.parametrize("by_block", [True, False])
def test_what_is_not_read_comes_with_its_block(by_block, tiny):
    """Under ZeRO-3 no more than one block of it is in memory; elsewhere it stays until rows are read from the cache."""
    folder = tiny("t5")
    plain = T5ForConditionalGeneration.from_pretrained(folder).eval()
    names = [name for name, _ in plain.named_parameters() if name.startswith("encoder.block")]
    unread = Unread(dict.fromkeys(names, "float32"), stored_names(folder))
    with unread.left_out(T5ForConditionalGeneration):
        model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    unread.put_in()
    apply_rules(model, ["encoder"], [])
    prefix = CachedPrefix(model, unread, by_block)
    there, queries = [], [block.layer[0].SelfAttention.q for block in model.encoder.block]
    for query in queries:
        query.register_forward_pre_hook(lambda *_: there.append([n for n, one in enumerate(queries) if not one.weight.is_meta]))
    tokens = torch.tensor([[3, 4, 5]])
    found, wanted = model.encoder(tokens).last_hidden_state, plain.encoder(tokens).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)
    assert there == ([[0], [1]] if by_block else [[0], [0, 1]])
    assert not [name for name, _ in model.named_parameters() if name in names]
    prefix.keep_on_device(False, tokens.device)
    assert all(query.weight.is_meta for query in queries)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_pass_over_known_rows_reads_nothing(family, tiny):
    """Nor has it dropout in what has no parameters left; it gives what the pass that computes the rows has given."""
    model_class, folder = {"t5": T5ForConditionalGeneration, "gpt2": GPT2LMHeadModel}[family], tiny(family, 0.1)
    frozen = {"t5": "encoder.block", "gpt2": "transformer.h.0"}[family]
    names = [name for name, _ in model_class.from_pretrained(folder).named_parameters() if name.startswith(frozen)]
    unread = Unread(dict.fromkeys(names, "float32"), stored_names(folder))
    with unread.left_out(model_class):
        model = model_class.from_pretrained(folder)
    unread.put_in()
    apply_rules(model, ["encoder"] if family == "t5" else ["embeddings", "layers[:1]"], [])
    prefix, rows, logits = CachedPrefix(model, unread), np.arange(2), []
    prefix.states = Trial()
    train_mode(model, frozen_eval=True)
    assert names and not any(module.training for module in prefix.modules[0].modules())
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "frozen_rows": (rows, rows)}
    batch |= {"decoder_input_ids": tokens} if family == "t5" else {}
    for known in (False, True):
        prefix.states.there[:], prefix.states.whole = known, known
        prefix.keep_on_device(False, tokens.device)
        torch.manual_seed(0)
        logits.append(model(**batch).logits)
        assert all(getattr(*place).is_meta == known for place in unread.places.values())
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.launch
def test_several_machines_read_a_whole_one(train, tiny, rows16, tmp_path):
    """Ranks that believe they are on two machines do not fill a cache, and read one that is whole; evaluations are the same."""
    options = options_of("t5-ddp", tiny, rows16) | {"cache_frozen": tmp_path / "cache"}
    options |= {"validation_file": rows16, "eval_strategy": "epoch", "predict_with_generate": "false"}
    two = {"environment": {"MACHINES": "2"}}
    refused = train("ddp", name="refused", check=False, **two, **options)
    assert refused.code == 2 and "no run with these flags and files has left a whole cache there, and" in refused.output
    one = train("ddp", name="one", **options)
    both = train("ddp", name="both", **two, **options)
    (done,) = (tmp_path / "cache").glob("*/done.bin")
    done.write_bytes(b"\1" * 15 + b"\0")  # a row is missing
    assert train("ddp", name="half", check=False, **two, **options).code == 2
    for key in ("loss", "eval_loss"):
        found, expected = ([record[key] for record in run.records(key)] for run in (both, one))
        assert found == pytest.approx(expected, rel=1e-5) and len(found) >= EPOCHS
    assert both.run["frozen_cache"]["passes"]["computed"] == 0


@pytest.mark.launch
def test_a_note_is_of_these_weights_and_flags(train, tiny, rows16, tmp_path):
    """Where the loss is cut, or the note lacks a word, the trial is made again; another weight gives other states as well."""
    shutil.copytree(tiny("t5", 0.1), tmp_path / "model")
    options = options_of("t5", tiny, rows16) | {"model_name_or_path": tmp_path / "model", "cache_frozen": tmp_path / "cache"}
    spared, runs = "of frozen weights are not read", {}
    changes = {"reads": {"learning_rate": 2e-3}, "pieces": {"loss_chunks": 2}}
    for name in ("fills", "reads", "pieces", "note", "weight"):
        if name == "note":
            for note in (tmp_path / "cache").glob("*/tried-*.json"):
                note.write_text(json.dumps({"folder": note.parent.name}))
        if name == "weight":
            weights = load_file(tmp_path / "model" / "model.safetensors")
            weights["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 0] += 0.1
            save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        runs[name] = train(None, name=name, **options | changes.get(name, {}))
    assert {name: spared in run.output for name, run in runs.items()} == dict.fromkeys(runs, False) | {"reads": True}
    facts = {name: run.run["frozen_cache"] for name, run in runs.items()}
    assert {name for name, fact in facts.items() if not fact["passes"]["computed"]} == {"reads", "pieces", "note"}
    assert {name for name, fact in facts.items() if fact["folder"] != facts["fills"]["folder"]} == {"weight"}


def test_rows_are_whole_or_absent(tmp_path):
    """What was written and not made to last is not there for the next one; a file that was cut is no cache."""
    lengths, generator = [3, 1, 4, 2], torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        states, wanted = PrefixStates(folder, lengths, 5, dtype), torch.randn(10, 5, generator=generator).to(dtype)
        states.make({"a": 1})
        states.refresh()
        assert not states.there.any() and states.num_bytes == 50 * wanted.element_size()
        states.write([2, 0], wanted[[4, 5, 6, 7, 0, 1, 2]])
        other = PrefixStates(folder, lengths, 5, dtype)
        other.make({"a": 1})
        other.refresh()
        assert not other.there.any(), "not flushed"
        states.flush()
        other.refresh()
        assert other.there.tolist() == [True, False, True, False]
        other.write([0, 1, 3], torch.cat([wanted[:3] + 1, wanted[3:4], wanted[8:]]))
        other.flush()
        states.refresh()
        assert states.whole and torch.equal(states.read([0, 1, 2, 3]), wanted), "a row that was there is not written again"
        assert torch.equal(states.read([3, 0]), wanted[[8, 9, 0, 1, 2]])
    (folder / "states.bin").unlink()
    states = PrefixStates(folder, lengths, 5, torch.bfloat16)
    states.make({})
    states.refresh()
    assert not states.there.any(), "marks without states"
    os.truncate(folder / "states.bin", 30)
    with pytest.raises(UserError, match="states.bin: 30 bytes, not 100: no cache of these rows; remove its folder"):
        PrefixStates(folder, lengths, 5, torch.bfloat16).make({})
    with pytest.raises(UserError, match="GiB are needed, and .* GiB are free; give a folder on another disk"):
        PrefixStates(tmp_path / "large", np.full(10**6, 10**6), 4096, torch.float32).make({})
    assert not (tmp_path / "large" / "states.bin").exists()


def test_tokens_are_found_row_by_row():
    """Rows may lie in any order over the lines of a packed batch; padded ones are in theirs."""
    packed = {"token_rows": torch.tensor([[2, 2, 3, 0], [1, 1, 1, 0]])}
    mask, order = tokens_by_row(packed)
    assert packed["token_rows"][mask][order].tolist() == [1, 1, 1, 2, 2, 3] and order.tolist() == [3, 4, 5, 0, 1, 2]
    mask, order = tokens_by_row({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    assert mask.sum() == 5 and order.tolist() == [0, 1, 2, 3, 4]


def test_what_is_frozen_has_no_dropout():
    model_class, config = tiny_config("gpt2", 0.1)
    model = model_class(config)
    apply_rules(model, ["embeddings", "layers[:1]"], [])
    train_mode(model, frozen_eval=True)
    on = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training}
    assert on and all(name.startswith("transformer.h.1.") for name in on), on
    train_mode(model, frozen_eval=False)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "family, freeze, words",
    [
        ("t5", ["encoder.layers[:1]"], "tensors of the encoder learn, such as .*; freeze all of it"),
        ("llama", ["layers[:2]"], "the embeddings learn, from which all else follows"),
        ("llama", ["embeddings"], "the first block learns; freeze blocks from below"),
    ],
)
def test_no_frozen_prefix(family, freeze, words):
    model_class, config = tiny_config(family, 0.0)
    model = model_class(config)
    apply_rules(model, freeze, [])
    with pytest.raises(UserError, match=words):
        frozen_prefix(model)


def test_flags_that_cannot_be(tmp_path):
    problems = check_arguments(Arguments(cache_frozen="x", peft="prompt"), required=())
    assert any("with dropout, what is frozen gives other outputs each time; give --frozen_eval" in p for p in problems)
    file = tmp_path / "file"
    file.touch()
    about_it = [p for p in check_arguments(Arguments(cache_frozen=str(file)), required=()) if str(file) in p]
    assert about_it == [f"--cache_frozen {file}: is a file; give a folder"]
    nowhere = check_arguments(Arguments(cache_frozen="/proc/none"), required=())
    assert any(p.startswith("--cache_frozen /proc/none: /proc is not writable (") for p in nowhere)
    assert any("--peft prompt gives what is frozen inputs that learn" in p for p in problems)
