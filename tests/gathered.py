"""train.py that says, step by step, how many elements of weights ZeRO-3 has gathered, by the number of ranks they came from."""

import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zerotune.run.monitor import Monitor  # noqa: E402

elements, gather, step = Counter(), partition_parameters._dist_allgather_fn, Monitor.step


def counted(shard, whole, group=None, *rest, **options):
    elements[dist.get_world_size(group)] += whole.numel()
    return gather(shard, whole, group, *rest, **options)


def told(self, number, *rest):
    if os.environ["RANK"] == "0":
        print("gathered", json.dumps(elements), flush=True)
    elements.clear()
    return step(self, number, *rest)


partition_parameters._dist_allgather_fn, Monitor.step = counted, told
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
