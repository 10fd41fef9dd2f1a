"""What learns by the step: --freeze_schedule, whose entries each say what learns from a step on.

    "0: decoder.layers[-1]; 500: decoder.layers[-2:] head; 50%: all"     rules as of --unfreeze, everything else is frozen
    "gradual(500)"          one more block each 500 steps, from the top (Howard and Ruder 2018); in the end all
    "lisa(2, every=50)"     what lies outside the blocks, and 2 random blocks, others each 50 steps (arXiv:2403.17919)
    "badam(every=100)"      one block after the other, each for 100 steps, in a random order of each round (arXiv:2404.02827)

What learns is a function of the step's number, the seed and the model, so a resumed run needs nothing.
"""

import re

import numpy as np

from zerotune.errors import UserError
from zerotune.model.freeze_schedule import read_schedule
from zerotune.model.freezing import apply_rules, block_lists, names_of


def phases_of(plan, model, max_steps, seed):
    """Return [(first step, rules of what learns)] of a Plan for a model, in order; raise UserError."""
    blocks = block_lists(model)
    if plan.entries:
        begins = [round(begin * max_steps) if isinstance(begin, float) else begin for begin, _ in plan.entries]
        for before, after in zip(begins, begins[1:], strict=False):
            if after <= before:
                raise UserError(f"--freeze_schedule {plan.text!r}: step {after} comes after step {before}; borders have to rise")
        return [(begin, rules) for begin, (_, rules) in zip(begins, plan.entries, strict=True) if begin < max_steps]
    # Blocks from the bottom to the top: an encoder's lie below its decoder's.
    paths = sorted(blocks, key=lambda path: "decoder" in path.split("."))
    every_block = [f"re:^{re.escape(path)}\\.{number}\\." for path in paths for number in range(blocks[path])]
    outside = "re:^(?!" + "|".join(re.escape(path) + r"\." for path in paths) + ")"
    count = len(every_block)
    if plan.method == "gradual":
        steps = [(number * plan.every, tuple(every_block[count - 1 - number :])) for number in range(count)]
        return [(begin, rules) for begin, rules in [*steps, (count * plan.every, ("all",))] if begin < max_steps]
    found = []
    for number in range(-(-max_steps // plan.every)):
        if plan.method == "lisa":
            if plan.count > count:
                raise UserError(f"--freeze_schedule {plan.text!r}: the model has {count} blocks")
            chosen = np.random.default_rng([seed, number, 3]).choice(count, plan.count, replace=False)
            rules = (outside, *(every_block[block] for block in sorted(chosen)))
        else:
            order = np.random.default_rng([seed, number // count, 4]).permutation(count)
            rules = (every_block[order[number % count]],)
        found.append((number * plan.every, rules))
    return found


class Phases:
    """The phases of a run; step: the number of optimizer steps that are done when it begins or goes on."""

    def __init__(self, text, model, max_steps, seed):
        """text: of --freeze_schedule; model: before it is wrapped for training. Raises UserError."""
        self.found = phases_of(read_schedule(text), model, max_steps, seed)
        self.borders = {begin for begin, _ in self.found[1:]}
        self.learning = []  # of each phase: names of what learns
        for begin, rules in self.found:
            try:
                self.apply(model, rules)
            except UserError as error:
                problems = (problem.removeprefix("--unfreeze: ") for problem in error.problems)
                raise UserError(*(f"--freeze_schedule, from step {begin} on: {problem}" for problem in problems)) from None
            self.learning.append({names[0] for parameter, names in names_of(model) if parameter.requires_grad})

    @staticmethod
    def apply(model, rules):
        """Have what the rules name learn, and nothing else; return the FreezeReport."""
        return apply_rules(model, ["all"], list(rules))

    def number_at(self, step):
        """Return the number of the phase in which the step after `step` steps is taken."""
        return sum(begin <= step for begin, _ in self.found) - 1

    def begin(self, model, step):
        """Have learn what learns after `step` steps, None: where most learns; return the FreezeReport."""
        report = self.apply(model, self.found[self.number_at(self.largest if step is None else step)][1])
        report.phases = self
        return report

    def births(self, step):
        """Return {name: first step of the phases on end, up to this one, in which it learns} of what learns now."""
        now = self.number_at(step)
        born = {}
        for name in self.learning[now]:
            first = now
            while first and name in self.learning[first - 1]:
                first -= 1
            born[name] = self.found[first][0]
        return born

    def settled(self, step):
        """Return the names of what has learned before and is frozen now: its weights are in no file but the checkpoints."""
        now = self.number_at(step)
        return set().union(*self.learning[:now]) - self.learning[now]

    def never(self):
        """Return a function that tells of a name whether it learns in no phase."""
        ever = set().union(*self.learning)
        return lambda name: name not in ever

    @property
    def largest(self):
        """Return a step of the phase in which most learns."""
        sizes = [len(names) for names in self.learning]
        return self.found[sizes.index(max(sizes))][0]
