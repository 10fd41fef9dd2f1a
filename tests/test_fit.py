"""Whether a run fits: the longest micro-batch tried, the largest that fits, running out of memory, the kernel's killer."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, flags_of, text
from state import state_hash

OPTIONS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3, "save_steps": 3, "logging_steps": 1}
OPTIONS |= {"reduce": "auto"}  # with a plan that these make anyway
MIB = 2**20


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Return a file of 16 rows of 100 words: a micro-batch of all of them takes some 200 MiB, of one some 20."""
    path = tmp_path_factory.mktemp("rows") / "long.jsonl"
    path.write_text("".join(json.dumps({"source": text(n, 900), "target": text(n + 1, 200)}) + "\n" for n in range(16)))
    return path


@pytest.mark.launch
@pytest.mark.parametrize("strategy", [None, "ddp", "zero1", "zero2", "zero2_offload", "zero3"])
def test_a_trial_leaves_no_trace(train, tiny, rows16, strategy):
    """Weights, optimizer and random states, counters and losses are, to the bit, those of a run without it; dropout is on."""
    options = OPTIONS | {"model_name_or_path": tiny("t5", 0.1), "train_file": rows16, "learning_rate": 1e-3}
    options["end_report"] = "true"
    plain = train(strategy, name="plain", **options)
    tried = train(strategy, name="tried", probe_longest_batch="true", **options)
    assert "longest micro-batch: 1 x " in tried.output and "longest micro-batch" not in plain.output
    assert state_hash(tried.folder / "checkpoint-3") == state_hash(plain.folder / "checkpoint-3")
    losses = [[(r["loss"], r["grad_norm"]) for r in run.records("loss")] for run in (plain, tried)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for run in (plain, tried):
        memory = run.run["memory"]
        assert (
            memory["planned_bytes"].keys()
            == memory["measured_bytes"].keys()
            == {"weights", "optimizer states", "the rest", "total"}
        )
        assert memory["measured_bytes"]["total"] > 0 and "memory, GiB planned / measured at most: weights" in run.output
        if strategy != "zero2_offload":
            ratio = memory["planned_bytes"]["optimizer states"] / memory["measured_bytes"]["optimizer states"]
            assert 0.9 < ratio < 1.1, memory


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_auto_batch_is_the_same_step_and_is_kept(train, tiny, rows16, strategy):
    """The largest cut where all fits; losses within 1e-5 of the hand-cut run; the resumed run keeps it."""
    options = OPTIONS | {"model_name_or_path": tiny("t5"), "train_file": rows16, "learning_rate": 1e-3, "save_steps": 2}
    hand = train(strategy, name="hand", **options)
    auto = train(strategy, name="auto", auto_batch="true", **options)
    found = auto.run
    assert found["auto_batch"]["given"] == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert found["auto_batch"]["chosen"] == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert found["arguments"]["per_device_train_batch_size"] == 4
    if found["deepspeed_config"]:
        assert found["deepspeed_config"]["train_micro_batch_size_per_gpu"] == 4
        assert found["deepspeed_config"]["gradient_accumulation_steps"] == 1
    for mine, other in zip(auto.records("loss"), hand.records("loss"), strict=True):
        assert abs(mine["loss"] - other["loss"]) <= 1e-5 * other["loss"] and mine["target_tokens"] == other["target_tokens"]
    again = train(strategy, name="auto", auto_batch="true", **options | {"lr_scheduler_type": "linear"})
    assert again.run["resumed_from"].endswith("checkpoint-3") and "as the run began" in again.output
    limit = {"ZEROTUNE_MICRO_BATCH_LIMIT": "4"}  # what a trial that did not fit leaves for the process after it
    refused = train(strategy, name="auto", check=False, auto_batch="true", environment=limit, **options)
    assert refused.code == 2 and "micro-batches of 4 rows, as the run began, do not fit here" in refused.output


@pytest.mark.launch
def test_what_cannot_be_planned_is_not_chosen_for(train, tiny, rows16):
    """One line and exit code 2 on all ranks, in place of a micro-batch out of thin air."""
    options = OPTIONS | {"model_name_or_path": tiny("llama"), "train_file": rows16, "task": "causal", "peft": "lora"}
    options |= {"quantize": "int8", "target_modules": "all-linear"}
    for flag in ("auto_batch", "probe_longest_batch"):
        result = train("ddp", name=flag, check=False, **{flag: "true"}, **options)
        assert result.code == 2 and "Traceback" not in result.output, result.output[-2000:]
        assert f"train.py: error: --{flag}: --quantize int8: cannot be planned" in result.output


@pytest.mark.launch
@pytest.mark.parametrize("strategy", [None, "ddp", "zero2", "zero3"])
def test_auto_batch_under_a_limit(train, tiny, long_rows, strategy):
    """The last rank may take 450 MiB more: it fits by the plan (one process), or after a trial (the plan is rank 0's)."""
    processes = 1 if strategy is None else 2
    options = {
        "model_name_or_path": tiny("t5"), "train_file": long_rows, "max_source_length": 1000, "max_target_length": 256,
        "per_device_train_batch_size": 16 // processes, "max_steps": 2, "save_steps": 0, "logging_steps": 1,
        "reduce": "auto",
    }  # fmt: skip
    hand = train(strategy, name="hand", **options)
    limits = {"LIMITED_RANK": str(processes - 1), "LIMITED_BYTES": str(450 * MIB), "MALLOC_MMAP_THRESHOLD_": "65536"}
    auto = train(strategy, name="auto", auto_batch="true", environment=limits, **options)
    chosen = auto.run["auto_batch"]["chosen"]
    assert 1 <= chosen["per_device_train_batch_size"] < 16 // processes
    assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] == 16 // processes
    if processes == 2:
        assert "did not fit when they were tried" in auto.run["auto_batch"]["why"]
    for mine, other in zip(auto.records("loss"), hand.records("loss"), strict=True):
        assert abs(mine["loss"] - other["loss"]) <= 1e-5 * other["loss"]


@pytest.mark.launch
def test_checkpointing_of_as_few_blocks_as_fit(train, tiny, long_rows):
    """By the plan, under a limit of 1,050 MiB; the losses are those of a run that keeps its activations."""
    options = {
        "model_name_or_path": tiny("t5"), "train_file": long_rows, "max_source_length": 1000, "max_target_length": 256,
        "per_device_train_batch_size": 16, "max_steps": 2, "save_steps": 0, "logging_steps": 1,
    }  # fmt: skip
    plain = train(None, name="plain", gradient_checkpointing="auto", **options)
    assert "gradient_checkpointing: false, which fits" in plain.output
    limits = {"LIMITED_RANK": "0", "LIMITED_BYTES": str(1050 * MIB), "MALLOC_MMAP_THRESHOLD_": "65536"}
    auto = train(None, name="auto", gradient_checkpointing="auto", environment=limits, **options)
    assert auto.run["arguments"]["gradient_checkpointing"] in ("every:4", "every:2", True)
    for mine, other in zip(auto.records("loss"), plain.records("loss"), strict=True):
        assert abs(mine["loss"] - other["loss"]) <= 1e-5 * other["loss"]


@pytest.mark.launch
@pytest.mark.parametrize("strategy", [None, "ddp", "zero2", "zero3"])
def test_out_of_memory_is_explained(train, tiny, long_rows, strategy):
    """One report from the rank that ran out, exit code 2, the other rank ended; the checkpoint that there was stays."""
    processes = 1 if strategy is None else 2
    options = {
        "model_name_or_path": tiny("t5"), "train_file": long_rows, "max_source_length": 1000, "max_target_length": 256,
        "per_device_train_batch_size": 16 // processes, "max_steps": 2, "save_steps": 1, "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    first = train(strategy, name="run", **options | {"max_steps": 1})
    limits = {"LIMITED_RANK": str(processes - 1), "LIMITED_BYTES": str(300 * MIB), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = train(strategy, name="run", check=False, environment=limits, **options)
    report = [line.removeprefix("train.py: out of memory: ") for line in result.output.splitlines() if "out of memory: " in line]
    # The first code that is seen: of the rank that spoke, or of the one that it ended. launch.sh gives 2 for both.
    assert result.code in ((2,) if processes == 1 else (2, -9)), result.output[-3000:]
    assert report and report[0].startswith(f"rank {processes - 1}, in a step (step 2, micro-batch 1: lines "), result.output[-3000:]
    assert " tokens" in report[0] and len([line for line in report if line.startswith("rank ")]) == 1
    words = " ".join(report)
    assert "GiB at this moment: peak of the host" in words and "largest tensors alive: " in words
    assert "GiB planned: weights" in words or "python -m zerotune plan says what fits" in words
    assert "Traceback" not in result.output
    assert (first.folder / "checkpoint-1" / "manifest.json").exists()


@pytest.mark.launch
def test_out_of_memory_in_an_evaluation(train, tiny, long_rows, tmp_path):
    """The phase is named, and what was saved before it stays."""
    (tmp_path / "many.jsonl").write_text(64 * long_rows.read_text())  # of whose batch one activation alone takes 236 MB
    options = {
        "model_name_or_path": tiny("t5"), "train_file": long_rows, "validation_file": tmp_path / "many.jsonl",
        "max_source_length": 1000, "max_target_length": 256, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1024,
        "max_steps": 2, "eval_steps": 2, "save_steps": 1, "predict_with_generate": "false",
    }  # fmt: skip
    limits = {"LIMITED_RANK": "0", "LIMITED_BYTES": str(500 * MIB), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = train(None, check=False, environment=limits, **options)
    assert result.code == 2, result.output[-3000:]
    assert "train.py: out of memory: rank 0, in an evaluation, batch of 1024 x 901 + 1024 x 201 tokens" in result.output
    assert (result.folder / "checkpoint-1" / "manifest.json").exists() and not (result.folder / "final").exists()


@pytest.mark.launch
def test_out_of_memory_while_loading_and_in_the_export(train, tiny, tmp_path):
    """A frozen embedding of 256 MB: its load, or the copy that the export reads back, is what does not fit."""
    import transformers as t

    model = t.AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"))
    model.resize_token_embeddings(2_000_000)
    folder = tmp_path / "wide"
    model.save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(tiny("t5")).save_pretrained(folder)
    (tmp_path / "short.jsonl").write_text(json.dumps({"source": "w1", "target": "w2"}) + "\n")
    options = {"model_name_or_path": folder, "train_file": tmp_path / "short.jsonl", "max_steps": 1, "save_steps": 1}
    options |= {"freeze": "embeddings", "per_device_train_batch_size": 1}
    for phase, size in (("loading the model", 100), ("the export", 450)):
        limits = {"LIMITED_RANK": "0", "LIMITED_BYTES": str(size * MIB), "MALLOC_MMAP_THRESHOLD_": "65536"}
        result = train(None, name=phase.split()[-1], check=False, environment=limits, **options)
        assert result.code == 2 and f"train.py: out of memory: rank 0, in {phase}" in result.output, result.output[-3000:]
        assert not (result.folder / "final").exists()
    assert (result.folder / "checkpoint-1" / "manifest.json").exists()


@pytest.mark.launch
def test_the_kernels_killer_is_named(tiny, long_rows, tmp_path):
    """A real memory cgroup that is too small: launch.sh says who ended the run, and shows the host's memory by category."""
    group = memory_group(250 * MIB)
    try:
        options = {
            "model_name_or_path": tiny("t5"), "train_file": long_rows, "max_source_length": 1000, "max_target_length": 256,
            "per_device_train_batch_size": 16, "max_steps": 2, "output_dir": tmp_path / "run",
        }  # fmt: skip
        enter = f'echo $$ > {group / "cgroup.procs"} && exec bash {ROOT / "scripts/launch.sh"} "$@"'
        environment = {**os.environ, "STRATEGY": "single", "OMP_NUM_THREADS": "1"}
        command = ["bash", "-c", enter, "bash", *flags_of(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        group.rmdir()
    assert "the kernel's OOM killer ended a process while this run went on" in done.stderr, done.stdout + done.stderr


def memory_group(size):
    """Return the folder of a new memory cgroup, of version 1 or 2; skip where this user may make none."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"zerotune-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    pytest.skip("no memory cgroup can be made by this user")
