"""What a flag of train.py is declared with: default, help, unit, range, and what it decides; each fact has this one home.

The flags themselves stand in run/groups.py, and run/parsing.py makes a command line of them.
"""

import dataclasses

# What a flag decides, which is what a resumed run must not change without saying so.
MATHEMATICS = "mathematics"  # the update: its value is compared
ROWS = "rows"  # the tokenised rows: it goes into their digest, which is compared
CONTENT = "content"  # what it leads to is compared: a file's content, a model's weights, a number of steps
HARMLESS = "harmless"  # logs, evaluates, saves, spares memory or time: never compared

# What a number has to be: (test, words)
POSITIVE = (lambda value: value > 0, "must be greater than 0")
ABOVE_ONE = (lambda value: value > 1, "must be greater than 1")
NOT_NEGATIVE = (lambda value: value >= 0, "must not be negative")
SHARE = (lambda value: 0 <= value <= 1, "must be between 0 and 1")
BELOW_ONE = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def flag(default, help, *decides, range=None, unit=None):
    """Return a dataclass field for a flag; decides: one or two of the words above, without which it is no flag."""
    if not decides:
        raise TypeError("a flag says what it decides: MATHEMATICS, ROWS, CONTENT or HARMLESS")
    metadata = {"help": help, "decides": decides, "range": range, "unit": unit}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names_deciding(dataclass, what):
    """Return the names of the flags that decide MATHEMATICS, ROWS, CONTENT or nothing (HARMLESS), in their order."""
    return [field.name for field in dataclasses.fields(dataclass) if what in field.metadata["decides"]]


def out_of_range(args):
    """Return a line for each flag whose value is outside the range that it is declared with."""
    problems = []
    for field in dataclasses.fields(args):
        value, allowed = getattr(args, field.name), field.metadata["range"]
        if allowed and value is not None and not allowed[0](value):
            problems.append(f"--{field.name} {value}: {allowed[1]}")
    return problems
