"""Which evaluation was the best, when a run evaluates and saves, and when it has waited long enough for a better one.

Decided from a step's number and from values that all ranks share; the state is a dict that goes into every checkpoint's manifest,
so that a resumed run decides as one in one go does. Imports nothing that takes time: the flags are checked by it as well.
Tests: tests/test_best.py.
"""

import copy
import math

from zerotune.errors import UserError
from zerotune.rows.sources import sources_of

LOSS = "eval_loss"
TASK_METRICS = {  # the numbers of the tasks' own metrics, in metrics/
    "seq2seq": ("rouge1", "rouge2", "rougeL", "sacrebleu"),
    "causal": (),
    "classification": ("accuracy", "macro_f1"),
}


def metric_key(name, sources=()):
    """Return what an evaluation's record calls a metric: loss and eval_loss are one, as are rougeL and eval_rougeL.

    sources: names of several files, whose own numbers are eval_SOURCE_loss, ...; what all rows have is meant first.
    """
    bare = name.removeprefix("eval_")
    if bare not in ("loss", "perplexity", *(metric for metrics in TASK_METRICS.values() for metric in metrics)):
        if any(name.startswith(f"{source}_") for source in sources):
            return f"eval_{name}"
        if any(bare.startswith(f"{source}_") for source in sources):
            return name
    return LOSS if bare == "loss" else bare


def smaller_is_better(key):
    """Tell whether less of a record's number is better: losses and perplexities, of all rows or of one of several files."""
    return key in (LOSS, "perplexity") or (key.startswith("eval_") and key.endswith(("_loss", "_perplexity")))


def names_of_sources(args):
    """Return the names by which an evaluation tells its files apart, [] where there is one."""
    sources = sources_of(args.validation_file, "validation_file")
    return [source.name for source in sources] if len(sources) > 1 else []


def known_metrics(args):
    """Return the numbers of an evaluation under these flags; None if --metric, whose names its module knows, is among them."""
    texts = args.task == "seq2seq" or (args.task == "causal" and not args.text_column)
    scored = args.task == "classification" or (texts and args.predict_with_generate)
    if scored and args.metric:
        return None
    bare = ["loss", *(["perplexity"] if args.task != "classification" else []), *(TASK_METRICS[args.task] if scored else ())]
    return [*map(metric_key, bare), *(f"eval_{source}_{name}" for source in names_of_sources(args) for name in bare)]


def writes_checkpoints(args):
    """Tell whether the flags ask for checkpoints other than those after a signal."""
    by_steps = args.save_steps == "auto" or args.save_steps > 0 or args.save_every_seconds > 0
    return args.save_strategy != "no" and (by_steps or args.save_strategy != "steps")


class Best:
    """The best evaluation so far, and how many have passed since one was better by more than the threshold."""

    def __init__(self, metric=None, greater=False, patience=0, threshold=0.0, keeps=False, state=None):
        """metric: a key of an evaluation's record, None: nothing is compared. patience: evaluations, 0: without end.

        keeps: whether each best step has a checkpoint. state: of a manifest; that of another metric is not gone on with.
        """
        self.metric, self.patience, self.threshold, self.keeps = metric, patience, threshold, keeps
        begin = {"metric": metric, "greater": greater, "evaluated": 0, "step": None, "value": None, "waited": 0, "kept": []}
        before = copy.deepcopy(state or {})
        if (before.get("metric"), before.get("greater")) != (metric, greater):
            before = {"evaluated": before.get("evaluated", 0)}
        self._state = begin | before
        if not keeps:
            self._state["kept"] = []
        elif not self._state["kept"] and self.step is not None:  # compared before, but not kept; its checkpoint may be there
            self._state["kept"] = [self.step]

    @classmethod
    def of(cls, args, saved):
        """Return the Best of train.py's flags; saved: the manifest that the run goes on from, or None."""
        keeps = args.load_best_model_at_end or args.save_strategy == "best"
        compares = keeps or args.metric_for_best_model or args.early_stopping_patience
        metric = metric_key(args.metric_for_best_model or LOSS, names_of_sources(args)) if compares else None
        greater = args.greater_is_better
        if greater is None:
            greater = metric is not None and not smaller_is_better(metric)
        state = saved and saved.get("best", {"evaluated": saved["step"]})
        return cls(metric, greater, args.early_stopping_patience, args.early_stopping_threshold, keeps, state)

    @property
    def step(self):
        """The best evaluation's step, None before there is one."""
        return self._state["step"]

    @property
    def value(self):
        """The best evaluation's metric."""
        return self._state["value"]

    @property
    def evaluated(self):
        """The newest evaluation's step."""
        return self._state["evaluated"]

    @property
    def kept(self):
        """Steps, each better than those before it, that were to have a checkpoint; a full disk may have cost some theirs."""
        return self._state["kept"]

    @property
    def used_up(self):
        """Tell whether the run should stop: as many evaluations as patience allows were no better."""
        return 0 < self.patience <= self._state["waited"]

    def state(self):
        """Return the state as a dict of JSON values of its own."""
        return copy.deepcopy(self._state)

    def update(self, step, value):
        """Take note of an evaluation, once, and return whether it is the best so far; a value that is not finite never is.

        As in transformers' EarlyStoppingCallback, any gain makes a best step, but waiting ends only at a gain above the threshold.
        """
        state = self._state
        if step <= state["evaluated"]:
            return False
        state["evaluated"] = step
        if self.metric is None:
            return False
        gain = -math.inf
        if math.isfinite(value):
            gain = math.inf if state["value"] is None else (value - state["value"]) * (1 if state["greater"] else -1)
        state["waited"] = 0 if gain > self.threshold else state["waited"] + 1
        if gain > 0:
            state |= {"step": step, "value": value, "kept": [*state["kept"], step] if self.keeps else []}
        return gain > 0

    def facts(self):
        """Return what run.json holds of it: None where nothing is compared."""
        if self.metric is None:
            return None
        return {key: self._state[key] for key in ("metric", "greater", "step", "value")} | {"stopped_early": self.used_up}


class Calendar:
    """After which steps a run evaluates and saves."""

    def __init__(self, args, schedule, best, has_validation):
        self.args, self.schedule, self.best = args, schedule, best
        self.has_validation = has_validation and args.eval_strategy != "no"
        if best.metric is not None and not has_validation:  # a hub data set may lack them
            raise UserError(f"{best.metric} is to be compared, and there are no validation rows; give --validation_file")

    def evaluates(self, step):
        """Tell whether an evaluation is due after a step and not done; where evaluations are compared the last step has one."""
        due = self.schedule.is_due(self.args.eval_strategy, self.args.eval_steps, step)
        last = self.best.metric is not None and step == self.schedule.max_steps
        return self.has_validation and (due or last) and self.best.evaluated < step

    def saves(self, step):
        """Tell whether a checkpoint is due after a step and its evaluation: a best one always, and the run's last."""
        args, best = self.args, self.best
        if best.keeps and best.step == step:
            return True
        if args.save_strategy == "best" or not writes_checkpoints(args):
            return False
        last = step == self.schedule.max_steps or best.used_up
        every = 0 if args.save_steps == "auto" else args.save_steps
        return last or self.schedule.is_due(args.save_strategy, every, step)
