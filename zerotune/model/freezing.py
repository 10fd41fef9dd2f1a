"""Manual freezing by ordered rules: `freeze` rules first, then `unfreeze` rules, each reporting what it caught.

A rule is one of
    all                                     every parameter
    encoder decoder embeddings head backbone    a part, by the same name on every family (backbone: all but the head)
    encoder.layers[:6] decoder.layers[-1] layers[-2:]    a slice of blocks, whatever the family calls its list of blocks
    re:PATTERN                              parameters whose name matches the regular expression somewhere
A tied weight is one parameter with several names. A rule that matches any of its names acts on it; rules that leave it frozen
under one name and trainable under another are refused, because no order between them was meant.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from zerotune.errors import UserError, nearest

PARTS = ("encoder", "decoder", "embeddings", "backbone", "head")
HEAD_NAMES = {
    "lm_head",
    "classifier",
    "pre_classifier",
    "score",
    "classification_head",
    "cls",
    "embed_out",
    "final_logits_bias",
    "qa_outputs",
}
EMBEDDING_NAMES = {"shared", "wte", "wpe"}
SLICE = re.compile(r"(?:(encoder|decoder)\.)?layers\[(-?\d*)(:?)(-?\d*)\]")


@dataclass
class RuleReport:
    """What one rule caught: distinct tensors and the parameters in them."""

    action: str  # freeze or unfreeze
    rule: str
    num_tensors: int
    num_parameters: int


@dataclass
class FreezeReport:
    rules: list  # of RuleReport, in the order of application
    tied: list  # of lists of names that are one tensor, the first being the name it goes by
    num_trainable: int
    num_total: int
    phases: object = None  # of --freeze_schedule

    def facts(self):
        """Return what run.json holds of it."""
        return {
            "parameters": {"total": self.num_total, "trainable": self.num_trainable},
            "freezing": [vars(rule) for rule in self.rules],
            "tied": self.tied,
        }

    def never_learning(self, model):
        """Return the parameters that learn in no phase of a schedule; None without one: those that do not learn."""
        if self.phases is None:
            return None
        never = self.phases.never()
        return [parameter for name, parameter in model.named_parameters() if never(name)]

    def lines(self):
        """Return the table as lines of text for the log."""
        rows = [f"{r.action:<8} {r.rule:<28} {r.num_tensors:>5} tensors {r.num_parameters:>14,} parameters" for r in self.rules]
        rows += [f"tied     {names[0]} is also {', '.join(names[1:])}: one parameter" for names in self.tied]
        share = 100 * self.num_trainable / self.num_total
        return rows + [f"trainable {self.num_trainable:,} of {self.num_total:,} parameters ({share:.2f} %)"]


def num_elements(parameter):
    """Return a parameter's whole size, also where ZeRO-3 keeps only a shard of it here, or where codes of four bits share bytes."""
    if getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def names_of(model):
    """Return [(parameter, [every name it has])], in the model's order; tied weights appear once."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(found.values())


def is_quantised(parameter):
    """Tell whether bitsandbytes keeps a parameter in 4 or 8 bits."""
    return type(parameter).__module__.startswith("bitsandbytes.")


def of_quantised_layers(model):
    """Return the ids of all parameters of layers with a quantised weight: such a layer moves its bias to its input's precision."""
    layers = [module for module in model.modules() if is_quantised(getattr(module, "weight", None))]
    return {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}


def block_lists(model):
    """Return {path: number of blocks} of the outermost lists of repeated blocks, e.g. {'model.encoder.layers': 12}."""
    lists = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and holds_weights(module[0]):
            lists[path] = len(module)
    return lists


def holds_weights(module):
    """Tell whether a module has parameters, or what model/unread.py leaves in their places."""
    return any(isinstance(value, torch.Tensor) for m in module.modules() for value in (*m._parameters.values(), *vars(m).values()))


def single_stack_name(model):
    """Return the part name of a model with one stack: 'encoder' (BERT) or 'decoder' (GPT-2, Llama); None if it has two."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return "encoder" if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING else "decoder"


def part_matcher(model, part, blocks):
    """Return a function name -> bool that tells whether a parameter belongs to `part`, one of PARTS."""

    def in_head(name):
        return bool(HEAD_NAMES & set(name.split(".")))

    def in_embeddings(name):
        in_block = any(name.startswith(path + ".") for path in blocks)
        return not in_head(name) and not in_block and any("embed" in c or c in EMBEDDING_NAMES for c in name.split("."))

    if part == "head":
        return in_head
    if part == "embeddings":
        return in_embeddings
    every_name = [name for _, names in names_of(model) for name in names]
    if part == "backbone" or (part == single_stack_name(model) and not any(part in n.split(".") for n in every_name)):
        return lambda name: not in_head(name)
    return lambda name: part in name.split(".")


def blocks_of_slice(model, rule, blocks):
    """Return the path prefixes of the blocks that a rule such as 'decoder.layers[-2:]' names; raise UserError if outside."""
    stack, start, colon, stop = SLICE.fullmatch(rule).groups()
    single = single_stack_name(model)
    paths = [p for p in blocks if stack is None or stack in p.split(".") or (single == stack and len(blocks) == 1)]
    if len(paths) != 1:
        choices = ", ".join(f"{p} ({n} blocks)" for p, n in blocks.items()) or "none"
        allowed = "; say encoder.layers[...] or decoder.layers[...]" if len(paths) > 1 else ""
        raise UserError(f"rule {rule!r} must name one list of blocks; this model has: {choices}{allowed}")
    (path,), length = paths, blocks[paths[0]]
    bounds = [int(text) for text in (start, stop) if text]
    if not colon:
        if not bounds:
            raise UserError(f"rule {rule!r} has no block number; {path} has {length} blocks, e.g. layers[-1] or layers[:2]")
        chosen = range(length)[bounds[0] :][:1] if -length <= bounds[0] < length else range(0)
    else:
        outside = any(not -length <= bound <= length for bound in bounds)
        chosen = range(0) if outside else range(length)[int(start) if start else None : int(stop) if stop else None]
    if not chosen:
        raise UserError(f"rule {rule!r} is outside the range: {path} has {length} blocks, 0 to {length - 1} (or -{length} to -1)")
    return [f"{path}.{index}." for index in chosen]


def matcher(model, rule, blocks):
    """Return a function name -> bool for one rule; raise UserError for a rule of no known form."""
    if rule == "all":
        return lambda name: True
    if rule in PARTS:
        return part_matcher(model, rule, blocks)
    if SLICE.fullmatch(rule):
        prefixes = tuple(blocks_of_slice(model, rule, blocks))
        return lambda name: name.startswith(prefixes)
    if rule.startswith("re:"):
        try:
            pattern = re.compile(rule[3:])
        except re.error as error:
            raise UserError(f"rule {rule!r} is no regular expression: {error}") from None
        return lambda name: pattern.search(name) is not None
    forms = "all, encoder, decoder, embeddings, backbone, head, encoder.layers[:6], decoder.layers[-1], layers[-2:], re:PATTERN"
    raise UserError(f"rule {rule!r} is not known{nearest(rule, (*PARTS, 'all', 'layers[-1]'))}; rules: {forms}")


def apply_rules(model, freeze, unfreeze, all_may_be_frozen=False):
    """Set requires_grad by the rules and return a FreezeReport.

    model: a transformers model, before it is wrapped for training. freeze, unfreeze: lists of rules, applied in that order.
    Raises UserError with every problem found: a rule that is unknown, outside its range or matches nothing (with the nearest
    names), rules that disagree about a tied weight, everything frozen (unless adapters are to come: all_may_be_frozen).
    """
    parameters, blocks, quantised = names_of(model), block_lists(model), of_quantised_layers(model)
    verdicts = {}  # (index of the parameter, name) -> (frozen?, the rule that said so last)
    reports, problems = [], []
    for action, rule in [("freeze", r) for r in freeze] + [("unfreeze", r) for r in unfreeze]:
        try:
            matches = matcher(model, rule, blocks)
        except UserError as error:
            problems += [f"--{action}: {problem}" for problem in error.problems]
            continue
        caught = set()
        for index, (_, names) in enumerate(parameters):
            for name in names:
                if matches(name):
                    verdicts[index, name] = (action == "freeze", rule)
                    caught.add(index)
        if not caught:
            every_name = {name for _, names in parameters for name in names}
            modules = {name.rsplit(".", 1)[0] for name in every_name}
            hint = nearest(rule.removeprefix("re:"), every_name | modules)
            problems.append(f"--{action}: rule {rule!r} matches no parameter of {type(model).__name__}{hint}")
        num_parameters = sum(num_elements(parameters[index][0]) for index in caught)
        reports.append(RuleReport(action, rule, len(caught), num_parameters))
    for index, (parameter, names) in enumerate(parameters):
        said = {name: verdicts[index, name] for name in names if (index, name) in verdicts}
        if len({frozen for frozen, _ in said.values()}) > 1:
            opinions = "; ".join(f"{n} {'frozen' if f else 'trainable'} by {r!r}" for n, (f, r) in said.items())
            problems.append(
                f"--freeze/--unfreeze: the rules disagree about one tied weight ({opinions}); "
                f"tied weights are one parameter: freeze or unfreeze it under all its names (the rule 'embeddings' and 'head')"
            )
        elif said:
            frozen, rule = next(iter(said.values()))
            if not frozen and id(parameter) in quantised:
                problems.append(
                    f"--unfreeze: {names[0]} is of a quantised layer and cannot learn (rule {rule!r}); name others, such as head"
                )
            else:
                parameter.requires_grad_(not frozen)
    trainable = sum(num_elements(p) for p, _ in parameters if p.requires_grad)
    if trainable == 0 and not problems and not all_may_be_frozen:
        problems.append("--freeze: everything is frozen, nothing would learn; add an --unfreeze rule such as head or layers[-1]")
    if problems:
        raise UserError(*problems)
    tied = [names for _, names in parameters if len(names) > 1]
    return FreezeReport(reports, tied, trainable, sum(num_elements(p) for p, _ in parameters))


class GradientWatch:
    """Remembers which trainable parameters have had a gradient, from its creation until it is asked."""

    def __init__(self, model):
        self.waiting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.hooks = [
            parameter.register_hook(lambda gradient, name=name: self.waiting.discard(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def without_gradient(self):
        """Return the names that had none on this rank, sorted, and stop watching."""
        for hook in self.hooks:
            hook.remove()
        return sorted(self.waiting)
