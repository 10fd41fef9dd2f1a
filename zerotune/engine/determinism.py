"""The same numbers from the same run: random numbers that follow from the place in it, and on a GPU which kernels may be used.

On a CPU train.py's runs are bitwise repeatable as they are. On a GPU some kernels add in an order that differs from run to run
(atomic additions, the backward of attention, cuBLAS with several streams), and a resumed run then ends near the straight one only.
"""

import os
import random

import numpy as np
import torch
import torch.utils.deterministic


def set_deterministic(wanted):
    """If wanted, have torch use kernels that give the same bits each time, and raise RuntimeError where an operation has none.

    Before anything runs on the GPU: cuBLAS reads its workspace's setting when it is first used (docs.nvidia.com, cuBLAS,
    "Results reproducibility"). torch's attention kernels switch to their deterministic backward by the same flag.
    """
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch would write NaN over each buffer before its first use
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention, where torch prefers it, does not promise the same bits twice


def set_tf32(wanted):
    """Have matrix products of float32 on a GPU round their factors to TF32's 10 bits; without it nothing is touched."""
    if wanted:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def seed_pass(seed, step, micro_batch, rank):
    """Seed all generators for one forward and backward pass, so that its dropout is a function of these four numbers alone."""
    mixed = np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(2)
    number = int(mixed[0]) << 32 | int(mixed[1])
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # torch.manual_seed would note a stack trace for each kind of device that is not there
        torch.cuda.manual_seed(number)
    random.seed(int(mixed[0]))
    np.random.seed(mixed[1])
