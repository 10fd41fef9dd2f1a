"""The peak FLOP/s that MFU is a share of: data sheets of known GPUs, elsewhere the best of some matrix products.

python -m zerotune hardware bf16      prints the number for this machine
"""

import time

import torch

from zerotune.errors import UserError
from zerotune.plan.machine import known_gpu

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known_peak(device_name, mixed_precision):
    """Return the data sheet's FLOP/s of a GPU in a 16-bit precision, or None; dense, with float32 accumulation."""
    gpu = known_gpu(device_name)
    return gpu.flops if gpu and mixed_precision != "no" else None


def measured_peak(mixed_precision, seconds=2.0):
    """Return the best FLOP/s of square matrix products on the GPU or, with all cores, the CPU."""
    cuda, dtype = torch.cuda.is_available(), DTYPES[mixed_precision]
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device="cuda" if cuda else "cpu").to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_of_device(mixed_precision):
    """Return (FLOP/s, where the number is from)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    known = known_peak(name, mixed_precision)
    return (
        (known, f"data sheet of {name}") if known else (measured_peak(mixed_precision), f"matrix products measured on this {name}")
    )


def main(words):
    if len(words) != 1 or words[0] not in DTYPES:
        raise UserError(f"needs one of {', '.join(DTYPES)}, the --mixed_precision")
    print(*peak_of_device(words[0]))
    return 0
