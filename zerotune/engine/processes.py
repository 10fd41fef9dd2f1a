"""The processes of a run: that as many run as were launched, on the engine that was asked for, and which of them goes first."""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object

from zerotune.engine.connections import machines_timeout, own_addresses
from zerotune.engine.deepspeed_config import section
from zerotune.engine.ending import STARTED_AGAIN
from zerotune.engine.tensor_parallel import place
from zerotune.errors import UserError

AGENT_PORT = "ZEROTUNE_AGENT_PORT"  # of the launcher's store
# One process tokenises while the others wait; the libraries' 10 and 30 minutes would end a run on a large file. What ends a rank
# that stalls in training is the watchdog (stopping.py).
COLLECTIVE_TIMEOUT = timedelta(hours=6)


def meet_again():
    """Where ranks have taken others' places (ending.start_again), have them meet at a store of their own.

    The launcher's store, at which torchrun's ranks meet, still has the addresses of the processes that they replaced (torch 2.13,
    distributed/rendezvous.py, knows no prefix for a restart that it has not made itself). It tells the port of the new one.
    """
    count, own_store = os.environ.get(STARTED_AGAIN), "TORCHELASTIC_USE_AGENT_STORE"
    if not count or (os.environ.get(own_store) != "True" and AGENT_PORT not in os.environ):
        return
    os.environ.setdefault(AGENT_PORT, os.environ["MASTER_PORT"])
    address, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    agent = torch.distributed.TCPStore(address, int(os.environ[AGENT_PORT]), is_master=False, timeout=COLLECTIVE_TIMEOUT)
    key = f"zerotune/started_again/{count}"
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            agent.set(key, str(free.getsockname()[1]))
    os.environ |= {"MASTER_PORT": agent.get(key).decode(), own_store: "False"}


def meeting():
    """Return a timer, to be cancelled when the ranks have met; after MACHINES_TIMEOUT it ends this process.

    Of several machines alone. They and their launchers have met by then (scripts/launch.sh): who is missing has ended since.
    """
    patience = machines_timeout()

    def give_up():
        rank = os.environ.get("RANK", "0")
        words = f"the ranks of all machines have not met within {patience:g} s (MACHINES_TIMEOUT)"
        print(f"rank {rank}: {words}; ending", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    if int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        timer.start()
    return timer


def check_processes(accelerator, output_dir):
    """Raise RuntimeError if accelerate runs fewer processes than were launched: each would train alone on the same rows.

    UserError on every rank if the machines do not see one output_dir; a collective.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}")
    if len(neighbours()) + 1 < launched:  # called while all ranks are there
        check_shared(accelerator, output_dir)


def check_shared(accelerator, folder):
    """Raise UserError, on every rank, unless all machines see what the main process writes into a folder; a collective."""
    token = Path(folder) / broadcast_object_list([f".seen-by-all-{os.getpid()}-{time.time_ns()}"])[0]
    if accelerator.is_main_process:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    accelerator.wait_for_everyone()
    # NFS remembers for 60 seconds by default that a folder was not there.
    until = time.monotonic() + float(os.environ.get("MACHINES_SHARED_TIMEOUT", 60))
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.1)
    blind = gather_object([] if token.exists() else [socket.gethostname()])
    if accelerator.is_main_process:
        token.unlink()
    if blind:
        raise UserError(
            f"--output_dir {folder}: is not one folder for all machines: {', '.join(sorted(set(blind)))} did not see what "
            "machine 0 wrote there; give a folder on a file system that they share"
        )


def check_alike(what, value):
    """Raise UserError, on every rank, unless a value is the same on all of them; a collective."""
    values = gather_object([value])
    others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise UserError(f"{what}: on process {', '.join(others[:8])} others than on process 0; make the machines' files the same")


@functools.cache
def everyone():
    """Return (first rank of its machine, process number, addresses) of each rank; a collective at the first call.

    By the launcher's numbers, not by host name, which containers on two machines may share: the ranks of a node follow each other,
    so that its first one names it.
    """
    return gather_object([(first_here(), os.getpid(), own_addresses())])


def first_here():
    """Return the number of the first rank of this machine."""
    return int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))


def neighbours():
    """Return the process numbers of the other ranks of this machine; one launcher started them, so they see each other's."""
    return [pid for node, pid, _ in everyone() if node == first_here() and pid != os.getpid()]


def other_addresses():
    """Return the addresses of the run's other machines."""
    here = {address for node, _, addresses in everyone() if node == first_here() for address in addresses}
    return {address for _, _, addresses in everyone() for address in addresses} - here


def signal_to(pid, number):
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def describe(accelerator):
    """Return the processes and their device in words."""
    size = accelerator.num_processes // place(accelerator)[0]
    groups = f" in groups of {size} that share rows" if size > 1 else ""
    return f"{accelerator.num_processes} process(es){groups}, {accelerator.device.type}"


def unwrap(model):
    """Return the model inside DDP's or DeepSpeed's wrapper, or the model; accelerate's own way imports DeepSpeed to ask for it."""
    wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"
    return model.module if wrapped else model


def engine_facts(accelerator, strategy, model, optimizer):
    """Return what really runs, for run.json; raise RuntimeError where it is not what the launcher asked for."""
    is_deepspeed = type(model).__name__ == "DeepSpeedEngine"
    if is_deepspeed != (strategy.config is not None):
        raise RuntimeError(f"{strategy.name} was asked for, but the engine is {type(model).__name__}")
    inner = optimizer.optimizer
    facts = {
        "class": type(model).__name__,
        "optimizer": type(inner).__name__,
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device.type),
        "backend": None if accelerator.num_processes == 1 and not is_deepspeed else torch.distributed.get_backend(),
    }
    if is_deepspeed:
        stage = model.zero_optimization_stage()
        if stage != strategy.config["zero_optimization"]["stage"]:
            raise RuntimeError(f"{strategy.name} asks for stage {strategy.config['zero_optimization']['stage']}, runs {stage}")
        facts |= {
            "zero_stage": stage,
            "offload_optimizer": section(strategy.config, "zero_optimization.offload_optimizer").get("device", "none"),
            "offload_param": section(strategy.config, "zero_optimization.offload_param").get("device", "none"),
            "base_optimizer": type(model.basic_optimizer).__name__,
        }
        if model.autotp_size() > 1:
            cut = [p for p in model.module.parameters() if getattr(p, "tensor_model_parallel", False)]
            facts |= {"tensor_parallel": model.autotp_size(), "parameters_cut": len(cut)}
        if model.sequence_parallel_size > 1:
            facts["sequence_parallel"] = model.sequence_parallel_size
        groups = {getattr(p, "ds_secondary_tensor_num_of_groups", 1) for p in model.module.parameters()}
        if groups != {1}:  # hpZ's, as each parameter has them
            facts["secondary_shards"] = [accelerator.num_processes // count for count in sorted(groups)]
    return facts


def ranks_where(condition, accelerator):
    """Return the numbers of the processes on which a condition holds, on all of them; a collective."""
    return gather_object([accelerator.process_index] if condition else [])


def first_on_each_node(accelerator, function):
    """Call `function` on one process of each node, then on the others, so that these find its cache; all raise its UserError."""
    error = result = None
    with accelerator.local_main_process_first():
        try:
            result = function()
        except UserError as caught:  # raised after the barrier in the context's end, or the others would wait there for ever
            error = caught
    if error is not None:
        raise error
    return result
