"""Checkpoints under everything that happens to runs: kills, signals, damage, full disks, bad numbers, stalled and dead ranks."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, text
from corruption import KINDS, damage
from full_disk import fill, measure
from state import copy_at, state_hash
from torture import campaign, demo_flags, ranks_of, start, wait_for_training

from zerotune.errors import UserError
from zerotune.run import manifest
from zerotune.run.checkpoint import check_request, choose, list_checkpoints, open_folder

OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_total_limit": 20,
}


# (strategy, processes, precision, frozen): 32 steps of 2 x 2 x processes rows; 16 rows are an epoch.
RESUMES = [
    (None, 1, "bf16", []),
    ("ddp", 2, "no", ["encoder"]),
    ("ddp", 3, "no", []),  # an order of adding up is a question from three on
    ("zero2", 1, "no", []),
    ("zero3", 3, "no", ["encoder"]),  # by which the frozen tensors cannot be divided
    ("zero3_offload", 2, "bf16", []),
]


@pytest.mark.launch
@pytest.mark.parametrize("strategy, processes, precision, freeze", RESUMES)
def test_resume_is_bitwise(train, tiny, rows16, strategy, processes, precision, freeze):
    """A run in one go and one resumed end in the same weights, optimizer and random states; dropout is on.

    Resumed after an evaluation at an epoch's border; alone, under DDP and ZeRO-3 at a random step as well. ZeRO-2 with two
    processes is resumed at random steps by test_torture_in_short, and all strategies are by the long form of it.
    """
    options = OPTIONS | {
        "model_name_or_path": tiny("t5", 0.1), "train_file": rows16, "validation_file": rows16, "predict_with_generate": False,
        "mixed_precision": precision, "freeze": freeze or None, "max_steps": 7, "save_steps": 1, "eval_steps": 2,
        "dataloader_num_workers": 1, "deterministic": "true" if processes > 2 else None,
    }  # fmt: skip
    straight = train(strategy, processes=processes, name="straight", **options)
    last = straight.folder / "checkpoint-7"
    border = 16 // (4 * processes)
    steps = {border, random.Random(f"{strategy}{precision}").choice([step for step in range(1, 7) if step != border])}
    for step in sorted(steps) if strategy in (None, "ddp", "zero3") else [border]:
        copy_at(straight.folder, straight.folder.with_name(f"at{step}"), step)
        again = train(strategy, processes=processes, name=f"at{step}", **options)
        assert again.run["resumed_from"].endswith(f"checkpoint-{step}")
        assert state_hash(again.folder / "checkpoint-7") == state_hash(last)
        assert again.weights().keys() == straight.weights().keys()
        assert all(torch.equal(tensor, straight.weights()[name]) for name, tensor in again.weights().items())
        numbers = [[(r["step"], r["loss"], r["grad_norm"]) for r in run.records("loss")] for run in (straight, again)]
        assert numbers[0] == numbers[1] and len(numbers[0]) == 7
        assert not list(again.folder.glob("*.tmp"))
    assert state_hash(straight.folder / "checkpoint-6") != state_hash(last)
    saved = straight.records("checkpoint_bytes")[-1]
    assert saved["checkpoint_bytes"] == sum(facts["bytes"] for facts in manifest.read(last)["files"].values())
    if freeze:
        assert manifest.read(last)["frozen_weights"]


@pytest.fixture(scope="module")
def finished(tiny, rows16, tmp_path_factory):
    """Return the folder of a finished DDP run with checkpoints 2, 4 and 6, and its command line."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--model_name_or_path", str(tiny("t5", 0.1)), "--train_file", str(rows16), "--max_steps", "6", "--save_steps", "2"]
    flags += ["--save_total_limit", "5", "--per_device_train_batch_size", "2", "--lr_scheduler_type", "constant"]
    with open(folder.parent / "log", "w") as log:
        assert start("ddp", folder, flags, log).wait() == 0, (folder.parent / "log").read_text()
    assert [step for step, _ in list_checkpoints(folder)] == [2, 4, 6]
    return folder, flags


@pytest.mark.launch
def test_damage_is_found_and_the_checkpoint_before_is_taken(finished, tmp_path):
    from accelerate import Accelerator

    accelerator, generator = Accelerator(cpu=True), random.Random(1)
    saved = manifest.read(finished[0] / "checkpoint-6")
    compared = saved["fingerprint"], saved["layout"], []
    assert manifest.verify(finished[0] / "checkpoint-6")[1] == []
    for kind in KINDS * 3:
        run = tmp_path / "run"
        shutil.copytree(finished[0], run)
        what = damage(run / "checkpoint-6", kind, generator)
        said = []
        folder, content, _ = choose(accelerator, run, "auto", *compared, said.append)
        assert folder == run / "checkpoint-4" and content["step"] == 4, what
        assert (run / "checkpoint-6.damaged").is_dir() and "checkpoint-6 is damaged" in said[0], what
        with pytest.raises(UserError, match="damaged"):
            choose(accelerator, run, str(run / "checkpoint-6.damaged"), *compared, said.append)
        shutil.rmtree(run)


@contextlib.contextmanager
def another_user(folder):
    """Take away the right to read a folder; root, who has it always, is another user meanwhile."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@contextlib.contextmanager
def read_only(folder):
    """Take away the right to write into a folder; root keeps it but on a file system that is mounted read-only."""
    root, mode = os.geteuid() == 0, folder.stat().st_mode
    subprocess.run(["mount", "--bind", "-o", "ro", folder, folder] if root else ["chmod", "555", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder] if root else ["chmod", f"{mode & 0o777:o}", folder], check=True)


def test_what_may_not_be_read_is_not_taken_for_damage(finished, tmp_path):
    from accelerate import Accelerator

    accelerator, run = Accelerator(cpu=True), finished[0]
    saved = manifest.read(run / "checkpoint-6")
    before = sorted(path.name for path in run.rglob("*"))
    for path in (run, *run.parents):  # pytest's own folders are closed to other users
        if path.stat().st_uid == os.geteuid() and "pytest" in str(path):
            path.chmod(0o755)
    with another_user(run / "checkpoint-6"):
        with pytest.raises(UserError, match="checkpoint-6.*: Permission denied"):
            check_request(run, str(run / "checkpoint-6"), False)
        for request in ("auto", str(run / "checkpoint-6")):
            with pytest.raises(UserError, match="checkpoint-6.*: Permission denied; every file"):
                choose(accelerator, run, request, saved["fingerprint"], saved["layout"], [], print)
    assert sorted(path.name for path in run.rglob("*")) == before


@pytest.mark.launch
def test_what_changes_the_mathematics_is_refused(finished, tmp_path, tiny, rows16):
    """Each refusal names what differs, ends with code 2 and touches nothing; harmless changes and more steps go on."""
    run, flags = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], run)
    other_rows = tmp_path / "other.jsonl"
    other_rows.write_text(rows16.read_text() + json.dumps({"source": "w1", "target": "w2"}) + "\n")
    before = sorted(path.name for path in run.rglob("*"))

    def attempt(strategy, *more):
        with open(tmp_path / "log", "w") as log:
            code = start(strategy, run, [*flags, *map(str, more)], log).wait()
        return code, (tmp_path / "log").read_text()

    cases = [
        (
            "ddp",
            ["--seed", 7, "--freeze", "encoder", "--train_file", other_rows, "--model_name_or_path", tiny("t5")],
            ["--seed was 42 and is 7", "--freeze was []", "training rows was", "model configuration"],
        ),
        ("zero2", ["--per_device_train_batch_size", 4], ["rows a step was 4 and is 8", "allow it: --accept_change per_device_"]),
        ("ddp", ["--resume_from_checkpoint", run], ["no complete checkpoint"]),
        ("ddp", ["--output_dir", "READ_ONLY"], ["is not writable"]),
    ]
    for strategy, more, messages in cases:
        with contextlib.ExitStack() as stack:
            if "READ_ONLY" in more:
                stack.enter_context(read_only(run))
                more = []
            code, output = attempt(strategy, *more)
        assert code == 2 and all(message in output for message in messages), output
        assert 'Traceback (most recent call last):\n  File "/' not in output.partition("train.py: error")[0]
        assert sorted(path.name for path in run.rglob("*")) == before
    code, output = attempt("ddp", "--max_steps", 8, "--logging_steps", 2, "--save_steps", 4)
    assert code == 0 and [step for step, _ in list_checkpoints(run)] == [2, 4, 6, 8], output


@pytest.mark.launch
@pytest.mark.parametrize("strategy, number, moment", [
    ("ddp", signal.SIGTERM, "step"), ("zero3", signal.SIGUSR1, "evaluation"), ("zero2", signal.SIGINT, "save"),
])  # fmt: skip
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path, strategy, number, moment):
    """The rank that gets it is the second; the launcher's exit code is 128 + signal, and the same command goes on."""
    flags, run = demo_flags(tmp_path, 4000), tmp_path / "run"
    flags += ["--save_steps", "1" if moment == "save" else "0", "--validation_file", str(tmp_path / "rows.jsonl")]
    flags += ["--predict_with_generate", "false", "--eval_steps", "1" if moment == "evaluation" else "0", "--end_report", "true"]
    with open(tmp_path / "log", "w") as log:
        since = time.time()
        process = start(strategy, run, flags, log)
        assert wait_for_training(process, run, since), (tmp_path / "log").read_text()[-3000:]
        time.sleep(1)
        os.kill(ranks_of(run)[1], number)
        code = process.wait(timeout=120)
    output = (tmp_path / "log").read_text()
    assert code == 128 + number and f"stopped by signal {number:d} after step" in output, output[-3000:]
    assert not (run / "report").exists() and "planned / measured" not in output, "a scheduler gives a stopped run little time"
    step, folder = list_checkpoints(run)[-1]
    assert manifest.verify(folder)[1] == [] and 0 < step < 4000 and not (run / "final").exists()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == step


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_bad_numbers_are_skipped_on_all_ranks(train, tiny, tmp_path, strategy):
    """One row holds a word whose embedding is infinite: its rank's loss is not finite. The step leaves all state as it was."""
    import transformers as t

    model = t.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    tokenizer = t.AutoTokenizer.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("w59")] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [text(n, 3 + n).replace("w59", "w58") for n in range(8)]
    rows = [{"source": f"{words[n]} w59" if n == 5 else words[n], "target": "w1 w2"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model_name_or_path": tmp_path / "model", "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1}
    options |= {"task": "causal", "save_total_limit": 20, "per_device_train_batch_size": 1}
    result = train(strategy, train_file=tmp_path / "rows.jsonl", max_steps=4, max_grad_norm=0, **options)
    (bad,) = result.records("bad_step")
    assert 6 in bad["train_file_lines"] and len(bad["train_file_lines"]) == 2
    kept = {step: state_hash(folder) for step, folder in list_checkpoints(result.folder)}
    before = bad["step"] - 1 or bad["step"] + 1
    assert len(kept) == 4 and (bad["step"] == 1 or kept[bad["step"]] == kept[before])
    good = [step for step in (2, 3, 4) if step != bad["step"]]
    assert all(kept[step] != kept[step - 1] for step in good)
    assert [record["loss"] is None for record in result.records("loss")] == [step == bad["step"] for step in (1, 2, 3, 4)]

    if strategy == "zero3":
        return
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file, part in zip(files, (rows[:6], rows[6:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    result = train(strategy, name="files", train_file=files, max_steps=4, **options | {"logging_steps": 4})
    (record,), (bad,) = result.records("loss"), result.records("bad_step")
    parts = record["sources"].values()
    assert all(part["loss"] is not None for part in parts), "a skipped step is no part of the losses by source"
    assert sum(part["target_tokens"] for part in parts) == record["target_tokens"] and f"{files[0]}:6" in bad["train_file_lines"]
    (tmp_path / "poison.jsonl").write_text(json.dumps(rows[5]) + "\n")
    stopped = train(
        strategy, check=False, name="all", train_file=tmp_path / "poison.jsonl", max_steps=9, max_bad_steps=2, **options
    )
    assert stopped.code == 1 and "2 bad steps in a row; the last good state is saved" in stopped.output
    assert (stopped.folder / "checkpoint-0" / manifest.NAME).exists()


@pytest.mark.launch
def test_stalled_and_interrupted_ranks_end_the_job(tmp_path):
    """A stalled rank: the job ends within the timeout, with the stacks of both. Two Ctrl-C to a rank or the launcher: at once.

    That a dead rank ends the job is seen in test_torture_in_short.
    """
    flags = demo_flags(tmp_path, 100_000)
    for name, more in (("stalled", ["--hang_timeout_seconds", "6"]), ("rank", []), ("launcher", [])):
        run = tmp_path / name
        with open(tmp_path / f"{name}.log", "w") as log:
            since = time.time()
            process = start("ddp", run, [*flags, *more], log)
            assert wait_for_training(process, run, since)
            time.sleep(0.5)
            ranks = ranks_of(run)
            os.kill(ranks[1], signal.SIGSTOP)
            if name in ("rank", "launcher"):  # the first rank waits for the stopped one, inside a collective
                for _ in range(2):
                    os.kill(ranks[0] if name == "rank" else process.pid, signal.SIGINT)
                    time.sleep(1.5)
            if name == "rank":
                assert 0 not in ranks_of(run)
                os.kill(ranks[1], signal.SIGCONT)
            code = process.wait(timeout=66)
        output = (tmp_path / f"{name}.log").read_text()
        assert code == (130 if name in ("rank", "launcher") else 1), output[-3000:]
        while ranks_of(run):
            time.sleep(0.1)
        assert list_checkpoints(run) and manifest.verify(list_checkpoints(run)[-1][1])[1] == []
        if name == "stalled":
            assert "no progress for 6 s" in output and output.count("most recent call first") >= 2, output[-3000:]


@pytest.mark.launch
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system to fill")
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_full_disk_costs_a_save_and_nothing_else(tmp_path, strategy):
    """On a file system that is full in the middle of the largest file of the second save, the run goes on to its end."""
    flags = [*demo_flags(tmp_path, 9), "--save_total_limit", "1"]
    files = measure(strategy, tmp_path, flags)
    largest = max(range(len(files)), key=lambda index: files[index][1])
    assert fill(strategy, tmp_path, flags, files, largest) == ""


@pytest.mark.launch
def test_torture_in_short(tmp_path):
    flags = [*demo_flags(tmp_path, 40), "--mixed_precision", "bf16"]
    result = campaign("zero2", 2, flags, tmp_path, random.Random(3))
    assert result["passed"] and result["kills"] == 2, result


def test_a_torn_save_is_never_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3.tmp").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-2.damaged").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4]
    assert manifest.verify(tmp_path / "checkpoint-4")[1] == ["manifest.json: No such file or directory"]
    assert Path(sys.executable).exists() and ROOT.is_dir()


def test_starting_over_removes_an_earlier_run(tmp_path):
    """--overwrite_output_dir: its checkpoints, records and failures, by which this one would be taken for it; nothing else."""
    for name in ("checkpoint-3/x", "failures/x.txt", "metrics.jsonl", "thesis.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    open_folder(tmp_path, anew=False)
    assert len(list(tmp_path.iterdir())) == 4
    open_folder(tmp_path, anew=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
