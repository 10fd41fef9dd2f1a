"""python -m zerotune TOOL ...: the commands around train.py; a tool is imported only when it is called."""

import zerotune.quiet  # noqa: F401  before the libraries: they read their log levels when they are imported

# isort: split
import importlib
import sys

from zerotune.errors import UserError, nearest

TOOLS = {  # name: (module with a main(words), what it does)
    "benchmark": ("benchmark.main", "measure train.py over strategies, flags and batches, or beside Hugging Face's Trainer"),
    "check": ("check", "check a launch (YAML, DeepSpeed JSON, flags, files) without starting it"),
    "checkpoint": ("checkpoint", "show a checkpoint and the hash of its state, verify it, export a model from it"),
    "compare": ("compare", "draw several runs in one page, with a table of their differences in flags and results"),
    "demo": ("demo", "make the quickstart's model and rows, or report its runs"),
    "doctor": ("doctor.main", "check machine, configuration and numbers of a launch: fine, will hurt, will fail, with the fix"),
    "machines": ("machines", "before a launch on several machines: the way to machine 0, who is there, and what differs"),
    "hardware": ("hardware", "print the peak FLOP/s of this machine's device, of which MFU is a share"),
    "plan": ("plan", "predict memory and speed of every strategy before a launch: what fits, and what to launch"),
    "scale": ("scale", "what 64 to 1,024 GPUs would give: bytes, tokens, failures, our own loop, beside what others measured"),
    "wheelhouse": ("wheelhouse", "collect the wheels that an air-gapped machine lacks"),
}


def main(words):
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m zerotune TOOL ...\n")
        print("\n".join(f"  {name:<11} {text}" for name, (_, text) in TOOLS.items()))
        return 0
    name = words[0]
    try:
        if name not in TOOLS:
            raise UserError(f"{name!r} is no tool{nearest(name, TOOLS)}; tools: {', '.join(TOOLS)}")
        return importlib.import_module(f"zerotune.tools.{TOOLS[name][0]}").main(words[1:])
    except UserError as error:
        who = name if name in TOOLS else "zerotune"
        print("\n".join(f"{who}: error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
