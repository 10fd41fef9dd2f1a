"""A round trip between all ranks: that they reach each other, how fast, that a sum is right, and whether the machines agree."""

import json
import os
import socket
import sys
from pathlib import Path

from zerotune.errors import UserError
from zerotune.tools.doctor.finding import fails, fine, hurts
from zerotune.tools.doctor.launch import reason_of, run_to_end, stop
from zerotune.tools.machines import network

SIZE = 64 * 2**20  # bytes; large enough that the link and not the latency is measured
TIMEOUT_SECONDS = 60  # for a rank's part; the start of Python and torch, on a busy machine, comes on top
START_SECONDS = 60
SLOW = 1.25e9  # bytes/s between machines: 10 Gbit/s, at which the bf16 gradients of a billion parameters take over 3 s
SLOW_HERE = 3e9  # between GPUs of one machine: less than half of eight lanes of PCIe 3
MAX_CLOCK_SECONDS = 1.0


def check_places(processes, machines, gpus):
    """Return the finding on how the processes are spread; gpus: of this machine."""
    here = processes // machines
    text = f"{processes} process(es) on {machines} machine(s), {gpus or 'no'} GPU(s) on this one"
    if processes % machines:
        fix = f"NUM_PROCESSES={machines * max(1, here)}, or another NUM_MACHINES"
        return fails("processes", f"NUM_PROCESSES={processes} is no multiple of NUM_MACHINES={machines}", fix)
    if here > gpus > 0:
        return fails("processes", f"{text}: NCCL refuses two ranks on one GPU", f"NUM_PROCESSES={gpus * machines}")
    return fine("processes", text + (f", of which {gpus - here} stay idle" if gpus > here else ""))


def bandwidth(size, ranks, seconds):
    """Return the bytes/s that each rank's link carries in an all-reduce of `size` bytes: 2 (N-1)/N x size / seconds."""
    return 2 * (ranks - 1) / ranks * size / seconds


def interface_fix(backend, machines):
    name = f"{backend.upper()}_SOCKET_IFNAME"
    if machines == 1:
        return f"name the interface that carries it: export {name}=lo"
    return (
        f"on each machine name the interface that joins them: export {name}=eth0 (`ip addr` lists them); MAIN_PROCESS_IP must be "
        "machine 0's address on it, and the ports must be open between them; start the doctor on all machines within a minute"
    )


def check_round_trip(answers, size, backend, machines):
    """Return the finding on the ranks' answers (see worker.py)."""
    wrong = [rank for rank, answer in enumerate(answers) if not answer["right"]]
    if wrong:
        fix = "export NCCL_P2P_DISABLE=1 and try again; if that mends it, switch ACS or the IOMMU off, or replace the link"
        return fails("round trip", f"ranks {', '.join(map(str, wrong))} got a wrong sum over {backend}", fix)
    speed = bandwidth(size, len(answers), max(answer["seconds"] for answer in answers))
    found = (
        f"{len(answers)} ranks sum {size / 2**20:.0f} MiB over {backend} at {speed / 1e9:.2f} GB/s (2 (N-1)/N x bytes / seconds)"
    )
    slow = 0 if backend == "gloo" else SLOW if machines > 1 else SLOW_HERE
    if speed >= slow:
        return fine("round trip", found)
    fix = "`nvidia-smi topo -m` shows how the GPUs are joined, NCCL_DEBUG=INFO which way NCCL takes"
    return hurts(
        "round trip", f"{found}, under {slow / 1e9:g} GB/s", f"{interface_fix(backend, machines)}; {fix}" if machines > 1 else fix
    )


def check_clocks(clocks):
    """Return the finding on machines' clocks, {host: seconds at one barrier}."""
    spread = max(clocks.values()) - min(clocks.values())
    if spread <= MAX_CLOCK_SECONDS:
        return fine("clocks", f"{len(clocks)} machines agree within {spread:.2f} s")
    ahead, behind = max(clocks, key=clocks.get), min(clocks, key=clocks.get)
    found = f"{ahead} is {spread:.1f} s ahead of {behind}: logs do not line up, and ages of files on a shared disk are wrong"
    return hurts("clocks", found, "run an NTP client on each machine (Debian: apt install chrony)")


def check_same_versions(versions):
    """Return findings on machines' packages, {host: {name: version}}."""
    findings = []
    for name in sorted(set().union(*versions.values())):
        found = {host: packages.get(name, "none") for host, packages in versions.items()}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{version} on {host}" for host, version in found.items())
            findings.append(fails("versions", f"machines differ in {name}: {text}", "install the same requirements.txt on each"))
    return findings or [fine("versions", f"{len(versions)} machines have the same")]


def measure(launch, environment, folder, size=SIZE, timeout=TIMEOUT_SECONDS, start=START_SECONDS):
    """Start the ranks and return (findings, bytes/s or None if they did not answer); folder: for their files."""
    backend, result, log = (
        "nccl" if launch.gpus else "gloo",
        Path(folder) / f"ranks-{launch.rank}.json",
        Path(folder) / f"ranks-{launch.rank}.log",
    )
    port = launch.port + 1  # another than the launch's, which follows on another machine before this one's agent is gone
    if launch.machines == 1:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", launch.machines, "--node_rank", launch.rank]
    command += ["--nproc_per_node", launch.here, "--master_addr", launch.address, "--master_port", port]
    command += ["--module", "zerotune.tools.doctor.worker", backend, size, result, timeout]
    if launch.machines > 1:  # as scripts/launch.sh does
        try:
            environment = network(environment, (launch.machines, launch.rank, launch.address, launch.port)) | environment
        except UserError as error:
            return [fails("round trip", error.problems[0], interface_fix(backend, launch.machines))], None
    environment = {"OMP_NUM_THREADS": "1", **environment, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    code = run_to_end(command, environment, log, timeout + start, stop)
    if not result.exists():
        said = log.read_text(errors="replace")
        silent = code == "timeout" or "SIGALRM" in said
        why = f"no answer within {timeout} s" if silent else reason_of(said) or f"exit code {code}"
        text = f"{launch.processes} ranks over {backend}, first at {launch.address}: {why}"
        return [fails("round trip", text, interface_fix(backend, launch.machines))], None
    answers = json.loads(result.read_text())
    os.unlink(result)
    findings = [check_round_trip(answers, size, backend, launch.machines)]
    by_host = {answer["host"]: answer for answer in answers}
    if len(by_host) > 1:
        findings.append(check_clocks({host: answer["clock"] for host, answer in by_host.items()}))
        findings += check_same_versions({host: answer["versions"] for host, answer in by_host.items()})
    return findings, bandwidth(size, len(answers), max(answer["seconds"] for answer in answers))
