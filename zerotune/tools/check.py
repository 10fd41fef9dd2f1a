"""Check an accelerate YAML, its DeepSpeed JSON and train.py's flags together, without starting anything.

    python -m zerotune check accelerate_configs/zero2.yaml 8 --model_name_or_path ... --train_file ... --output_dir ...

scripts/launch.sh does so before each launch: a mistake is a line and exit code 2 there, not the tracebacks of a launcher.
"""

import os
import sys
from pathlib import Path

import yaml

from zerotune.engine import sequence_parallel
from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import read_deepspeed_config, resolve
from zerotune.engine.strategy import check_device
from zerotune.errors import UserError
from zerotune.run.arguments import parse_arguments


def main(words):
    if len(words) < 2 or not words[1].isdigit():
        raise UserError("needs ACCELERATE.yaml NUM_PROCESSES, then train.py's flags")
    try:
        check_launch(words[0], int(words[1]), words[2:])
    except UserError as error:  # they are train.py's mistakes, not this tool's
        print("\n".join(f"train.py: error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.code
    return 0


def check_launch(path, num_processes, flags):
    """Raise UserError with everything wrong with an accelerate YAML, its DeepSpeed JSON and train.py's flags together."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    args = parse_arguments(flags)
    # torch takes seconds to import, and the defaults run everywhere.
    problems = (
        check_device(args)
        if args.mixed_precision != "no"
        or args.optim.startswith("paged")
        or args.liger
        or args.memory_snapshot
        or args.tf32
        or args.attn_implementation
        or args.torch_compile
        or args.optim == "muon"
        else []
    )
    json_path = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if json_path:
        try:
            config = read_deepspeed_config(json_path)
            check_config(config, json_path, args)
            parallel = content.get("parallelism_config") or {}
            sizes = {kind: parallel.get(f"parallelism_config_{kind.lower()}_size", 1) for kind in ("SP", *sequence_parallel.OTHERS)}
            problems += sequence_parallel.launch_problems(sizes, config, json_path, args)
            resolve(config, json_path, args, num_processes, 1, int(os.environ.get("NUM_MACHINES", 1)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
