"""train.py that saves what it has loaded, before its first step, into the folder <output_dir>_loaded: what a resume really has.

KILLED_RANK: this rank kills itself by SIGKILL, when checkpoint-<KILLED_AT> is there, or KILLED_AFTER seconds after it has loaded.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import train  # noqa: E402
from zerotune.run.arguments import arguments_or_exit  # noqa: E402


def main(args):
    run = train.setup(args)
    train.load_rows(run)
    train.cut_steps(run)
    train.load_model(run)
    start = train.resume(run)
    if run.found:
        train.accompany(run, start)
        args.output_dir += "_loaded"
        run.saver.save(start)
        run.saver.wait()
        args.output_dir = args.output_dir.removesuffix("_loaded")
    train.accompany(run, start)
    if os.environ.get("KILLED_RANK") == os.environ.get("RANK", "0"):
        threading.Thread(target=die, args=(args.output_dir,), daemon=True).start()
    train.end(run, train.train(run, start))


def die(output_dir):
    time.sleep(float(os.environ.get("KILLED_AFTER", "0")))
    if step := os.environ.get("KILLED_AT"):
        while not (Path(output_dir) / f"checkpoint-{step}").exists():
            time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(arguments_or_exit())
