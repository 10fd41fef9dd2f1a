"""Several machines: what is wrong is a line on each of them, and two hosts with networks of their own train as one does."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_campaign import compare
from conftest import ROOT, check_engine, flags_of
from hosts import Hosts, lacks
from torture import losses_of, ranks_of

from zerotune.run import manifest
from zerotune.run.checkpoint import list_checkpoints

FLAGS = {"output_dir": "runs/never", "max_steps": 4, "task": "causal"}


def machine(rank, flags, port, wait="20", processes="2", **environment):
    """Start `python -m zerotune machines` as launch.sh does, on the loopback."""
    given = {"NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": str(port)}
    given |= {"STRATEGY": "ddp", "MACHINES_TIMEOUT": wait} | environment
    command = [sys.executable, "-m", "zerotune", "machines", "accelerate_configs/ddp.yaml", processes, *flags_of(flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **given}, **pipes)


def ends(*started, patience=60):
    """Return (exit code, output, errors without what is waited for) of each."""
    found = []
    for process in started:
        out, errors = process.communicate(timeout=patience)
        lines = [line for line in errors.splitlines() if "waiting for machine 0" not in line]
        found.append((process.returncode, out, "\n".join(lines)))
    return found


def has_guest(port):
    """Tell whether somebody is connected to a port of this machine's."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(own.endswith(f":{port:04X}") and state == "01" for _, own, _, state, *_ in lines[1:])


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def flags(tiny, rows16):
    return FLAGS | {"model_name_or_path": tiny("llama"), "train_file": rows16}


@pytest.mark.launch
def test_the_first_to_fail_is_told_on_machine_0(fails_on_rank_1, rows16, port, tmp_path):
    """A model's own code fails on rank 1. Machine 1's torchrun names it; machine 0, which has no part in it, prints its note."""
    flags = {"model_name_or_path": fails_on_rank_1, "train_file": rows16, "task": "causal", "trust_remote_code": True}
    flags |= {"max_steps": 6, "save_steps": 0, "output_dir": tmp_path / "run"}
    given = {**os.environ, "STRATEGY": "ddp", "NUM_MACHINES": "2", "NUM_PROCESSES": "2", "MAIN_PROCESS_IP": "127.0.0.1"}
    given |= {"MAIN_PROCESS_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command, pipes = (
        ["bash", "scripts/launch.sh", *flags_of(flags)],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    started = [subprocess.Popen(command, cwd=ROOT, env=given | {"MACHINE_RANK": str(rank)}, **pipes) for rank in (0, 1)]
    try:
        (code, _, errors), (other, _, others) = ends(*started, patience=300)
    finally:
        for process in started:
            process.terminate()  # launch.sh ends its ranks
    assert (code, other) == (1, 1), errors[-3000:] + others[-3000:]
    said = f"launch.sh: the first to fail: rank 1, {socket.gethostname()}: ValueError: rows of rank 1 are odd"
    assert errors.splitlines()[-1] == said and errors.count("rows of rank 1 are odd") == 1
    report = others[others.index("Root Cause (first observed failure):") :]
    assert re.search(r"rank +: 1 ", report) and "ValueError: rows of rank 1 are odd" in report, report
    assert "the first to fail" not in others
    note = min((tmp_path / "run" / "failures").iterdir())
    assert note.name.endswith("-rank1.txt")
    who, why, begin, *_, last = note.read_text().splitlines()
    assert (who, why) == (f"rank 1, {socket.gethostname()}", "ValueError: rows of rank 1 are odd")
    assert begin == "Traceback (most recent call last):" and last == "and that is bad"


def test_machines_that_are_alike_learn_their_interface(flags, port):
    late = machine(1, flags, port)
    assert "waiting for machine 0" in late.stderr.readline()  # so that it was there before machine 0
    for code, out, errors in ends(machine(0, flags, port), late):
        assert (code, errors) == (0, "")
        assert out == "GLOO_SOCKET_IFNAME=lo\nNCCL_SOCKET_IFNAME=lo\n"
    own = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth8"}  # a user's are left as they are
    assert [out for _, out, _ in ends(machine(0, flags, port, **own), machine(1, flags, port, **own))] == ["", ""]


def test_what_differs_is_a_line_on_each_machine(flags, port, tmp_path, rows16):
    other = tmp_path / "rows16.jsonl"
    other.write_text(rows16.read_text().replace("w1 ", "w2 ", 1))
    model = shutil.copytree(flags["model_name_or_path"], tmp_path / "model") / "model.safetensors"
    for change, processes, words in (
        ({"max_steps": 5}, "2", ["machine 1 (", "--max_steps is 5, on machine 0 4; make them the same"]),
        ({"train_file": other}, "2", ["--train_file is ", f"the content of {other} is ", "on machine 0 not there"]),
        ({"model_name_or_path": model.parent}, "2", [f"the content of {model} is ", "on machine 0 not there"]),
        ({}, "4", ["NUM_PROCESSES is 4, on machine 0 2; make them the same"]),
    ):
        found = ends(machine(0, flags, port), machine(1, flags | change, port, processes=processes))
        assert [code for code, _, _ in found] == [2, 2] and found[0][2] == found[1][2]
        assert all(word in found[0][2] for word in words) and "Traceback" not in found[0][2], found[0][2]


def test_who_is_missing_is_named(flags, port):
    """Machine 1 of three comes and goes again; what else may be missing is tried while the others wait for it."""
    three, others = {"NUM_MACHINES": "3", "processes": "3"}, []
    first = machine(0, flags, port, wait="6", **three)
    for rank in (1, 2):
        others.append(machine(rank, flags, port, wait="6", **three))
        while not has_guest(port):
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        if rank == 1:
            others[0].kill()
            others[0].communicate()

    one, elsewhere = free_port(), free_port()
    alone, other = ends(machine(0, flags, one, wait="2"), machine(1, flags, elsewhere, wait="2"))
    assert alone[0] == 2 and "machine 1 of 2 has not come within 2 s; the others end" in alone[2]
    assert other[0] == 2 and f"machine 0 has not come to 127.0.0.1:{elsewhere} within 2 s" in other[2]
    twice = ends(machine(0, flags, one, **three), machine(1, flags, one, **three), machine(1, flags, one, **three))
    assert [code for code, _, _ in twice] == [2, 2, 2]
    assert all("MACHINE_RANK=1 twice: " in errors for _, _, errors in twice)

    found = ends(first, others[1])
    assert all(code == 2 and "machine 1 of 3 has not come within 6 s" in errors for code, _, errors in found), found


def test_places_that_cannot_be(flags, port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        (found,) = ends(machine(0, flags, port))
    assert found[0] == 2 and f"MAIN_PROCESS_PORT={port}: Address already in use on machine 0" in found[2]
    for environment, words in (
        ({"MACHINE_RANK": "2"}, "MACHINE_RANK=2: must be 0 to 1"),
        ({"MACHINE_RANK": ""}, "MACHINE_RANK=: must be a whole number"),
        ({"MACHINES_TIMEOUT": "2.5"}, "MACHINES_TIMEOUT=2.5: must be a whole number of seconds"),
        ({"processes": "3"}, "NUM_PROCESSES=3 is no multiple of NUM_MACHINES=2"),
        ({"MAIN_PROCESS_IP": "no.such.host.invalid"}, "no address of this name is known here"),
        ({"MAIN_PROCESS_IP": "203.0.113.9"}, "MAIN_PROCESS_IP=203.0.113.9: "),
        ({"MAIN_PROCESS_IP": ""}, "MAIN_PROCESS_IP: give the address of machine 0"),
    ):
        (found,) = ends(machine(0, flags, port, **environment))
        assert found[0] == 2 and words in found[2] and "Traceback" not in found[2], found


def test_numbers_that_are_none(flags):
    for name, word in (("NUM_MACHINES", "two"), ("NUM_PROCESSES", "0")):
        command = ["bash", "scripts/launch.sh", *flags_of(flags)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, name: word}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, f"launch.sh: {name}={word} is not a whole number; give one\n")


STARTERS = {
    "srun": {"SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_NODEID": 1, "SLURM_JOB_ID": 70007},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 1},
    "Intel MPI": {"PMI_SIZE": 2, "PMI_RANK": 1, "MPI_LOCALNRANKS": 1},
    "PyTorchJob": {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 23456},
}


@pytest.mark.parametrize("starter", STARTERS)
def test_who_starts_it_tells_the_machines(flags, train, starter):
    """launch.sh under another launcher, up to the launch; several of it on a machine are refused, as is train.py itself."""
    given = {name: str(value) for name, value in STARTERS[starter].items()}
    given |= {"DRY_RUN": "1", "STRATEGY": "ddp", "PYTHON": sys.executable, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    given |= {"MAIN_PROCESS_IP": "127.0.0.1"} if "MPI" in starter else {}

    def launch(**changed):
        command = ["bash", "scripts/launch.sh", *flags_of(flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | given | changed, **pipes)

    port = {"srun": 20007, "PyTorchJob": 23456}.get(starter, 29500)
    words = f"--num_processes 2 --num_machines 2 --machine_rank 1 --main_process_ip 127.0.0.1 --main_process_port {port} "
    several = {"srun": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE", "Intel MPI": "MPI_LOCALNRANKS"}.get(
        starter
    )
    started = [launch(), launch(NUM_MACHINES="1"), launch(**({several: "4"} if several else {"LOCAL_RANK": "0"}))]
    (code, out, errors), own, refused = ends(*started)
    assert code == 0 and words in out, out + errors
    assert own[0] == 0 and "--num_machines" not in own[1]  # a user's number wins
    assert refused[0] == 2 and refused[2].count("\n") == 0 and " has started " in refused[2], refused
    if several:
        direct = train(None, check=False, environment=given, **flags)
        assert direct.code == 2 and "train.py knows torchrun's variables alone" in direct.output, direct.output
        assert direct.output.count("\n") == 1, direct.output


@pytest.fixture
def over_ssh(tmp_path, port):
    """Return a function (hosts, flags, **environment) that starts launch.sh with a HOSTFILE; `ssh` runs its words here."""
    (tmp_path / "ssh").write_text('#!/bin/bash\n[[ $1 == broken ]] && exit 3\nshift\nexec "$@"\n')
    (tmp_path / "ssh").chmod(0o755)

    def start(hosts, flags, **more):
        (tmp_path / "hosts").write_text(f"# machines\n{hosts}\n")
        given = {"HOSTFILE": str(tmp_path / "hosts"), "SSH": str(tmp_path / "ssh"), "STRATEGY": "ddp", "PYTHON": sys.executable}
        given |= {"MAIN_PROCESS_PORT": str(port), "OMP_NUM_THREADS": "1", "MACHINES_TIMEOUT": "60"} | more
        command = ["bash", "scripts/launch.sh", *flags_of(flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | given, **pipes)

    return start


@pytest.mark.launch
def test_over_ssh(over_ssh, tiny, rows16, tmp_path):
    """Two machines train; a signal to the one launch.sh reaches both, which save and end."""
    out = tmp_path / "it's out"  # to be quoted
    options = {"model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "output_dir": out, "logging_steps": 1}
    process = over_ssh("127.0.0.1\nme@two", options | {"max_steps": 100_000, "save_steps": 0, "end_report": "false"})
    records = out / "metrics.jsonl"
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143 and output.count("stopped by signal 15 after step") == 1, output[-3000:]
    assert len(list_checkpoints(out)) == 1 and ranks_of(out) == {}
    check_engine(json.loads((out / "run.json").read_text())["engine"], "ddp", 2)


def test_hosts_that_fail(over_ssh, flags, tmp_path):
    process = over_ssh("127.0.0.1\nbroken", flags, END_SECONDS="1")  # the first one waits for it
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert "launch.sh: machine 1 (broken) has ended with exit code 3; the others get 1 s\n" in output and "Traceback" not in output
    for hosts, words in (
        ("one", "needs two lines at least, each another machine"),
        ("one\none", "needs two lines at least, each another machine"),
        (
            "one slots=8\ntwo slots=8",
            "'one slots=8': give a name for ssh a line, and the processes of all machines as NUM_PROCESSES",
        ),
    ):
        process = over_ssh(hosts, flags)
        output = process.communicate(timeout=60)[0]
        assert (process.returncode, output) == (2, f"launch.sh: HOSTFILE={tmp_path / 'hosts'}: {words}\n")


@pytest.fixture(scope="module")
def hosts():
    if reason := lacks():
        pytest.skip(reason)
    made = Hosts(2)
    yield made
    made.remove()


def options_of(tiny, rows16, **more):
    return {
        "model_name_or_path": tiny("llama", 0.1), "task": "causal", "train_file": rows16, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "save_steps": 2,
        "end_report": "false",
    } | more  # fmt: skip


def same_losses(folder, straight, steps):
    """Assert that a run's losses are those of one on one machine; of a step that was taken twice the last one counts."""
    mine, others = losses_of(folder), losses_of(straight)
    assert [*mine] == list(range(1, steps + 1)) and mine == pytest.approx(others, rel=1e-5)


@pytest.mark.launch
def test_ranks_that_nobody_meets_end(flags, port):
    """A machine that was lost after the machines and their launchers had met."""
    place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MACHINES_TIMEOUT": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "train.py", *flags_of(flags)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **place}, capture_output=True, text=True, timeout=120)
    words = "rank 1: the ranks of all machines have not met within 1 s (MACHINES_TIMEOUT); ending\n"
    assert done.returncode == 1 and done.stderr.endswith(words), done.stderr


@pytest.mark.launch
def test_two_hosts_train_as_one_does(hosts, train, tiny, rows16, tmp_path):
    """Under ZeRO-2; under DDP below, under ZeRO-3 in test_slurm.py and cluster_campaign.py."""
    options = options_of(tiny, rows16)
    folder = tmp_path / "two"
    started = hosts.start("zero2", flags_of(options | {"output_dir": folder}), tmp_path / "logs")
    one = train("zero2", name="one", **options)
    ended = [host.wait() for host in started]
    assert [code for code, _ in ended] == [0, 0], ended
    run = json.loads((folder / "run.json").read_text())
    check_engine(run["engine"], "zero2", 2)
    same_losses(folder, one.folder, 4)


@pytest.mark.launch
def test_folders_that_are_not_shared_are_found_at_once(hosts, train, tiny, rows16, tmp_path):
    """First --output_dir; then a whole --cache_frozen, which is in the /tmp of host 0 alone."""
    folder, logs, cache = tmp_path / "out", tmp_path / "logs", tmp_path / "cache"
    folder.mkdir()
    options = options_of(tiny, rows16, freeze=["embeddings", "layers[:2]"], frozen_eval=True)
    blind = hosts.start("ddp", flags_of(options | {"output_dir": folder}), logs, first={1: f"mount -t tmpfs none {folder}"})
    train("ddp", name="one", cache_frozen=cache, **options)
    found = [blind[0].wait()]
    local = Path("/tmp", f"{hosts.names[0]}-cache")
    flags = flags_of(options | {"cache_frozen": local, "output_dir": tmp_path / "other"})
    first, second = hosts.start("ddp", flags, logs, first={0: f"cp -r {cache} {local}"})
    code, output = first.wait()
    told = rf"--cache_frozen {local}: ranks \[1\] do not see {next(cache.iterdir()).name} in it, which machine 0 has; give a folder"
    assert code == 2 and re.search(told, output), output[-3000:]
    assert (elsewhere := Path(f"/proc/{second.first}/root/tmp")).is_dir()  # as host 1 sees it
    assert not local.exists() and not (elsewhere / local.name).exists()
    second.kill()
    for code, output in (*found, blind[1].wait()):
        assert code == 2 and f"is not one folder for all machines: {hosts.names[1]} did not see" in output, output[-3000:]
    assert not list(folder.iterdir())


STANDS_BY = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
time.sleep(600)
"""


def stopped_where(started, folder, in_a_save):
    """Stop the ranks of all hosts within a save, or outside of one, so that a fault falls there; return their numbers.

    A save of so small a model takes some milliseconds: until it is found, they go on for as few at a time.
    """
    began = (folder / "run.json").stat().st_mtime  # a save that was cut off before leaves its folder

    def found():
        saving = False
        for path in folder.glob("checkpoint-*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                saving |= path.stat().st_mtime > began
        return saving == in_a_save

    def is_stopped(pid):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "TZX"

    end = time.monotonic() + 120
    while not (list_checkpoints(folder) and all(ranks := [host.rank() for host in started])):
        assert not any(host.ended() for host in started) and time.monotonic() < end, [host.output[-3000:] for host in started]
        time.sleep(0.01)
    while time.monotonic() < end and not (folder / "final").exists():
        for pid in reversed(ranks):
            os.kill(pid, signal.SIGSTOP)
        while not all(map(is_stopped, ranks)):
            time.sleep(0.001)
        if found():
            time.sleep(0.05)  # until all of their threads are stopped as well
            if found():
                return ranks
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    raise TimeoutError(f"no moment with in_a_save={in_a_save}: {[host.output[-3000:] for host in started]}")


@pytest.mark.launch
def test_cables_that_are_pulled(hosts, train, tiny, rows16, tmp_path):
    """One in a step, one in a save: each time all machines end with the reason, and the run goes on.

    A node that is killed is in test_slurm.py. A cable that is back soon ends nothing. Beside the ranks each host has another
    process of the same rank, command line and host name, as another run's would be: what a watchdog that went by these would end.
    """
    options = options_of(tiny, rows16, max_steps=60)
    one, folder, logs = None, tmp_path / "two", tmp_path / "logs"
    (tmp_path / "train.py").write_text(STANDS_BY)
    flags = flags_of(options | {"output_dir": folder, "hang_timeout_seconds": 6})

    def start():
        begin = time.time()
        by = f"RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 {sys.executable} {tmp_path}/train.py $LOG.by {shlex.join(flags)} &"
        started = hosts.start("ddp", flags, logs, first={0: by, 1: by.replace("RANK=0 W", "RANK=1 W")})
        while not (folder / "run.json").exists() or (folder / "run.json").stat().st_mtime < begin:
            assert not any(host.ended() for host in started), [host.output[-3000:] for host in started]
            time.sleep(0.02)
        return started

    def ended(started):
        """Wait for the end of the ranks, and of all that was started beside what stands by; return the outputs."""
        found = [host.wait(besides=1) for host in started]
        assert [code for code, _ in found] == [1, 1], found
        assert all(manifest.verify(path)[1] == [] for _, path in list_checkpoints(folder))  # a save is whole, or none
        assert list_checkpoints(folder) and not list(folder.glob("*.damaged"))
        return [output for _, output in found]

    for in_a_save in (False, True):
        started = start()
        if not in_a_save:
            hosts.pull(1)
            time.sleep(1)
            hosts.plug(1)  # soon enough: nobody ends
        ranks = stopped_where(started, folder, in_a_save)
        hosts.pull(1)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        one = one or train("ddp", name="one", **options)  # while nobody answers
        for number, output in enumerate(ended(started)):
            reasons = [line for line in output.splitlines() if f"no answer from {hosts.address(1 - number)} for " in line]
            # The rank's own line first; then torchrun's report, and on machine 0 launch.sh, may repeat it.
            assert reasons and reasons[0].startswith(f"rank {number}: "), output[-3000:]
            assert not any(f"rank {1 - number}" in line for line in reasons), output[-3000:]
        hosts.plug(1)

    last = [host.wait(besides=1) for host in start()]
    assert [code for code, _ in last] == [0, 0], last
    run = json.loads((folder / "run.json").read_text())
    check_engine(run["engine"], "ddp", 2)
    assert len(run["legs"]) == 3 and run["resumed_from"]
    same_losses(folder, one.folder, 60)
    assert compare(one.folder, folder) == ""
