"""The doctor: each check on machines, files and numbers that are made for it, and the whole on a real launch."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from zerotune.errors import UserError
from zerotune.run.arguments import Arguments, parse_arguments
from zerotune.tools.doctor import configuration, finding, launch, losses, machine, ranks
from zerotune.tools.doctor.finding import VERDICTS, Finding

FINE, HURTS, FAILS = VERDICTS
MIB = 2**20


def launched(**environment):
    return launch.launch_of({"CUDA_VISIBLE_DEVICES": "", **environment})


def test_the_worst_verdict_is_the_exit_code_and_comes_last():
    findings = [finding.fails("a", "breaks", "mend it"), finding.fine("b", "well"), finding.hurts("c", "slow", "speed it up")]
    assert [finding.exit_code(findings[place:]) for place in range(4)] == [2, 1, 1, 0]
    assert finding.report(findings).splitlines() == [
        "fine (1)", "  b: well", "will hurt (1)", "  c: slow", "      fix: speed it up",
        "will fail (1)", "  a: breaks", "      fix: mend it",
    ]  # fmt: skip
    assert finding.of_problem("c", "x is 1; write 2; or 3") == Finding(FAILS, "c", "x is 1", "write 2; or 3")
    assert "--help" in finding.of_problem("c", "--lr: no flag of train.py").fix


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"STRATEGY": "zero3", "CUDA_VISIBLE_DEVICES": "0,1,3"},
        {"STRATEGY": "cpu", "CUDA_VISIBLE_DEVICES": "0,1,3", "NUM_PROCESSES": "4"},
        {"STRATEGY": "single", "NUM_PROCESSES": "4"},
        {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_PROCESS_IP": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "0,1"},
    ],
)
def test_a_launch_is_what_launch_sh_starts(environment, tiny, rows16, tmp_path):
    flags = ["--model_name_or_path", tiny("t5"), "--train_file", rows16, "--output_dir", tmp_path]
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", ROOT / "scripts" / "launch.sh", *flags]
    dry = subprocess.run(command, env={**os.environ, **environment, "DRY_RUN": "1"}, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    words, planned = dry.stdout.split(), launch.launch_of(environment)
    found = {word: words[place + 1] for place, word in enumerate(words) if word.startswith("--num") or word == "--machine_rank"}
    if planned.strategy == "single":
        assert not found and planned.processes == 1
    else:
        assert int(found["--num_processes"]) == planned.processes == planned.here * planned.machines
    assert found.get("--num_machines", "1") == str(planned.machines) and found.get("--machine_rank", "0") == str(planned.rank)
    assert str(planned.yaml) in dry.stdout or planned.strategy == "single"


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"STRATEGY": "zero9"}, "STRATEGY=zero9 is not known; allowed: cpu ddp single zero1"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two is not a whole number"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0 is not a whole number"),
        ({"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "a"}, "MACHINE_RANK=: must be a whole number, at least 0"),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "0"}, "MAIN_PROCESS_IP: give the address of machine 0"),
    ],
)
def test_an_environment_that_launch_sh_refuses(environment, words):
    with pytest.raises(UserError, match=words):
        launched(**environment)


def test_versions_beside_the_pins():
    pins = machine.read_pins(ROOT / "requirements.txt")
    assert {"torch", "deepspeed", "peft"} <= pins.keys() and "pytest" not in pins
    assert machine.installed_versions(["torch", "no-such-package"])["no-such-package"] is None
    pins = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    (found,) = machine.compare_versions(pins, {"torch": "2.13.0+cu130", "deepspeed": "0.19.8"})
    assert found.verdict == FINE
    (found,) = machine.compare_versions(pins, {"torch": "2.11.0", "deepspeed": "0.19.8"})
    assert found.verdict == HURTS and "torch is 2.11.0; 2.13.0 is what was tested" in found.found and "torch==2.13.0" in found.fix
    missing = {"torch": None, "deepspeed": None}
    assert [found.verdict for found in machine.compare_versions(pins, missing)] == [FAILS, HURTS]
    assert [found.verdict for found in machine.compare_versions(pins, missing, {"deepspeed"})] == [HURTS, FAILS]


def test_known_bad_versions_are_named():
    old, new = {"deepspeed": "0.19.7"}, {"deepspeed": "0.20.0"}
    assert [f.verdict for f in machine.known_bad(old, 3, True) + machine.known_bad(old, 3, None)] == [FAILS, HURTS]
    assert "deepspeed 0.19.7 crashes in ZeRO-3 on frozen parameters" in machine.known_bad(old, 3, True)[0].found
    assert machine.known_bad(old, 3, False) == machine.known_bad(old, 2, True) == machine.known_bad(new, 3, True) == []
    assert configuration.check_frozen(None) is None
    assert configuration.check_frozen(Arguments(gradient_checkpointing=True, freeze=["encoder"]))
    assert not configuration.check_frozen(Arguments(freeze=["encoder"]))


@pytest.mark.parametrize(
    "torch_cuda, driver, gpus, usable, verdict, words",
    [
        (None, None, 0, False, FINE, "on the CPU"),
        ((13, 0), None, 0, False, FINE, "on the CPU"),
        (None, (13, 0), 2, False, HURTS, "torch is a CPU build"),
        ((13, 0), None, 2, False, HURTS, "no driver library"),
        ((13, 0), (12, 9), 2, False, FAILS, "built for CUDA 13.0, the driver serves 12.9"),
        ((13, 0), (13, 1), 2, False, HURTS, "no GPU that it can use"),
        ((12, 8), (12, 4), 2, True, FINE, "the driver serves 12.4"),
    ],
)
def test_cuda_of_torch_and_driver(torch_cuda, driver, gpus, usable, verdict, words):
    found = machine.check_cuda(torch_cuda, driver, gpus, usable)
    assert found.verdict == verdict and words in found.found and bool(found.fix) == (verdict != FINE)


def test_the_cuda_compiler(monkeypatch, tmp_path):
    assert [machine.check_nvcc((13, 0), nvcc, True).verdict for nvcc in (None, (13, 0), (13, 1), (12, 8))] == [
        FAILS,
        FINE,
        HURTS,
        HURTS,
    ]
    assert machine.check_nvcc((12, 8), (12, 4), True).verdict == FINE == machine.check_nvcc((13, 0), None, False).verdict
    from deepspeed.ops.op_builder.builder import cuda_minor_mismatch_ok

    assert max(cuda_minor_mismatch_ok) == 12  # the majors within which DeepSpeed takes any minor version
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.nvcc_version() == (12, 8)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert machine.nvcc_version() is None


def test_a_machine_without_compiler_or_libaio(monkeypatch):
    assert machine.check_compiler(True).verdict == FINE  # the tests need one
    monkeypatch.setenv("CXX", "false")
    for check, words in ((machine.check_compiler, "apt install g++"), (machine.check_libaio, "apt install libaio-dev")):
        assert check(False).verdict == FINE and check(True).verdict == FAILS and words in check(True).fix
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler: No such file" in machine.check_compiler(True).found
    monkeypatch.delenv("CXX")
    assert "no_such_header.h" in machine.compiles("#include <no_such_header.h>")


def test_the_disk_is_written_and_read(tmp_path, monkeypatch):
    size = 17 * MIB  # more than a block, and no multiple of it
    found = machine.check_disk(tmp_path / "nvme", size, needed=True, slow=0)
    assert found.verdict == FINE and "17 MiB written at" in found.found and not list((tmp_path / "nvme").iterdir())
    assert machine.check_disk(tmp_path, MIB, needed=False, slow=1e18).verdict == FINE
    slow = machine.check_disk(tmp_path, MIB, needed=True, slow=1e18)
    assert slow.verdict == HURTS and "s a step for each billion parameters" in slow.found and "NVME_PATH" in slow.fix
    assert machine.check_disk("/proc/no", MIB, needed=True).verdict == FAILS
    real = os.preadv

    def rotten(descriptor, views, place):
        count = real(descriptor, views, place)
        views[0][100] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", rotten)
    found = machine.check_disk(tmp_path, size, needed=True, slow=0)
    assert (
        found.verdict == FAILS and "is not what was written" in found.found and not [p for p in tmp_path.iterdir() if p.is_file()]
    )


def test_shared_memory():
    gib = machine.NCCL_SHARED_MEMORY
    assert machine.shared_memory_free() is None or machine.shared_memory_free() > 0
    assert [machine.check_shared_memory(free, gib).verdict for free in (2 * gib, gib, 64 * MIB, None)] == [FINE, FINE, HURTS, HURTS]
    assert "--shm-size=1g" in machine.check_shared_memory(64 * MIB, gib).fix
    assert machine.check_shared_memory(64 * MIB, 0).verdict == FINE == machine.check_shared_memory(None, 0).verdict


def test_limits():
    free = dict.fromkeys("nftvl", machine.UNLIMITED)
    assert machine.soft_limits().keys() == free.keys()

    def check(gpus=0, machines=1, processes=2, infiniband=False, **limits):
        found = machine.check_limits(free | limits, gpus, machines, processes, infiniband)
        return [finding.fix.split(" before")[0] for finding in found if finding.verdict == HURTS]

    assert check() == check(n=1024) == check(l=8 * MIB) == check(v=2**40) == check(l=8 * MIB, infiniband=True) == []
    assert check(n=256) == ["ulimit -n 65536"] == check(n=1024, machines=2)
    assert check(f=2**30) == ["ulimit -f unlimited"] and check(t=3600) == ["ulimit -t unlimited"]
    assert check(v=2**40, gpus=1) == ["ulimit -v unlimited"]
    assert check(l=8 * MIB, infiniband=True, machines=2) == ["ulimit -l unlimited"]


def test_places_of_the_processes():
    assert [ranks.check_places(*given).verdict for given in ((2, 1, 0), (8, 1, 8), (4, 1, 8), (16, 2, 8))] == [FINE] * 4
    assert "4 stay idle" in ranks.check_places(4, 1, 8).found
    found = ranks.check_places(8, 1, 4)
    assert found.verdict == FAILS and "two ranks on one GPU" in found.found and found.fix == "NUM_PROCESSES=4"
    assert "no multiple of NUM_MACHINES=2" in ranks.check_places(3, 2, 0).found


def answers(seconds=(0.01, 0.02), right=(True, True)):
    return [{"seconds": s, "right": r} for s, r in zip(seconds, right, strict=True)]


def test_a_round_trip_is_judged():
    assert ranks.bandwidth(100, 4, 2.0) == 2 * 3 / 4 * 100 / 2
    found = ranks.check_round_trip(answers(), 20_000_000, "gloo", 1)
    assert found.verdict == FINE and "2 ranks sum 19 MiB over gloo at 1.00 GB/s" in found.found  # by the slower rank
    assert ranks.check_round_trip(answers(), 20_000_000, "nccl", 1).verdict == HURTS
    several = ranks.check_round_trip(answers(), 20_000_000, "nccl", 2)
    assert several.verdict == HURTS and "NCCL_SOCKET_IFNAME" in several.fix and "MAIN_PROCESS_IP" in several.fix
    assert ranks.check_round_trip(answers(), 80_000_000, "nccl", 1).verdict == FINE
    wrong = ranks.check_round_trip(answers(right=(True, False)), 80_000_000, "nccl", 1)
    assert wrong.verdict == FAILS and "ranks 1 got a wrong sum" in wrong.found


def test_clocks_and_versions_of_the_machines():
    assert ranks.check_clocks({"a": 100.0, "b": 100.9}).verdict == FINE
    late = ranks.check_clocks({"a": 100.0, "b": 103.5, "c": 100.2})
    assert late.verdict == HURTS and "b is 3.5 s ahead of a" in late.found and "NTP" in late.fix
    same = {"a": {"torch": "2", "deepspeed": "1"}, "b": {"torch": "2", "deepspeed": "1"}}
    assert [found.verdict for found in ranks.check_same_versions(same)] == [FINE]
    (found,) = ranks.check_same_versions(same | {"b": {"torch": "2"}})
    assert found.verdict == FAILS and "machines differ in deepspeed: 1 on a, none on b" in found.found


@pytest.mark.launch
def test_ranks_that_do_not_answer_fail(tmp_path):
    """A rank has a second for six sums of half a GiB; one that names an interface which is not there says so at once."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    (found,), speed = ranks.measure(launched(), environment, tmp_path, size=2**29, timeout=1)
    assert found.verdict == FAILS and speed is None and "no answer within 1 s" in found.found and "GLOO_SOCKET_IFNAME" in found.fix
    (found,), speed = ranks.measure(launched(), environment | {"GLOO_SOCKET_IFNAME": "nothing"}, tmp_path)
    assert found.verdict == FAILS and speed is None and "Unable to find address for: nothing" in found.found


def test_what_a_launch_refuses_is_found(tiny, rows16, tmp_path):
    good = ["--model_name_or_path", str(tiny("t5")), "--train_file", str(rows16), "--output_dir", str(tmp_path / "out")]
    args, (found,) = configuration.check_configuration(launched(), good)
    assert found.verdict == FINE and args.model_name_or_path == str(tiny("t5"))
    args, (found,) = configuration.check_configuration(launched(), [*good, "--lr", "1"])
    assert args is None and found.verdict == FAILS and found.found.startswith("--lr: no flag of train.py")
    _, (found,) = configuration.check_configuration(launched(), good[:4])
    assert found.found.startswith("--output_dir is required")
    _, (found,) = configuration.check_configuration(launched(), [*good, "--optim", "adafactor"])
    assert "ZeRO flattens the parameters" in found.found and found.fix.startswith("use --optim adamw_torch_fused")
    _, (found,) = configuration.check_configuration(launched(), [*good, "--report_to", "nothing"])
    assert "--report_to nothing: allowed" in found.found
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    _, (found,) = configuration.check_configuration(launched(), [*good, "--resume_from_checkpoint", "none"])
    assert "holds a run already" in found.found and "give another folder" in found.fix


@pytest.mark.parametrize(
    "zero, words",
    [
        ({"stage": 2, "reduce_bucket_size": "auto"}, None),
        ({"stage": 2, "reduce_bucket_size": 10_000_000}, None),
        ({"stage": 2}, "reduce_bucket_size 500,000,000 is more than the 60,000,000 parameters that learn: 839 MiB"),
        ({"stage": 2, "overlap_comm": True}, "that learn: 1,678 MiB of each device"),
        ({"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": "auto"}, "that learn: 839 MiB"),
        ({"stage": 1, "reduce_bucket_size": 1e5}, "travel in pieces of 195 KiB"),
        ({"stage": 3, "reduce_bucket_size": "auto"}, None),
        ({"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": 1e6}, "keeps each matrix of 512 x 512"),
        ({"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": 0}, "norms and biases of 512 elements"),
    ],
)
def test_sizes_that_hurt(zero, words):
    config = {"zero_optimization": zero}
    found = configuration.check_sizes(config, 512, 60_000_000, 80_000_000, "bf16", 4)
    assert [f.verdict for f in found] == [HURTS if words else FINE] and (words or "fit") in found[0].found
    assert configuration.check_sizes({}, 512, 60_000_000, 80_000_000, "bf16", 4) == []


def test_shipped_sizes_fit_and_one_process_has_nobody_to_share_with():
    for stem in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"):
        config = launched(STRATEGY=stem).json
        assert [f.verdict for f in configuration.check_sizes(config, 32, 50_000, 50_000, "no", 2)] == [FINE]
        alone = configuration.check_sizes(config, 32, 50_000, 50_000, "no", 1)
        assert [f.verdict for f in alone] == [FINE if "_" in stem else HURTS]


def test_bytes_over_the_network():
    """P = 10, T = 4 parameters, 16 bits, 3 micro-batches."""
    sent = [configuration.network_bytes(stage, 4, 10, 2, 3) for stage in range(4)]
    assert sent == [4 * 2 * 4, 2 * (4 + 4), 2 * (3 * 4 + 4), 2 * 3 * (10 + 4)]

    def check(stage, accumulation, step_seconds, speed=1e9):
        return configuration.check_network(stage, 10**8, 10**8, "bf16", accumulation, 2, speed, step_seconds)

    (found,) = check(3, 1, 0.3)  # (P + T) x 2 bytes / 2 at 1 GB/s: 0.2 s
    assert found.verdict == HURTS and "200.0 MB" in found.found and "67%" in found.found and "zero2" in found.fix
    assert check(3, 1, 0.5)[0].verdict == FINE
    assert "zero1" in check(2, 4, 0.6)[0].fix and "faster link" in check(1, 4, 0.3)[0].fix
    assert check(3, 1, 0.3, speed=None) == []


def test_padding():
    assert configuration.check_padding(0.2, 8, 1, True).verdict == FINE
    found = configuration.check_padding(0.5, 8, 2, True)
    assert found.verdict == HURTS and "--per_device_train_batch_size 4 --gradient_accumulation_steps 4" in found.fix
    assert "--no_group_by_length" in configuration.check_padding(0.5, 8, 2, False).fix
    assert "more --gradient_accumulation_steps" in configuration.check_padding(0.5, 1, 1, True).fix


def test_the_compared_command_line_keeps_what_decides_the_numbers(tiny, rows16, tmp_path):
    words = (
        f"--model_name_or_path {tiny('t5')} --train_file {rows16} --validation_file {rows16} --output_dir {tmp_path} "
        "--freeze encoder embeddings --no_group_by_length --learning_rate 1e-3 --peft lora --lora_dropout 0.1 --eval_steps 1 "
        "--gradient_accumulation_steps 2 --source_prefix=--x"
    ).split()
    args = parse_arguments(words)
    assert parse_arguments(losses.words_of(args)) == args
    found = parse_arguments(losses.compared(args, tmp_path, [rows16], tmp_path / "out", 8))
    changed = {name for name in vars(args) if getattr(args, name) != getattr(found, name)}
    assert changed == {
        "model_name_or_path", "validation_file", "output_dir", "lora_dropout", "gradient_accumulation_steps", "max_steps",
        "logging_steps", "eval_steps", "save_steps", "resume_from_checkpoint", "overwrite_output_dir",
    }  # fmt: skip


def test_dropout_is_switched_off_in_a_copy(tiny, tmp_path):
    from transformers import AutoConfig

    assert losses.dropouts({"a_dropout": 0.1, "b": {"attn_pdrop": 0.2, "size": 3}, "label2id": {"drop": 1}, "c_dropout": 0.0}) == {
        "a_dropout": 0.0,
        "b": {"attn_pdrop": 0.0},
    }
    assert losses.merge({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 0}, "e": {"f": 0}}) == {
        "a": 1, "b": {"c": 0, "d": 3}, "e": {"f": 0},
    }  # fmt: skip
    for family in ("t5", "bart", "gpt2", "llama"):
        source = tiny(family, dropout=0.1)
        args = Arguments(model_name_or_path=str(source))
        copy = losses.model_without_dropout(args, AutoConfig.from_pretrained(source), tmp_path / family)
        before, after = AutoConfig.from_pretrained(source).to_dict(), AutoConfig.from_pretrained(copy).to_dict()
        assert losses.dropouts(before) and not losses.dropouts(after)
        assert before.keys() == after.keys() and {p.name for p in source.iterdir()} == {p.name for p in copy.iterdir()}
    still = Arguments(model_name_or_path=str(tiny("t5")))
    assert losses.model_without_dropout(still, AutoConfig.from_pretrained(tiny("t5")), tmp_path / "x") == str(tiny("t5"))


def test_rows_of_a_hub_data_set_are_its_training_rows(rows16, tmp_path):
    from datasets import Dataset

    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text(rows16.read_text() if split == "train" else rows16.read_text()[:50])
    assert losses.rows_of_hub(Arguments(train_file=[str(rows16)]), tmp_path) == [str(rows16)]
    lines = [json.loads(line) for line in rows16.read_text().splitlines()]
    (tmp_path / "hub" / "test.jsonl").write_text(json.dumps(lines[0]) + "\n")
    path = losses.rows_of_hub(Arguments(dataset_name=str(tmp_path / "hub")), tmp_path)
    assert Dataset.from_parquet(list(map(str, path)), cache_dir=str(tmp_path / "cache")).to_list() == lines


@pytest.mark.parametrize(
    "ours, plain, precision, verdict, words",
    [
        ([2.0, 1.0], [2.0, 1.000009], "no", FINE, "9.0e-06 apart"),
        ([2.0, 1.0], [2.0, 1.00002], "no", FAILS, "the numbers under zero2 differ"),
        ([2.0, 1.0], [2.0, 1.01], "bf16", FINE, "up to 2e-02 is rounding"),
        ([2.0, 1.0], [2.0, 1.03], "bf16", FAILS, "differ"),
        ([1e-5, 1e-5], [1e-5, 1.05e-5], "no", FINE, "5.0e-06 apart"),
        ([2.0, None], [2.0, 1.0], "bf16", FAILS, "not finite under zero2: 2 none"),
        ([2.0, 1.0], [None, 1.0], "no", FAILS, "not finite under one process"),
        ([None, 1.0], [2.0, 1.0], "fp16", FINE, "losses of 1 steps"),
        ([None, None], [2.0, 1.0], "fp16", HURTS, "all 2 steps overflowed"),
    ],
)
def test_losses_are_compared(ours, plain, precision, verdict, words):
    found = losses.compare_losses("zero2", ours, plain, precision)
    assert found.verdict == verdict and words in found.found and bool(found.fix) == (verdict != FINE)


def test_a_failed_run_says_why():
    refused = "...\ntrain.py: error: 1 bad rows in a.jsonl; mend them\ntrain.py: error: a.jsonl:3: no target\nW00 closing\n"
    assert losses.failed("steps", "zero2", 2, refused) == Finding(
        FAILS, "steps", "1 bad rows in a.jsonl: a.jsonl:3: no target", "mend them"
    )
    crashed = "x\n[rank1]: ValueError: shapes differ\ntorch.distributed.elastic.errors.ChildFailedError:\n=====\n"
    assert "zero2: exit code 1: [rank1]: ValueError: shapes differ" in losses.failed("steps", "zero2", 1, crashed).found
    full = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nChildFailedError:\n"
    found = losses.failed("steps", "zero2", 1, full)
    assert "CUDA out of memory" in found.found and "README" in found.fix
    killed = "launch.sh: the kernel's OOM killer ended a process while this run went on\n"
    assert "README" in losses.failed("steps", "zero2", 2, killed).fix
    assert launch.reason_of("first\n\nlast words\n") == "last words" and launch.reason_of("") == ""


def doctor(*words, **environment):
    """Return (exit code, findings, the standard error) of the tool in a process of its own."""
    command = [sys.executable, "-m", "zerotune", "doctor", "--json", "--size_mib", "4", *map(str, words)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    findings = [Finding(**content) for content in json.loads(done.stdout)] if done.stdout else []
    return done.returncode, findings, done.stderr


def flags(model, rows, folder):
    return f"--model_name_or_path {model} --train_file {rows} --output_dir {folder} --max_source_length 100".split()


@pytest.mark.launch
def test_a_launch_is_examined(tiny, rows16, tmp_path):
    """ZeRO-2 on two processes: a model with dropout, rows of unequal length; nothing but the rows' cache is left behind."""
    words = [*flags(tiny("t5", dropout=0.1), rows16, tmp_path / "out"), "--per_device_train_batch_size", "2"]
    code, findings, error = doctor(*words, "--learning_rate", "1e-3", STRATEGY="zero2", NUM_PROCESSES="2")
    assert findings, error
    verdicts = {found.check: found for found in findings}
    assert code == finding.exit_code(findings) < 2, findings
    for check in ("processes", "round trip", "configuration", "steps", "numbers", "sizes"):
        assert verdicts[check].verdict == FINE, verdicts[check]
    assert "2 ranks" in verdicts["round trip"].found and "without dropout" in verdicts["steps"].found
    assert "losses of 3 steps under zero2" in verdicts["numbers"].found
    assert {"versions", "CUDA", "compiler", "libaio", "NVMe", "shared memory", "limits", "network", "padding"} <= verdicts.keys()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_rows_that_stop_a_launch_are_found(tiny, rows16, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows16.read_text() + '{"source": "w1", "target": ""}\n')
    code, findings, _ = doctor(*flags(tiny("t5"), rows, tmp_path / "out"), STRATEGY="single")
    (failure,) = [found for found in findings if found.verdict == FAILS]
    assert code == 2 and failure.check == "steps" and f"{rows}:17: " in failure.found and "--skip_bad_rows" in failure.fix
    assert not any(found.check in ("round trip", "numbers") for found in findings)


@pytest.mark.launch
def test_mistakes_are_the_launchers_lines(tiny, rows16, tmp_path):
    code, findings, error = doctor(STRATEGY="zero9")
    assert code == 2 and not findings and "STRATEGY=zero9 is not known; allowed: cpu ddp" in error and "Traceback" not in error
    code, findings, _ = doctor(*flags(tiny("t5"), rows16, tmp_path / "out"), "--lr", "1", STRATEGY="single")
    (failure,) = [found for found in findings if found.verdict == FAILS]
    assert code == 2 and "--lr: no flag of train.py" in failure.found
    assert all(dataclasses.asdict(found).keys() == {"verdict", "check", "found", "fix"} for found in findings)
