"""train.py whose second rank gets SIGTERM inside the evaluation after step CUT_AT: what a preemption there leaves."""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import train  # noqa: E402
from zerotune.run.arguments import arguments_or_exit  # noqa: E402
from zerotune.run.evaluation import Evaluator  # noqa: E402

measure = Evaluator.measure


def cut_measure(self, split, step):
    if step == int(os.environ["CUT_AT"]) and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        while not self.stopper.received:  # a thread takes note of it
            pass
    return measure(self, split, step)


if __name__ == "__main__":
    Evaluator.measure = cut_measure
    train.main(arguments_or_exit())
