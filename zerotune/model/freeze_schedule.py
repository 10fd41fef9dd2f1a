"""The words of --freeze_schedule, read without a model; phases.py says what they mean for one."""

import re
from dataclasses import dataclass

from zerotune.errors import UserError

CALL = re.compile(r"(gradual|lisa|badam)\(([^()]*)\)")
FORMS = "'STEP: RULES; STEP: RULES', gradual(STEPS), lisa(BLOCKS, every=STEPS) or badam(every=STEPS)"


@dataclass(frozen=True)
class Plan:
    """A schedule that was read: entries [(first step or share of all steps, rules)], or the name and numbers of a method."""

    text: str
    entries: tuple = ()
    method: str = ""
    every: int = 0
    count: int = 1


def read_schedule(text):
    """Return the Plan of a --freeze_schedule; raise UserError with what is wrong."""

    def wrong(why):
        return UserError(f"--freeze_schedule {text!r}: {why}; allowed: {FORMS}")

    if found := CALL.fullmatch(text.strip()):
        method, inside = found.groups()
        words = [word.strip() for word in inside.split(",") if word.strip()]
        named = {word.partition("=")[0].strip(): word.partition("=")[2].strip() for word in words if "=" in word}
        plain = [word for word in words if "=" not in word]
        if method != "lisa" and "every" not in named:
            named |= {"every": plain.pop(0)} if plain else {}
        count = plain.pop(0) if method == "lisa" and plain else "1"
        if plain or set(named) != {"every"} or not (named["every"] + count).isdigit() or not int(named["every"]) * int(count):
            raise wrong(f"{method} takes whole numbers above 0")
        return Plan(text, method=method, every=int(named["every"]), count=int(count))
    entries = []
    for part in text.split(";"):
        begin, colon, rules = part.partition(":")
        begin, rules = begin.strip(), rules.split()
        share = begin.endswith("%")
        number = begin.removesuffix("%")
        if not colon or not number.replace(".", "", 1).isdigit() or (not share and "." in number):
            raise wrong(f"{part.strip()!r} does not begin with a step and a colon")
        if not rules:
            raise wrong(f"from {begin} on nothing learns")
        if share and float(number) >= 100:
            raise wrong(f"{begin} is not before the end")
        entries.append((float(number) / 100 if share else int(number), tuple(rules)))
    if entries[0][0] != 0:
        raise wrong("the first entry has to begin at 0")
    return Plan(text, entries=tuple(entries))
