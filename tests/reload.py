"""train.py that saves what it has loaded, before its first step, into the folder <output_dir>_loaded: what a resume really has."""

import sys
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
    train.end(run, train.train(run, start))


if __name__ == "__main__":
    main(arguments_or_exit())
