"""A run of train.py that counts, on each rank, what it asks of the others and of the file system: the processes of ranks.py.

COUNTS=FOLDER in the environment; each rank leaves FOLDER/RANK.json: for the start, each step, each save and evaluation, and the end
how many collectives of each kind it took part in, how many objects it sent in how many bytes, how often it listed a folder, and
seconds of its own thread.
"""

import glob
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from zerotune.run.arguments import parse_arguments  # noqa: E402


class Collectives(TorchDispatchMode):
    """Counts what this rank takes part in."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            self.counts[name] += 1
        return function(*arguments, **(options or {}))


def main(words):
    folder = Path(os.environ["COUNTS"])
    counts, parts, begin = Counter(), [], [time.thread_time()]

    def listing(owner, name):
        inner = getattr(owner, name)

        def call(*arguments, **more):
            counts["listings"] += 1
            return inner(*arguments, **more)

        setattr(owner, name, call)

    def note(kind):
        now = time.thread_time()
        parts.append({"part": kind, "seconds": now - begin[0], **counts})
        counts.clear()
        begin[0] = time.thread_time()

    def around(owner, name, before, after):
        inner = getattr(owner, name)

        def call(*arguments, **more):
            if before:
                note(before)
            result = inner(*arguments, **more)
            if after:
                note(after)
            return result

        setattr(owner, name, call)

    def pickled(*arguments):
        tensor, size = inner_pickled(*arguments)
        counts["objects"] += 1
        counts["bytes of objects"] += tensor.numel()
        return tensor, size

    inner_pickled = distributed_c10d._object_to_tensor  # what all collectives of Python objects begin with
    distributed_c10d._object_to_tensor = pickled
    for owner, name in ((os, "listdir"), (os, "scandir"), (glob, "glob")):
        listing(owner, name)
    train_loop, pause = train.train, train.pause

    def loop(run, start):
        note("start")
        around(run.saver, "save", "before a save", "save")
        around(run.evaluator, "evaluate", "before an evaluation", "evaluation")
        return train_loop(run, start)

    def pause_and_note(run, step):
        note("step")
        ended = pause(run, step)
        note("pause")
        return ended

    def finish(code):
        note("end")
        rank = int(os.environ.get("RANK", 0))
        (folder / f"{rank}.json").write_text(json.dumps(parts))
        inner_finish(code)

    inner_finish = train.finish
    train.train, train.pause, train.finish = loop, pause_and_note, finish
    with Collectives(counts):
        train.main(parse_arguments(words))


if __name__ == "__main__":
    main(sys.argv[1:])
