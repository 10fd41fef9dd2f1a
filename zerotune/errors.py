"""The one exception that means "the user can mend this": train.py prints it without a traceback and exits with 2."""

import difflib


class UserError(Exception):
    """One or more mistakes in what the user gave, each a line: what was given, what is allowed, what to do."""

    def __init__(self, *problems):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    code = 2  # of the process


class RunError(UserError):
    """A run that cannot go on, for reasons that only showed in it."""

    code = 1


def nearest(name, known, count=3):
    """Return ' (did you mean a, b?)' for the known names closest to `name`, or ''."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" (did you mean {', '.join(matches)}?)" if matches else ""
