"""Whole runs of train.py: the run directory, evaluation, export, resume, precision, and mistakes that only a run can meet."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, text

RECORD_KEYS = set(
    "step epoch loss learning_rate grad_norm target_tokens real_tokens tokens_per_second padding_fraction step_seconds "
    "peak_device_memory_gib peak_host_memory_gib".split()
)


@pytest.fixture(scope="module")
def rows5(tmp_path_factory):
    """Return a file of 5 rows: with batches of 2 on 2 processes the last window has one real row on one rank, none on the other."""
    path = tmp_path_factory.mktemp("rows") / "rows5.jsonl"
    rows = [{"source": text(n, 3 + 5 * n), "target": text(n, 2 + n), "label": n % 3} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.launch
def test_evaluation_is_the_same_on_every_strategy(train, tiny, rows16, rows5):
    """Losses, metrics and predictions of 5 rows: one process with batches of 5, DDP and ZeRO-3 with unequal work and early ends.

    1e-5 is 100 times what rounding makes of the losses here (9e-8 over AVX512, AVX2 and neither).
    """
    options = {
        "model_name_or_path": tiny("t5"),
        "train_file": rows16,
        "validation_file": rows5,
        "test_file": rows5,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "eval_steps": 2,
        "logging_steps": 2,
        "save_steps": 0,
        "max_target_length": 12,
        "seed": 5,
    }
    one = train(None, name="one", per_device_train_batch_size=16, per_device_eval_batch_size=5, **options)
    ddp = train("ddp", name="ddp", real=True, per_device_train_batch_size=8, per_device_eval_batch_size=2, **options)
    zero3 = train("zero3", name="zero3", real=True, per_device_train_batch_size=8, per_device_eval_batch_size=2, **options)
    expected = (one.folder / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["reference"] for line in lines] == [json.loads(row)["target"] for row in rows5.read_text().splitlines()]
    for other in (ddp, zero3):
        assert (other.folder / "predictions.jsonl").read_text() == expected
        assert [r["step"] for r in other.records("eval_loss")] == [2, 4]
        for key, kind in (
            ("eval_loss", "eval_loss"),
            ("perplexity", "eval_loss"),
            ("rougeL", "eval_loss"),
            ("test_loss", "test_loss"),
        ):
            values = [[record[key] for record in run.records(kind)] for run in (one, other)]
            assert values[1] == pytest.approx(values[0], rel=1e-5), key
    record = one.records("eval_loss")[-1]
    assert record["eval_target_tokens"] == sum(len(json.loads(row)["target"].split()) + 1 for row in rows5.read_text().splitlines())
    assert record["perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
    assert {"rouge1", "rouge2", "rougeL", "sacrebleu"} <= record.keys()
    for run in (one, ddp, zero3):
        assert run.output.count("final: ") == 1 and "Traceback" not in run.output
        # `accelerate launch` itself imports DeepSpeed and says once that there is no GPU; scripts/launch.sh keeps even that quiet.
        assert run.output.count("WARNING") <= (run is zero3) and "Warning" not in run.output
        assert all(record.keys() == RECORD_KEYS for record in run.records("loss"))
        assert not run.records("memory_gib")  # nobody asked for a profile, so no step is traced
    assert ddp.run["data"]["tokenised_on_ranks"] == zero3.run["data"]["tokenised_on_ranks"] == []
    assert one.run["data"]["tokenised_on_ranks"] == [0]


@pytest.mark.launch
@pytest.mark.parametrize("strategy, family", [("ddp", "t5"), ("zero2", "llama"), ("zero3_offload", "bart")])
def test_bf16_learns(train, tiny, rows16, strategy, family):
    result = train(
        strategy,
        real=strategy != "ddp",
        model_name_or_path=tiny(family),
        task="causal" if family == "llama" else "seq2seq",
        train_file=rows16,
        test_file=rows16,
        mixed_precision="bf16",
        learning_rate=5e-3,
        max_steps=12,
        logging_steps=3,
        save_steps=0,
        max_target_length=16,
    )
    losses = [record["loss"] for record in result.records("loss")]
    assert losses[-1] < 0.95 * losses[0]
    assert result.records("test_loss")[0]["test_loss"] < losses[0]
    assert len((result.folder / "predictions.jsonl").read_text().splitlines()) == 16
    kinds = {tensor.dtype for tensor in result.weights().values()}
    assert kinds == {torch.float32 if strategy == "ddp" else torch.bfloat16}  # float32 masters stay inside DeepSpeed
    if strategy != "ddp":
        assert result.run["deepspeed_config"]["bf16"]["enabled"] is True


@pytest.mark.launch
def test_classification(train, tiny, rows16, rows5, tmp_path):
    """A YAML holds the flags, the command line wins; accuracy and F1 are those of the predictions written."""
    (tmp_path / "flags.yaml").write_text(
        f"model_name_or_path: {tiny('bart_classifier')}\ntask: classification\ntext_column: source\nmixed_precision: no\n"
        f"train_file: {rows16}\ntest_file: {rows5}\nmax_steps: 99\nlearning_rate: 3e-3\nfreeze: [encoder, re:shared]\n"
    )
    result = train("zero1", config=tmp_path / "flags.yaml", max_steps=5, per_device_eval_batch_size=2)
    assert result.run["max_steps"] == 5 and result.run["arguments"]["freeze"] == ["encoder", "re:shared"]
    assert result.run["labels"] == ["0", "1", "2"]
    lines = [json.loads(line) for line in (result.folder / "predictions.jsonl").read_text().splitlines()]
    record = result.records("test_loss")[0]
    hits = [line["reference"] == line["prediction"] for line in lines]
    assert record["test_accuracy"] == pytest.approx(sum(hits) / 5) and 0 <= record["test_macro_f1"] <= 1
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "final")
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.launch
def test_family_without_a_shift_of_its_own(train, tmp_path, tiny, rows16):
    """M2M100 (NLLB) leaves shifting the labels to its user."""
    import transformers as t

    config = t.M2M100Config(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    t.M2M100ForConditionalGeneration(config).save_pretrained(tmp_path / "m2m")
    t.AutoTokenizer.from_pretrained(tiny("t5")).save_pretrained(tmp_path / "m2m")
    options = {"model_name_or_path": tmp_path / "m2m", "train_file": rows16, "test_file": rows16, "max_target_length": 20}
    result = train(None, max_steps=6, learning_rate=1e-2, logging_steps=2, **options)
    losses = [record["loss"] for record in result.records("loss")]
    assert losses[-1] < losses[0] and len((result.folder / "predictions.jsonl").read_text().splitlines()) == 16


@pytest.mark.launch
def test_a_run_imports_what_it_uses(tiny, rows16, tmp_path):
    """A run without adapters, metrics and ZeRO imports none of their libraries before its last step; its start is recorded."""
    flags = ["--model_name_or_path", tiny("gpt2"), "--task", "causal", "--train_file", rows16, "--output_dir", tmp_path / "run"]
    command = [sys.executable, "-X", "importtime", "train.py", *flags, "--max_steps", "1", "--save_steps", "0"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before, step, _ = done.stdout.partition("\nstep 1  ")
    assert done.returncode == 0 and step
    imported = {line.rpartition("|")[2].strip() for line in before.splitlines() if line.startswith("import time:")}
    assert {"torch", "transformers", "accelerate"} <= imported
    assert not imported & {"evaluate", "deepspeed", "peft", "bitsandbytes", "liger_kernel", "matplotlib"}
    started = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert started["step"] == 0 and 0 < started["start_seconds"] < 600


@pytest.mark.launch
def test_unused_parameters_are_named(train, tmp_path, tiny, rows16):
    """XLNet has a mask embedding that classification never uses."""
    import transformers as t

    config = t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=3, pad_token_id=0)
    t.XLNetForSequenceClassification(config).save_pretrained(tmp_path / "xlnet")
    t.AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "xlnet")
    options = {
        "model_name_or_path": tmp_path / "xlnet",
        "task": "classification",
        "text_column": "source",
        "train_file": rows16,
        "max_steps": 3,
        "save_steps": 0,
    }
    stopped = train("ddp", check=False, **options)
    assert stopped.code != 0 and stopped.output.count("train.py: error") == 1 and "mask_emb" in stopped.output
    assert "Traceback" not in stopped.output.partition("train.py: error")[0]
    allowed = train("ddp", allow_unused=True, **options)
    assert "had no gradient" in allowed.output and allowed.records("loss")[-1]["step"] == 3


@pytest.mark.launch
def test_mistakes_end_in_one_line_each_and_code_2(train, tiny, rows16, tmp_path):
    """Every mistake of a stage is told at once, before a model is loaded, without a traceback."""
    good = {"model_name_or_path": tiny("t5"), "train_file": rows16}
    bad_rows = tmp_path / "bad.jsonl"
    bad_rows.write_text('{"source": "w1"}\n')
    cases = [
        (
            {"model_name_or_path": "./none", "train_file": "none.jsonl", "warmup_ratio": 2, "max_steps": 0},
            ["none: no such folder", "none.jsonl: no such file", "--warmup_ratio 2.0: must be", "--max_steps 0: must be"],
        ),
        ({**good, "mixed_precision": "fp16"}, ["cannot train in fp16; use --mixed_precision bf16"]),
        ({**good, "train_file": bad_rows}, ["1 bad rows in", "bad.jsonl:1: no column 'target'"]),
        ({**good, "task": "causal"}, ["--task causal: a t5 model cannot do this; it fits seq2seq, classification"]),
        ({**good, "freeze": ["encoder", "dekoder", "encoder.layers[9]"]}, ["'dekoder' is not known", "outside the range"]),
        ({**good, "metric": "./no/metric.py", "max_steps": 1}, ["--metric ./no/metric.py: cannot be loaded"]),
        ({**good, "report_to": "wandbb"}, ["--report_to wandbb: allowed: none, aim"]),
        ({**good, "resume_from_checkpoint": tmp_path}, ["no complete checkpoint; allowed: auto, none"]),
    ]
    for number, (flags, messages) in enumerate(cases):
        done = train(None, check=False, name=f"run{number}", **flags)
        assert done.code == 2, done.output
        assert all(message in done.output for message in messages), done.output
        assert "Traceback" not in done.output and not (done.folder / "run.json").exists()


def test_a_lost_connection_of_another_kind_has_its_traceback(tmp_path):
    """To a tracker, a hub, a file system: no other rank has ended. The note is whole, and has only what a file can hold."""
    code = "from pathlib import Path; from zerotune.engine import ending; ending.failures = Path('failures')\n"
    code += "try: raise ConnectionResetError(104, 'Connection reset by peer \\udc80')\n"
    code += "except OSError as error: ending.exit_for(error); raise"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3", "TORCHELASTIC_ERROR_FILE": "error.json"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "another rank" not in done.stderr, done.stderr
    (note,) = (tmp_path / "failures").iterdir()
    lines = note.read_text().splitlines()
    assert lines[:2] == [f"rank 3, {socket.gethostname()}", "ConnectionResetError: [Errno 104] Connection reset by peer ?"]
    assert "Connection reset by peer" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.json", "failures"]
