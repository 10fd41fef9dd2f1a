"""Several machines: what is wrong is a line on each of them, and two hosts with networks of their own train as one does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, check_engine, flags_of
from torture import ranks_of

from zerotune.run.checkpoint import list_checkpoints

FLAGS = {"output_dir": "runs/never", "max_steps": 4, "task": "causal"}


def lacks():
    """Return what this machine lacks for hosts in network namespaces, '' if nothing."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "hosts in network namespaces need root and iproute2"
    made = subprocess.run(["ip", "netns", "add", "zerotune-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "zerotune-try"], capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


def machine(rank, flags, port, wait="20", processes="2", **environment):
    """Start `python -m zerotune machines` as launch.sh does, on the loopback."""
    given = {"NUM_MACHINES": "2", "MACHINE_RANK": str(rank), "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": str(port)}
    given |= {"STRATEGY": "ddp", "MACHINES_TIMEOUT": wait} | environment
    command = [sys.executable, "-m", "zerotune", "machines", "accelerate_configs/ddp.yaml", processes, *flags_of(flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **given}, **pipes)


def ends(*started):
    """Return (exit code, output, errors without what is waited for) of each."""
    found = []
    for process in started:
        out, errors = process.communicate(timeout=60)
        lines = [line for line in errors.splitlines() if "waiting for machine 0" not in line]
        found.append((process.returncode, out, "\n".join(lines)))
    return found


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def flags(tiny, rows16):
    return FLAGS | {"model_name_or_path": tiny("llama"), "train_file": rows16}


def test_machines_that_are_alike_learn_their_interface(flags, port):
    late = machine(1, flags, port)  # before machine 0
    time.sleep(2)
    for code, out, errors in ends(machine(0, flags, port), late):
        assert (code, errors) == (0, "")
        assert out == "GLOO_SOCKET_IFNAME=lo\nNCCL_SOCKET_IFNAME=lo\n"
    own = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth8"}  # a user's are left as they are
    assert [out for _, out, _ in ends(machine(0, flags, port, **own), machine(1, flags, port, **own))] == ["", ""]


def test_what_differs_is_a_line_on_each_machine(flags, port, tmp_path, rows16):
    other = tmp_path / "rows16.jsonl"
    other.write_text(rows16.read_text().replace("w1 ", "w2 ", 1))
    for change, processes, words in (
        ({"max_steps": 5}, "2", ["machine 1 (", "--max_steps is 5, on machine 0 4; make them the same"]),
        ({"train_file": other}, "2", ["--train_file is ", f"the content of {other} is ", "on machine 0 not there"]),
        ({}, "4", ["NUM_PROCESSES is 4, on machine 0 2; make them the same"]),
    ):
        found = ends(machine(0, flags, port), machine(1, flags | change, port, processes=processes))
        assert [code for code, _, _ in found] == [2, 2] and found[0][2] == found[1][2]
        assert all(word in found[0][2] for word in words) and "Traceback" not in found[0][2], found[0][2]


def test_who_is_missing_is_named(flags, port):
    begin = time.monotonic()
    (alone,) = ends(machine(0, flags, port, wait="2"))
    assert alone[0] == 2 and "machine 1 of 2 has not come within 2 s; the others end" in alone[2]
    (alone,) = ends(machine(1, flags, port, wait="2"))
    assert alone[0] == 2 and f"machine 0 has not come to 127.0.0.1:{port} within 2 s" in alone[2]
    assert time.monotonic() - begin < 30

    three = {"NUM_MACHINES": "3", "processes": "3"}
    waiting = machine(1, flags, port, wait="12", **three)
    first = machine(0, flags, port, wait="12", **three)
    time.sleep(5)
    waiting.kill()  # after it has come
    found = ends(first, machine(2, flags, port, wait="12", **three))
    assert all(code == 2 and "machine 1 of 3 has not come within 12 s" in errors for code, _, errors in found), found
    waiting.communicate()
    twice = ends(machine(0, flags, port, **three), machine(1, flags, port, **three), machine(1, flags, port, **three))
    assert [code for code, _, _ in twice] == [2, 2, 2]
    assert all("MACHINE_RANK=1 twice: " in errors for _, _, errors in twice)


def test_places_that_cannot_be(flags, port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        (found,) = ends(machine(0, flags, port))
    assert found[0] == 2 and f"MAIN_PROCESS_PORT={port}: Address already in use on machine 0" in found[2]
    for environment, words in (
        ({"MACHINE_RANK": "2"}, "MACHINE_RANK=2: must be 0 to 1"),
        ({"MACHINE_RANK": ""}, "MACHINE_RANK=: must be a whole number"),
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
def test_who_starts_it_tells_the_machines(flags, starter):
    """launch.sh under another launcher, up to the launch; several of it on a machine are refused, as is train.py itself."""
    given = {name: str(value) for name, value in STARTERS[starter].items()}
    given |= {"DRY_RUN": "1", "STRATEGY": "ddp", "PYTHON": sys.executable, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    given |= {"MAIN_PROCESS_IP": "127.0.0.1"} if "MPI" in starter else {}

    def launch(*command, **changed):
        command = command or ("bash", "scripts/launch.sh")
        environment = os.environ | given | changed
        return subprocess.run([*command, *flags_of(flags)], cwd=ROOT, env=environment, capture_output=True, text=True)

    port = {"srun": 20007, "PyTorchJob": 23456}.get(starter, 29500)
    words = f"--num_processes 2 --num_machines 2 --machine_rank 1 --main_process_ip 127.0.0.1 --main_process_port {port} "
    done = launch()
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    own = launch(NUM_MACHINES="1")  # a user's number wins
    assert own.returncode == 0 and "--num_machines" not in own.stdout
    several = {"srun": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE", "Intel MPI": "MPI_LOCALNRANKS"}.get(
        starter
    )
    refused = launch(**({several: "4"} if several else {"LOCAL_RANK": "0"}))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and " has started " in refused.stderr, refused.stderr
    if several:
        direct = launch(sys.executable, "train.py")
        assert direct.returncode == 2 and "train.py knows torchrun's variables alone" in direct.stderr, direct.stderr
        assert direct.stderr.count("\n") == 1


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


# Hosts of their own: network, host name and /etc/hosts, in which the name means the loopback, as Debian writes it.
NODES = {"zerotune0": "10.77.0.1", "zerotune1": "10.77.0.2"}


@pytest.fixture(scope="module")
def nodes():
    if reason := lacks():
        pytest.skip(reason)

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for number, name in enumerate(NODES):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            os.makedirs(f"/etc/netns/{name}", exist_ok=True)
            with open(f"/etc/netns/{name}/hosts", "w") as file:
                file.write(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            if number:
                ip("link", "add", "cable1", "netns", name, "type", "veth", "peer", "name", "cable0", "netns", "zerotune0")
        for number, (name, address) in enumerate(NODES.items()):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
        yield [*NODES]
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def on_nodes(nodes, strategy, flags, before=("", "")):
    """Run launch.sh on both nodes; return [(exit code, output)]. before: a shell command on each."""
    started = []
    for rank, name in enumerate(nodes):
        given = {"STRATEGY": strategy, "NUM_MACHINES": "2", "NUM_PROCESSES": "2", "MACHINE_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        given |= {"MAIN_PROCESS_IP": NODES["zerotune0"], "MACHINES_TIMEOUT": "60", "PYTHON": sys.executable}
        given["MACHINES_SHARED_TIMEOUT"] = "2"
        words = f'hostname {name}; {before[rank] or ":"}; exec bash scripts/launch.sh "$@"'
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "bash", "-c", words, "node", *flags_of(flags)]
        environment = {key: value for key, value in os.environ.items() if not key.endswith("_SOCKET_IFNAME")} | given
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return [(process.communicate(timeout=300)[0], process.returncode)[::-1] for process in started]


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_hosts_train_as_one_does(nodes, train, tiny, rows16, tmp_path, strategy):
    options = {
        "model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "save_steps": 2,
        "end_report": "false",
    }  # fmt: skip
    one = train(strategy, name="one", **options)
    folder = tmp_path / "two"
    ended = on_nodes(nodes, strategy, options | {"output_dir": folder})
    assert [code for code, _ in ended] == [0, 0], ended
    run = json.loads((folder / "run.json").read_text())
    check_engine(run["engine"], strategy, 2)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4 and losses == pytest.approx([record["loss"] for record in one.records("loss")], rel=1e-5)


@pytest.mark.launch
def test_a_folder_that_is_not_shared_is_found_at_once(nodes, tiny, rows16, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    options = {"model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "output_dir": folder, "max_steps": 4}
    ended = on_nodes(nodes, "ddp", options, before=("", f"mount -t tmpfs none {folder}"))
    for code, output in ended:
        assert code == 2 and "is not one folder for all machines: zerotune1 did not see" in output, output[-3000:]
    assert not list(folder.iterdir())
