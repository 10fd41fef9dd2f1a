"""The flags of train.py as one object, from a command line, checked by what needs nothing but the flags and the file system.

Each is declared in groups.py.
"""

import sys
from dataclasses import dataclass

from zerotune.engine.ending import exit_with, restore_default_signals
from zerotune.errors import UserError, nearest
from zerotune.flags import MATHEMATICS, ROWS, names_deciding, out_of_range
from zerotune.run.checks import REQUIRED, check_best, check_files, check_rows, check_savers
from zerotune.run.groups import GROUPS, DataArguments
from zerotune.run.parsing import parse


@dataclass
class Arguments(*reversed(GROUPS)):
    """All flags in one typed object, e.g. args.learning_rate."""


def parse_arguments(argv=None):
    """Return the Arguments of a command line (default: sys.argv[1:]); raise UserError with every mistake in it."""
    args = Arguments(**parse(GROUPS, sys.argv[1:] if argv is None else argv))
    problems = check_arguments(args)
    if problems:
        raise UserError(*problems)
    return args


def arguments_or_exit():
    """Return the Arguments of this process's command line; print what is wrong with it and end the process with code 2."""
    restore_default_signals()
    try:
        return parse_arguments()
    except UserError as error:
        exit_with(error)


# Flags that decide which parameters and optimizer states there are: a checkpoint has nothing to go on from with another value.
FIXED = (
    "task freeze unfreeze freeze_schedule peft lora_r lora_alpha target_modules modules_to_save num_virtual_tokens "
    "trainable_tokens quantize double_quant optim"
).split()
LED_TO_BY = {  # what is compared on resume and is no flag's value: the flags that lead to it
    "training rows": ["train_file", "dataset_name", "chat_template", "max_train_rows", *names_deciding(DataArguments, ROWS)],
    "warm-up steps": ["warmup_steps", "warmup_ratio"],
    "steps of the schedule": ["max_steps", "num_train_epochs"],
    "rows a step": ["per_device_train_batch_size", "gradient_accumulation_steps"],
}


def acceptable():
    """Return the names that --accept_change may be given: flags from a change of which another mathematics follows."""
    flags = [name for name in names_deciding(Arguments, MATHEMATICS) if name not in FIXED]
    return sorted({*flags, *(name for names in LED_TO_BY.values() for name in names)})


def check_arguments(args, required=tuple(REQUIRED)):
    """Return a list of problems, a line each: ranges, pairs that cannot be, files that are not there, and what is required."""
    allowed = acceptable()
    return [
        *out_of_range(args),
        *check_savers(args),
        *check_best(args),
        *check_rows(args),
        *check_files(args, required),
        *(
            f"--accept_change {name}: no change that can be accepted{nearest(name, allowed)}; allowed: {', '.join(allowed)}"
            for name in args.accept_change
            if name not in allowed
        ),
    ]
