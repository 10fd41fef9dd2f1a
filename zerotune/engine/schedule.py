"""The arithmetic of a run: how many steps of how many rows, and the learning rate of each, as functions of the step number."""

import dataclasses
import math
from dataclasses import dataclass


def lr_at(step, *, learning_rate, lr_scheduler_type, warmup_steps, max_steps):
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear and its first step already learns: learning_rate x (step + 1) / warmup_steps. After it: constant, or
    linear or cosine (half a period) from learning_rate towards 0, which would be reached at step max_steps.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if lr_scheduler_type == "constant":
        return learning_rate
    if lr_scheduler_type == "linear":
        return learning_rate * max(0.0, 1 - progress)
    if lr_scheduler_type == "cosine":
        return learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    raise ValueError(f"lr_scheduler_type {lr_scheduler_type!r} is none of constant, linear, cosine")


@dataclass(frozen=True)
class Schedule:
    """Steps and rates of a run; num_rows: training rows; rows_per_step: over all processes and micro-batches."""

    num_rows: int
    rows_per_step: int
    max_steps: int
    warmup_steps: int
    learning_rate: float
    lr_scheduler_type: str
    equation: str  # the batch arithmetic in words
    row_offset: int = 0  # rows by which the stream is shifted, in a run whose rows_per_step has changed on the way

    @classmethod
    def of(cls, args, num_rows, num_shares, num_processes=None):
        """Return the Schedule of train.py's flags; num_shares: groups of processes that share rows, mostly of one each."""
        rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        rows_per_step = rows * num_shares * accumulation
        max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_rows / rows_per_step)
        shares = f"{num_shares} process(es)"
        if num_processes not in (None, num_shares):
            shares = f"{num_shares} group(s) of {num_processes // num_shares} processes"
        equation = (
            f"{rows} rows x {shares} x {accumulation} accumulation = {rows_per_step} rows a step; "
            f"{max_steps} steps = {max_steps * rows_per_step / num_rows:.2f} epochs of {num_rows} rows"
        )
        if args.max_tokens_per_micro_batch:
            equation += f"; cut into micro-batches of at most {args.max_tokens_per_micro_batch} tokens"
        warmup_steps = args.warmup_steps or round(args.warmup_ratio * max_steps)
        return cls(num_rows, rows_per_step, max_steps, warmup_steps, args.learning_rate, args.lr_scheduler_type, equation)

    def lr_at(self, step):
        """Return the learning rate of optimizer step `step`, counted from 0."""
        return lr_at(
            step,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
        )

    def gone_on_with(self, saved):
        """Return the Schedule after a checkpoint, of whose manifest `saved` is: the same place in the stream of rows."""
        position = saved["row_offset"] + saved["step"] * saved["fingerprint"]["rows a step"]
        return dataclasses.replace(self, row_offset=position - saved["step"] * self.rows_per_step)

    def facts(self):
        """Return what run.json holds of it."""
        return {"batch_arithmetic": self.equation, "max_steps": self.max_steps, "warmup_steps": self.warmup_steps}

    def rows_at(self, step):
        """Return how many rows of the stream `step` steps have taken."""
        return self.row_offset + step * self.rows_per_step

    def epoch_at(self, step):
        """Return how many passes over the rows `step` steps are."""
        return self.rows_at(step) / self.num_rows

    def ends_epoch(self, step):
        """Tell whether an optimizer step, counted from 1, takes the last row of an epoch."""
        after = self.rows_at(step)  # whole numbers: a quotient of floats may round up to the epoch's end
        return after // self.num_rows > (after - self.rows_per_step) // self.num_rows

    def is_due(self, strategy, every, step):
        """Tell whether what is done by a strategy (no, steps: each `every`, 0: never; epoch) is due after step 1, 2, ..."""
        if strategy == "epoch":
            return self.ends_epoch(step)
        return strategy == "steps" and every > 0 and step % every == 0
