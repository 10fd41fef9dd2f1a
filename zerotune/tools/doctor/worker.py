"""One rank of the doctor's round trip, started by torch's launcher with BACKEND BYTES RESULT SECONDS.

All ranks sum BYTES of float32 a few times and tell each other what they measured; the first of each machine writes it to RESULT, a
JSON list with an object for each rank: host, seconds of one sum (median), whether each sum was right, its clock at a barrier,
versions. After SECONDS it ends by SIGALRM.
"""

import importlib.metadata
import json
import os
import signal
import socket
import statistics
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 5
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")


def main(backend, size, result, seconds):
    signal.alarm(seconds)  # whatever it hangs in
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensor, times, right = torch.empty(size // 4, device=device), [], True
    for repeat in range(REPEATS + 1):
        tensor.fill_(rank + 1)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        if backend == "nccl":
            torch.cuda.synchronize()
        if repeat:  # the first sets up the channels
            times.append(time.perf_counter() - begin)
        right = right and bool((tensor == ranks * (ranks + 1) // 2).all())
    dist.barrier()
    mine = {"host": socket.gethostname(), "seconds": statistics.median(times), "right": right, "clock": time.time(), "versions": {}}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            mine["versions"][name] = importlib.metadata.version(name)
    everyone = [None] * ranks
    dist.all_gather_object(everyone, mine)
    if local_rank == 0:
        with open(f"{result}.tmp", "w") as file:
            json.dump(everyone, file)
        os.replace(f"{result}.tmp", result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
