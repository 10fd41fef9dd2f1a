"""Before a launch on several machines: which interface leads to machine 0, is everybody there, and is everything the same.

scripts/launch.sh calls it on each machine, with the accelerate YAML, NUM_PROCESSES and train.py's flags; machine 0 waits at
MAIN_PROCESS_PORT for the others, compares what they tell, and answers all. What is wrong is a line on every machine and exit code
2. It prints the environment that the ranks need, a NAME=VALUE a line. With DRY_RUN=1 nobody is waited for.

Without GLOO_SOCKET_IFNAME gloo takes the address that a host's own name has, on many machines the loopback, and hangs there.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import select
import socket
import struct
import sys
import time
from pathlib import Path

import yaml

from zerotune.engine.connections import machines_timeout
from zerotune.engine.deepspeed_config import read_deepspeed_config
from zerotune.errors import UserError
from zerotune.rows.sources import sources_of
from zerotune.run.arguments import parse_arguments
from zerotune.source import ROOT, source_hash

SIOCGIFADDR = 0x8915  # linux/sockios.h
CLOCKS = 60.0  # seconds by which clocks may differ
COMPARED = "MACHINES_COMPARED"  # 1: whoever starts this has done it, and its flags differ for a reason (the doctor)
SAMPLE = 1 << 20  # bytes of a file's beginning and end that are compared, beside its size


def main(words):
    if len(words) < 2 or not words[1].isdigit():
        raise UserError("needs ACCELERATE.yaml NUM_PROCESSES, then train.py's flags")
    environment = os.environ
    place = place_of(environment, int(words[1]))
    if environment.get("DRY_RUN", "0") == "1":  # perhaps on another machine: what is known is shown
        with contextlib.suppress(UserError):
            print_network(network(environment, place))
        return 0
    found = network(environment, place)
    if environment.get(COMPARED, "0") != "1":
        meet(place, facts_of(words[0], words[1], words[2:]), machines_timeout())
    print_network(found)
    return 0


def network(environment, place):
    """Return {name: interface} of what gloo and NCCL need to be told and the environment does not say yet."""
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in environment]
    return dict.fromkeys(names, interface_to(place)) if names else {}


def print_network(found):
    for name, interface in found.items():
        print(f"{name}={interface}")


def place_of(environment, num_processes):
    """Return (machines, rank, address, port) of an environment; UserError with everything that is wrong with it."""
    problems, numbers = [], {}
    for name, least, default in (("NUM_MACHINES", 2, None), ("MACHINE_RANK", 0, None), ("MAIN_PROCESS_PORT", 1, "29500")):
        word = environment.get(name) or default
        if word is None or not word.isdigit() or int(word) < least:
            problems.append(f"{name}={word or ''}: must be a whole number, at least {least}")
        numbers[name] = int(word) if word and word.isdigit() else 0
    machines, rank, port = numbers.values()
    if not problems and rank >= machines:
        problems.append(f"MACHINE_RANK={rank}: must be 0 to {machines - 1}, another on each of NUM_MACHINES={machines}")
    if not problems and num_processes % machines:
        problems.append(
            f"NUM_PROCESSES={num_processes} is no multiple of NUM_MACHINES={machines}; it counts the processes of all machines"
        )
    address = environment.get("MAIN_PROCESS_IP")
    if not address:
        problems.append("MAIN_PROCESS_IP: give the address of machine 0")
    else:
        try:
            number = socket.getaddrinfo(address, port or None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
            if number.startswith("127.") and number != address:
                problems.append(f"MAIN_PROCESS_IP={address}: means the loopback, {number}, here; give the number that others reach")
            address = number
        except OSError as error:
            problems.append(f"MAIN_PROCESS_IP={address}: no address of this name is known here ({error.strerror}); give a number")
    if problems:
        raise UserError(*problems)
    return machines, rank, address, port


def interface_to(place):
    """Return the name of the interface by which this machine reaches machine 0; UserError if there is none."""
    _, rank, address, port = place
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing: the kernel looks up the route
            own = probe.getsockname()[0]
        except OSError as error:
            raise UserError(f"MAIN_PROCESS_IP={address}: no way leads there from this machine ({error.strerror})") from None
    found = addresses()
    if rank == 0 and not is_own(address):
        raise UserError(
            f"MAIN_PROCESS_IP={address}: is no address of this machine, which has MACHINE_RANK=0; its own: "
            f"{', '.join(sorted(set(found.values())))} (behind another address set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME)"
        )
    wanted = address if rank == 0 else own
    names = [name for name, known in found.items() if known == wanted or (known.startswith("127.") and wanted.startswith("127."))]
    if not names:  # a second address of one of them
        raise UserError(
            f"{wanted}: is no interface's first address here; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its name"
        )
    return names[0]


def is_own(address):
    """Tell whether an address is one of this machine's: it can be bound."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def addresses():
    """Return {interface: its IPv4 address} of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def facts_of(path, num_processes, flags):
    """Return what has to be the same on every machine, as {what: value}, hashes where it is long."""
    facts = {"the repository's code": source_hash(), "Python": ".".join(platform.python_version_tuple()[:2])}
    for package in re.findall(r"^([\w.-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    facts |= {name: os.environ.get(name, "") for name in ("STRATEGY", "NUM_MACHINES")} | {"NUM_PROCESSES": num_processes}
    content = yaml.safe_load(Path(path).read_text()) or {}
    name = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    facts["the strategy's files"] = [content, read_deepspeed_config(name) if name else None]
    args = parse_arguments(flags)
    facts |= {f"--{name}": value for name, value in vars(args).items()}
    for name in ("train_file", "validation_file", "test_file"):
        for file in (file for source in sources_of(getattr(args, name), name) for file in source.files):
            facts[f"the content of {file}"] = sampled(file)
    for file in sorted(Path(args.model_name_or_path).glob("*")):  # of a folder; a hub's files have its own hashes
        if file.suffix in (".safetensors", ".bin", ".json"):
            facts[f"the content of {file}"] = sampled(file)
    return facts


def sampled(path):
    """Return a file's size and the hash of its beginning and end in words."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SAMPLE))
        digest.update(file.read())
    return f"{size:,} bytes, {digest.hexdigest()[:16]}"


def meet(place, facts, patience):
    """Meet the other machines at machine 0's port and compare; UserError, the same on all, with what is wrong."""
    machines, rank, address, port = place
    mine = {"rank": rank, "host": socket.gethostname(), "facts": facts}
    problems = wait_for_others(machines, port, mine, patience) if rank == 0 else ask(address, port, mine, patience)
    if problems:
        raise UserError(*problems)


def wait_for_others(machines, port, mine, patience):
    """Return what is wrong, told to all that have come; on machine 0."""
    until, come, problems = time.monotonic() + patience, {}, []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise UserError(f"MAIN_PROCESS_PORT={port}: {error.strerror} on machine 0; give another one on all machines") from None
        server.listen(machines)
        while len(come) < machines - 1 and not problems:
            readable, _, _ = select.select([server, *(connection for connection, _ in come.values())], [], [], 1.0)
            come = {rank: (c, told) for rank, (c, told) in come.items() if c not in readable}  # who says more has gone: nobody does
            if server in readable:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(10)
                try:
                    told = json.loads(connection.makefile().readline()) | {"at": time.time()}
                    rank = int(told["rank"])
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # somebody else's connection
                if rank in come or rank == 0:
                    other = come[rank][1] if rank in come else mine
                    problems = [f"MACHINE_RANK={rank} twice: {other['host']} and {told['host']}; give each machine its own"]
                come[rank if rank not in come else -1] = connection, told
            elif time.monotonic() > until:
                missing = ", ".join(str(rank) for rank in range(1, machines) if rank not in come)
                problems = [f"machine {missing} of {machines} has not come within {patience:g} s; the others end"]
        if not problems:
            problems = [line for rank in sorted(come) for line in differences(mine["facts"], come[rank][1])]
        for rank, (connection, _) in come.items():  # before anybody is told that all is well
            if not problems and not still_there(connection):
                problems = [f"machine {rank} of {machines} has gone again; the others end"]
        for connection, _ in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(problems).encode() + b"\n")
                connection.recv(1)  # until the other side has closed: then its end waits, not this port
    return problems


def still_there(connection):
    """Ask another machine whether it still waits."""
    try:
        connection.sendall(b'"still there?"\n')
        return connection.recv(1) == b"!"
    except OSError:
        return False


def ask(address, port, mine, patience):
    """Return what machine 0 says is wrong; on the other machines."""
    until, said, silent = time.monotonic() + patience, False, 0
    while True:
        try:
            with socket.create_connection((address, port), timeout=10) as connection:
                connection.sendall(json.dumps(mine | {"now": time.time()}).encode() + b"\n")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):  # six times: a minute, or the kernel's two hours
                    connection.setsockopt(socket.IPPROTO_TCP, option, 10)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
                connection.settimeout(None)  # machine 0 has the patience from here on
                for line in connection.makefile():
                    answer = json.loads(line)
                    if isinstance(answer, list):
                        return answer
                    connection.sendall(b"!")
        except (ConnectionError, ValueError):  # not there yet, or something else listens there
            pass
        except OSError as error:  # no way there, or nobody who answers at all: a wrong address, or a machine that is off
            silent += 1
            if silent == 3:
                raise UserError(
                    f"MAIN_PROCESS_IP={address}: does not answer ({error.strerror or error}); is it machine 0's?"
                ) from None
        if time.monotonic() > until:
            raise UserError(
                f"machine 0 has not come to {address}:{port} within {patience:g} s; is it started, and is this its address?"
            )
        if not said:
            print(f"launch.sh: waiting for machine 0 at {address}:{port}", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)


def differences(ours, told):
    """Return a line for each fact of another machine that is not as machine 0's."""
    who, theirs, lines = f"machine {told['rank']} ({told['host']})", told["facts"], []
    if abs(told["now"] - told["at"]) > CLOCKS:
        lines.append(f"{who}: its clock is {told['now'] - told['at']:+.0f} s off machine 0's; set both, with NTP for one")
    for what in sorted(ours.keys() | theirs.keys()):
        here, there = (json.loads(json.dumps(facts.get(what, "not there"))) for facts in (ours, theirs))
        if here != there:
            short = [
                str(value) if len(str(value)) < 80 else hashlib.sha256(str(value).encode()).hexdigest()[:16]
                for value in (there, here)
            ]
            lines.append(f"{who}: {what} is {short[0]}, on machine 0 {short[1]}; make them the same")
    return lines
