"""The machine that a run is planned for: known GPUs with their memory and speeds, and what this one has.

FLOP/s are dense, in 16 bits with float32 accumulation (data sheets, without sparsity). Memory is what torch reports as the device's
total, a little under what is sold. Links are bytes a second and direction: between the GPUs of a node (NVLink, else PCIe), and to
the host.
"""

import contextlib
import os
import re
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zerotune.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    name: str
    flops: float
    memory_gib: float
    link: float  # bytes/s to another GPU of the node
    host_link: float  # bytes/s to the host


# The words of a name stand in what the driver calls the device; those with more words first.
GPUS = [
    GPU("B200", 2250e12, 178.3, 900e9, 50e9),
    GPU("GH200", 989e12, 94.5, 450e9, 400e9),
    GPU("H200", 989e12, 139.7, 450e9, 50e9),
    GPU("H100 PCIe", 756e12, 79.1, 50e9, 50e9),
    GPU("H100", 989e12, 79.1, 450e9, 50e9),
    GPU("A100-40GB", 312e12, 39.3, 300e9, 25e9),
    GPU("A100", 312e12, 79.1, 300e9, 25e9),
    GPU("L40S", 362e12, 44.3, 25e9, 25e9),
    GPU("L4", 121e12, 22.0, 25e9, 25e9),
    GPU("A10G", 70e12, 21.9, 25e9, 25e9),
    GPU("A10", 125e12, 21.9, 25e9, 25e9),
    GPU("A30", 165e12, 23.4, 25e9, 25e9),
    GPU("RTX 4090", 165e12, 23.5, 25e9, 25e9),
    GPU("RTX 3090", 71e12, 23.5, 25e9, 25e9),
    GPU("V100-32GB", 125e12, 31.7, 150e9, 12e9),
    GPU("V100", 125e12, 15.7, 150e9, 12e9),
    GPU("T4", 65e12, 14.5, 12e9, 12e9),
]
UNKNOWN = GPU("unknown GPU", 100e12, 0.0, 25e9, 25e9)
BETWEEN_NODES = 25e9  # bytes/s of a node's network for each of its GPUs, 200 Gbit/s
NVME = 3e9  # bytes/s of a node's disk, read or written
HOST_MEMORY = 100e9  # bytes/s of a node's memory, at which DeepSpeed's AdamW steps

# Outside torch's allocator, as reported for CUDA 12 and 13: the context with its kernels, and NCCL's channels after a collective.
CONTEXT_BYTES = int(0.6 * GIB)
NCCL_BYTES = int(1.5 * GIB)
# Of a CPU process's memory, what tensors can use: the C library's heap has holes. Seen: 0.95 GiB resident for 0.72 GiB of tensors.
USABLE = 0.7


@dataclass(frozen=True)
class Machine:
    """GPUs and the memory of each, GPUs and memory of a node, and its disk; None: unknown, and so no limit."""

    gpu: GPU
    num_gpus: int
    gpus_per_node: int
    gpu_bytes: int | None
    host_bytes: int | None
    nvme_bytes: int | None

    @property
    def num_nodes(self):
        return self.num_gpus // self.gpus_per_node

    @property
    def link(self):
        """Return the bytes a second that a GPU exchanges with the others in a collective.

        Rings over all GPUs leave a node once, over all of its adapters together (NCCL's; docs/scale.md compares with measurements).
        """
        return self.gpu.link if self.num_nodes == 1 else min(self.gpu.link, BETWEEN_NODES * self.gpus_per_node)

    def __str__(self):
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        memory = f" of {self.gpu_bytes / GIB:.1f} GiB" if self.gpu_bytes else ""
        return f"{self.num_gpus} x {self.gpu.name}{memory}{nodes}"


def known_gpu(device_name):
    """Return the GPU of a driver's name for it, or None."""
    words = set(re.split(r"[ -]", device_name))
    return next((gpu for gpu in GPUS if words.issuperset(re.split(r"[ -]", gpu.name))), None)


def host_bytes():
    """Return the memory of this machine, or that of the container it is, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                word = file.read().strip()
        except OSError:
            continue
        if word.isdigit():
            total = min(total, int(word))
    return total


def free_host_bytes():
    """Return the memory that this process could still take: what the machine, its container and its own limit leave, in bytes."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            folder = Path("/sys/fs/cgroup")
            statistics = (folder / used).with_name("memory.stat").read_text().splitlines()
            reclaimable = next(int(line.split()[1]) for line in statistics if line.startswith(f"{cache} "))
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable)
    own = process_bytes()
    return max(0, free if own is None else min(free, own))


def given_back():
    """Return how much more memory this process has held before than now, in bytes: the next step takes it again."""
    with open("/proc/self/status") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith(("VmHWM", "VmRSS"))}
    return max(0, sizes["VmHWM"] - sizes["VmRSS"])


def process_bytes():
    """Return how much more memory this process may take by its own limit (ulimit -d), in bytes; None if there is no such limit."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    return max(0, limit - used)


def this_machine(num_gpus, num_nodes=None):
    """Return the Machine that this one is, as one of num_nodes alike (None: as many as its GPUs say).

    num_gpus: processes of the run. Without a GPU each process has a share of the memory.
    """
    memory = host_bytes()
    if not torch.cuda.is_available():
        cpu = replace(UNKNOWN, name="CPU process", flops=0.2e12, link=5e9, host_link=20e9)
        here = num_gpus // (num_nodes or 1)
        share, own = memory // here, process_bytes()
        share = int((share if own is None else min(share, own)) * USABLE)
        return Machine(cpu, num_gpus, here, share, memory, None)
    here = num_gpus // num_nodes if num_nodes else max(1, min(num_gpus, torch.cuda.device_count()))
    properties = torch.cuda.get_device_properties(0)
    gpu = known_gpu(properties.name) or replace(UNKNOWN, name=properties.name)
    return Machine(gpu, num_gpus, here if num_gpus % here == 0 else num_gpus, properties.total_memory, memory, None)


def planned_machine(num_gpus, gpus_per_node, gpu, gpu_memory_gib, host_memory_gib, nvme_gib):
    """Return the Machine of a planner's flags (None: this one's); UserError with everything that is wrong with them."""
    problems = [
        f"--{name} {value:g}: must be greater than 0"
        for name, value in (
            ("num_gpus", num_gpus),
            ("gpus_per_node", gpus_per_node),
            ("gpu_memory_gib", gpu_memory_gib),
            ("host_memory_gib", host_memory_gib),
            ("nvme_gib", nvme_gib),
        )
        if value is not None and value <= 0
    ]
    names = [known.name for known in GPUS]
    if gpu is not None and gpu not in names:
        problems.append(f"--gpu {gpu}: not known{nearest(gpu, names)}; give one of {', '.join(names)}, or --gpu_memory_gib")
    if problems:
        raise UserError(*problems)
    own = this_machine(num_gpus or max(1, torch.cuda.device_count()))
    per_node = gpus_per_node or (own.gpus_per_node if gpu is None and torch.cuda.is_available() else min(own.num_gpus, 8))
    if per_node > own.num_gpus:
        raise UserError(f"--gpus_per_node {per_node}: more than the {own.num_gpus} of --num_gpus; give at most as many")
    if own.num_gpus % per_node:
        raise UserError(f"--num_gpus {own.num_gpus}: no multiple of --gpus_per_node {per_node}; give whole nodes")
    chosen = own.gpu if gpu is None else next(known for known in GPUS if known.name == gpu)
    if gpu is None and gpu_memory_gib and not torch.cuda.is_available():
        chosen = replace(UNKNOWN, name="GPU")
    memory = gpu_memory_gib or (chosen.memory_gib if gpu else None)
    return Machine(
        chosen,
        own.num_gpus,
        per_node,
        int(memory * GIB) if memory else own.gpu_bytes,
        int(host_memory_gib * GIB) if host_memory_gib else own.host_bytes,
        int(nvme_gib * GIB) if nvme_gib else None,
    )
