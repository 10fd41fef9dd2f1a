"""Steps that must not be taken: non-finite numbers, fp16's overflows, gradients that never come."""

from accelerate.utils import gather_object

from zerotune.engine.precision import OverflowWatch, loss_scale, prepare_scaler, take_step
from zerotune.engine.processes import unwrap
from zerotune.errors import RunError, UserError
from zerotune.model.freezing import GradientWatch


class Guard:
    """Takes each optimizer step, unless it must not be taken."""

    def __init__(self, accelerator, model, optimizer, args, monitor, saver, lines_of_step):
        """lines_of_step: a function from a step, counted from 0, to the lines of its rows in the training file."""
        self.accelerator, self.optimizer, self.args = accelerator, optimizer, args
        self.monitor, self.saver, self.lines_of_step = monitor, saver, lines_of_step
        self.fp16, self.bad_steps = args.mixed_precision == "fp16", 0
        self.unused = GradientWatch(unwrap(model))
        plugin = accelerator.state.deepspeed_plugin
        self.overflow = OverflowWatch(prepare_scaler(optimizer, plugin and plugin.deepspeed_config))
        self.overflow.overflowed_steps = saver.counts["overflowed_steps"]

    def step(self, step, step_loss, grad_norm):
        """Step the optimizer and return whether it did; the same on every rank, and a collective.

        step: the number of this step, from 1. step_loss: this rank's summed loss; grad_norm: before clipping; device scalars.
        A step with a non-finite loss or gradient leaves weights and optimizer as they were, and a record of its rows. RunError
        after max_bad_steps of them in a row, with the last good state saved; UserError if what should learn has no gradient.
        """
        skipped = take_step(self.accelerator, self.optimizer, grad_norm)
        if self.unused is not None:
            stop_if_unused(self.unused, self.args.allow_unused, self.monitor.console)
            self.unused = None
        overflowed = False
        if self.fp16:
            # Gradients may overflow while the loss is sound: then the scale is lowered, and nothing is wrong with the rows.
            overflowed = skipped and self.accelerator.reduce(step_loss, reduction="sum").isfinite().item()
            self.overflow.after_step(step, overflowed, loss_scale(self.accelerator, self.optimizer))
            self.saver.counts["overflowed_steps"] = self.overflow.overflowed_steps
        if not skipped:
            self.bad_steps = 0
        elif not overflowed:
            self.bad_step(step)
        return not skipped

    def bad_step(self, step):
        self.bad_steps += 1
        lines = self.lines_of_step(step - 1)
        self.monitor.write({"step": step, "bad_step": "non-finite loss or gradient; weights unchanged", "train_file_lines": lines})
        if self.bad_steps == self.args.max_bad_steps:
            self.saver.save(step - self.bad_steps)
            self.saver.wait()
            raise RunError(f"step {step}: {self.bad_steps} bad steps in a row; the last good state is saved, see metrics.jsonl")


def stop_if_unused(watch, allow_unused, console):
    """Raise UserError, on every rank, naming the trainable parameters that had no gradient on any rank in the first step."""
    unused = set.intersection(*(set(names) for names in gather_object([watch.without_gradient()])))
    if unused and allow_unused:
        console.say(f"warning: {len(unused)} trainable tensors had no gradient in the first step: {', '.join(sorted(unused)[:10])}")
    elif unused:
        raise UserError(
            f"{len(unused)} trainable tensors had no gradient in the first step: {', '.join(sorted(unused)[:10])}; freeze them "
            "(--freeze re:PATTERN), or pass --allow_unused if they are used later (a mixture of experts)"
        )
