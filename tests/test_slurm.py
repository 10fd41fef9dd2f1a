"""scripts/slurm.sh under a real Slurm: nodes of this machine; jobs that are late, preempted, lose a node, or cannot go on.

A controller and four slurmd with ports of their own, started for this file alone; munge's key and socket are in the same folder.
Two nodes are for the job that loses one, which the other jobs do not wait for.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, Result, check_engine, flags_of
from torture import ranks_of

from zerotune.run.checkpoint import list_checkpoints

DAEMONS = ("munged", "slurmctld", "slurmd")
# cred_expire is also what a requeued job waits. A preempted job has GraceTime to end in; Slurm does not requeue one that does.
CONFIGURATION = """
ClusterName=zerotune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=3
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4
NodeName=n4 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[4]} CPUs=4
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=kept Nodes=n[1-2] PriorityTier=1 PreemptMode=OFF
PartitionName=high Nodes=n[1-2] PriorityTier=2 PreemptMode=OFF
PartitionName=dying Nodes=n[3-4] PriorityTier=1 PreemptMode=OFF
"""


def lacks():
    """Return what this machine lacks for a Slurm of its own, '' if nothing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    if os.geteuid() != 0 or not all(shutil.which(name, path=path) for name in DAEMONS):
        return "a Slurm of its own needs root, and on Debian: apt install slurm-wlm munge"
    return ""


class Cluster:
    """The daemons, and what is asked of them."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= {"PATH": f"{os.environ['PATH']}:/usr/sbin", "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(5)]
            for free in sockets:
                free.bind(("127.0.0.1", 0))
            ports = [free.getsockname()[1] for free in sockets]
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def begin(self):
        folder, key = self.folder, self.folder / "munge.key"
        files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self.start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self.wait("munge's socket", lambda: (folder / "munge.socket").exists())
        self.start("slurmctld", "-D")
        for node in ("n1", "n2", "n3", "n4"):
            self.start("slurmd", "-D", "-N", node)
        self.wait("idle nodes", lambda: set(self.ask("sinfo", "-h", "-o", "%t", check=False).split()) == {"idle"})

    def start(self, name, *words):
        name_of_log = self.folder / f"{name}-{words[-1] if name == 'slurmd' else ''}.log"
        with open(name_of_log, "a") as log:
            process = subprocess.Popen([name, *words], env=self.environment, stdout=log, stderr=log)
        self.processes[words[-1] if name == "slurmd" else name] = process

    def ask(self, *words, check=True):
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, cwd=ROOT, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, words, **environment):
        """Submit a job; return (its number, its output's file). words: options, a script if not slurm.sh, its flags."""
        options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", "--time=60"]
        words = [str(word) for word in words]
        whole = any(word.startswith("--wrap") or word.endswith(".sh") for word in words)
        words = [
            "sbatch",
            "--parsable",
            *options,
            f"--output={self.folder}/job-%j.out",
            *(() if whole else ["scripts/slurm.sh"]),
            *words,
        ]
        done = subprocess.run(words, env=self.environment | environment, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout), self.folder / f"job-{int(done.stdout)}.out"

    def show(self, job):
        """Return {name: value} of what Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", str(job))))

    def wait(self, what, condition, timeout=300):
        end = time.monotonic() + timeout
        while not (found := condition()):
            logs = "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in self.folder.glob("*-*.*"))
            assert time.monotonic() < end, f"no {what} after {timeout} s\n{logs}"
            time.sleep(0.1)
        return found

    def at_requeue(self, log, act):
        """Call `act` once a job's output tells that it is requeued, whatever is done meanwhile; return the thread that does it."""

        def wait():
            self.wait("requeue", lambda: "; requeueing" in log.read_text())
            act()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def end_of(self, job):
        """Wait until a job has ended for good, and return what Slurm shows of it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(f"end of job {job}", lambda: (shown := self.show(job))["JobState"] in ends and shown)

    def kill(self, node):
        """Kill every process of a node, then start its slurmd again."""
        self.processes[node].kill()
        pids, parents = set(), set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if f"SLURMD_NODENAME={node}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    pids.add(int(entry.name))
                    parents.add(int((entry / "stat").read_text().rpartition(")")[2].split()[1]))
        assert pids
        pids |= {pid for pid in parents if "slurmstepd" in Path(f"/proc/{pid}/cmdline").read_text()}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[node].wait()
        self.start("slurmd", "-D", "-N", node)

    def stop(self):
        with contextlib.suppress(AssertionError):
            self.ask("scancel", "--user=root", check=False)
            self.wait("empty queue", lambda: not self.ask("squeue", "-h", check=False), timeout=30)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def cluster():
    if reason := lacks():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(
        prefix="slurm", ignore_cleanup_errors=True
    ) as folder:  # a socket's path may have 107 characters
        made = Cluster(Path(folder))
        try:
            made.begin()
            yield made
        finally:
            made.stop()


def options_of(tiny, rows16, **more):
    return {
        "model_name_or_path": tiny("llama", 0.1), "task": "causal", "train_file": rows16, "per_device_train_batch_size": 2,
        "max_steps": 40, "logging_steps": 1, "learning_rate": 1e-3, "save_steps": 0, "end_report": "false",
    } | more  # fmt: skip


def in_training(cluster, out):
    """Wait until a run has taken a step, and return {rank: process}."""
    records = out / "metrics.jsonl"
    cluster.wait("training", lambda: records.exists() and records.stat().st_size)
    return ranks_of(out)


def check_end(cluster, job, log, out, strategy, straight):
    """Assert that a job was requeued once and has ended as the straight run did, which ran on one machine."""
    shown, output = cluster.end_of(job), log.read_text()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1"), output[-6000:]
    assert output.count("; requeueing") == 1, output[-6000:]
    result = Result(0, output, out)
    check_engine(result.run["engine"], strategy, 2)
    mine, wanted = ({record["step"]: record["loss"] for record in run.records("loss")} for run in (result, straight))
    assert len(mine) == result.run["arguments"]["max_steps"] and mine == pytest.approx(wanted, rel=1e-5)
    weights, others = result.weights(), straight.weights()
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in others)
    return output


def check_one_save(output, out, number):
    """Assert that a signal has led to one save on both nodes, and nothing else."""
    assert output.count(f"stopped by signal {number:d} after step") == 1 and len(list_checkpoints(out)) == 1
    assert f"slurm.sh: exit code {128 + number}, newest checkpoint of step {list_checkpoints(out)[0][0]}" in output
    assert all(f"task {rank}: Exited with exit code {128 + number}" in output for rank in (0, 1)), output[-6000:]
    assert "DataLoader worker" not in output


@pytest.fixture(scope="module")
def dying(cluster, tiny, rows16, tmp_path_factory):
    """Return (job, log, output_dir, flags, thread, its findings) of a job whose second node has died; Slurm takes half a minute.

    Every process of the node is killed at once, its slurmd included, which comes back. The thread looks which of the first ranks
    are left when the job is requeued.
    """
    options, out, left = options_of(tiny, rows16, max_steps=100, save_steps=10), tmp_path_factory.mktemp("dying") / "out", []
    words = ["--partition=dying", "scripts/slurm.sh", *flags_of(options | {"output_dir": out})]
    job, log = cluster.submit(words, STRATEGY="ddp", END_SECONDS="10")
    ranks = in_training(cluster, out)
    cluster.wait("a checkpoint", lambda: list_checkpoints(out))
    cluster.kill("n4")
    look = cluster.at_requeue(log, lambda: left.extend({*ranks.values()} & {*ranks_of(out).values()}))
    return job, log, out, options, look, left


@pytest.mark.launch
def test_jobs_that_are_late_preempted_mistaken_broken_and_cancelled(dying, cluster, train, tiny, rows16, tmp_path):
    """Slurm looks at time limits every 30 seconds. Until then the late job's ranks are stopped, and the others have their ends.

    To a preempted job it sends SIGTERM, to each of its processes, data workers and launchers included, and does not requeue it.
    """
    options = {"late": options_of(tiny, rows16), "preempted": options_of(tiny, rows16, dataloader_num_workers=1)}
    strategies, number = {"late": "ddp", "preempted": "zero3"}, {"late": signal.SIGUSR1, "preempted": signal.SIGTERM}

    def submit(name, *words, **environment):
        flags = options.get(name, options["late"]) | {"output_dir": tmp_path / name}
        where = "--cpus-per-task=2" if name == "preempted" else "--partition=kept"
        environment = {"STRATEGY": strategies.get(name, "ddp")} | environment
        return cluster.submit([where, "scripts/slurm.sh", *flags_of(flags), *words], **environment)

    jobs = {"late": submit("late")}
    for pid in in_training(cluster, tmp_path / "late").values():
        os.kill(pid, signal.SIGSTOP)
    late, log = jobs["late"]
    cluster.ask("scontrol", "update", f"JobId={late}", "TimeLimit=2")  # 120 seconds before its end are over
    again = cluster.at_requeue(log, lambda: cluster.ask("scontrol", "update", f"JobId={late}", "TimeLimit=60"))
    jobs["preempted"] = submit("preempted")
    for pid in in_training(cluster, tmp_path / "preempted").values():
        os.kill(pid, signal.SIGSTOP)  # Slurm takes some seconds; with the SIGTERM it sends a SIGCONT
    cluster.submit(["--cpus-per-task=3", "--partition=high", "--wrap=true"])  # of 4, of which the other has two, the late job one
    broken, broken_log = submit("broken", PYTHON="false", MAX_TRIES="2")
    mistaken, mistaken_log = submit("mistaken", "--max_steps", "none")
    several = cluster.ask(
        "srun", "--partition=kept", "--ntasks=2", "--nodes=1", "bash", "-c", "bash scripts/launch.sh 2>&1 || echo code $?"
    )
    assert several.count("launch.sh: srun has started 2 of it a machine") == 2 and several.count("code 2") == 2
    (tmp_path / "wait").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "wait").chmod(0o755)
    cancelled, cancelled_log = submit("cancelled", PYTHON=str(tmp_path / "wait"))
    cluster.wait("a step of the job", lambda: f"{cancelled}.0 " in cluster.ask("squeue", "-hs", "-o", "%i %N"))
    cluster.ask("scancel", str(cancelled))

    for job, path, code, restarts, words in (
        (mistaken, mistaken_log, "2:0", "0", "argument --max_steps"),
        (broken, broken_log, "1:0", "1", "exit code 1, and MAX_TRIES=2 starts left no checkpoint after step 0; not requeued"),
        (cancelled, cancelled_log, "*", "0", "CANCELLED"),
    ):
        shown, output = cluster.end_of(job), path.read_text()
        assert shown["JobState"] == ("CANCELLED" if code == "*" else "FAILED") and shown["Restarts"] == restarts, output
        assert (code == "*" or shown["ExitCode"] == code) and words in output and "Traceback" not in output, (shown, output)

    straight = {name: train(strategies[name], name=f"straight-{name}", **options[name]) for name in jobs}
    again.join()
    for name, (job, log) in jobs.items():
        output = check_end(cluster, job, log, tmp_path / name, strategies[name], straight[name])
        check_one_save(output, tmp_path / name, number[name])


@pytest.mark.launch
def test_a_node_that_dies(dying, cluster, train):
    job, log, out, options, look, left = dying
    straight = train("ddp", name="straight", **options)
    look.join()
    assert not left
    output = check_end(cluster, job, log, out, "ddp", straight)
    here, ended = socket.gethostname(), "the connection to another rank has ended ("  # slurmd's names are not the machine's
    assert output.count(f"0: train.py: error: rank 0 ({here}): {ended}") == 1 and "[rank0]: Traceback" not in output
    assert f"0: launch.sh: the first to fail: rank 0, {here}: {ended}" in output
    assert "slurm.sh: start 2 on n[3-4], from step " in output and "slurm.sh: start 2 on n[3-4], from step 0\n" not in output


def test_flags_that_cannot_be_meant():
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT)}
    for flags, words in (
        (["--config", "flags.yaml"], "slurm.sh: no --output_dir on the command line; give it there, not in --config"),
        (["--output-dir=out", "--overwrite-output-dir"], "slurm.sh: --overwrite-output-dir would start over at each requeue"),
    ):
        done = subprocess.run(["bash", "scripts/slurm.sh", *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(words) and done.stderr.count("\n") == 1


def test_an_array_of_strategies(cluster, tiny, rows16, tmp_path):
    """The lines for it in slurm.sh, with the marks taken off, up to the launch."""
    text = (ROOT / "scripts" / "slurm.sh").read_text()
    edited = text.replace("# strategies=", "strategies=").replace('"runs/$STRATEGY"', f'"{tmp_path}/$STRATEGY"')
    assert edited.count(str(tmp_path)) == 1 and "\nstrategies=" in edited
    (tmp_path / "my_slurm.sh").write_text(edited)
    options = ["--array=0-2", "--nodes=1", f"--output={tmp_path}/%a.out"]
    job, _ = cluster.submit([*options, tmp_path / "my_slurm.sh", *flags_of(options_of(tiny, rows16))], DRY_RUN="1")
    cluster.wait("end of the array", lambda: not cluster.ask("squeue", "-h", "-j", str(job)))
    for number, strategy in enumerate(("ddp", "zero2", "zero3")):
        output = (tmp_path / f"{number}.out").read_text()
        assert f"accelerate_configs/{strategy}.yaml --num_processes 2 --main_process_port 2" in output, output
        assert f"--output_dir {tmp_path}/{strategy}" in output
