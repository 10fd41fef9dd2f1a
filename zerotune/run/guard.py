"""Steps that must not be taken: non-finite numbers, loss spikes, fp16's overflows, gradients that never come."""

from accelerate.utils import gather_object

from zerotune.engine.precision import OverflowWatch, loss_scale, prepare_scaler, take_step
from zerotune.engine.processes import unwrap
from zerotune.errors import RunError, UserError
from zerotune.model.freezing import GradientWatch
from zerotune.run.spikes import LossSpikes


class Guard:
    """Takes each optimizer step, unless it must not be taken."""

    def __init__(self, accelerator, model, optimizer, args, monitor, saver, lines_of_step, state=None):
        """lines_of_step: a function from a step, counted from 0, to the lines of its rows in the training file.

        state: of a manifest.
        """
        self.accelerator, self.optimizer, self.args = accelerator, optimizer, args
        self.monitor, self.saver, self.lines_of_step = monitor, saver, lines_of_step
        self.fp16 = args.mixed_precision == "fp16"
        state = state or {"in_a_row": [0, 0], "loss_spikes": 0, "losses": []}
        (self.bad_steps, self.spikes_in_a_row), self.loss_spikes = state["in_a_row"], state["loss_spikes"]
        self.spikes = LossSpikes(args.max_loss_spike, state["losses"]) if args.max_loss_spike else None
        self.loss, self.spike = None, False  # of the present step
        self.unused = GradientWatch(unwrap(model))
        plugin = accelerator.state.deepspeed_plugin
        self.overflow = OverflowWatch(prepare_scaler(optimizer, plugin and plugin.deepspeed_config))
        self.overflow.overflowed_steps = saver.counts["overflowed_steps"]

    def state(self):
        """Return what a resumed run has to know, as a dict of JSON values."""
        losses = list(self.spikes.losses) if self.spikes else []
        return {"in_a_row": [self.bad_steps, self.spikes_in_a_row], "loss_spikes": self.loss_spikes, "losses": losses}

    def is_spike(self, step_loss, targets):
        """Tell whether a step's loss is a spike, before its last backward; with --max_loss_spike a collective.

        step_loss: this rank's summed loss; targets: those of all ranks; device scalars. The caller makes the gradients nan, and
        `step` meets a non-finite loss: under DeepSpeed nothing else keeps the last backward from stepping.
        """
        if self.spikes is None:
            return False
        self.loss = (self.accelerator.reduce(step_loss, reduction="sum") / targets).item()
        self.spike = self.spikes.is_spike(self.loss)
        return self.spike

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
            overflowed = skipped and not self.spike and self.accelerator.reduce(step_loss, reduction="sum").isfinite().item()
            self.overflow.after_step(step, overflowed, loss_scale(self.accelerator, self.optimizer))
            self.saver.counts["overflowed_steps"] = self.overflow.overflowed_steps
        if not skipped:
            self.bad_steps = self.spikes_in_a_row = 0
            if self.spikes:
                self.spikes.taken(self.loss)
        elif not overflowed:
            self.bad_step(step)
        return not skipped

    def bad_step(self, step):
        self.bad_steps += 1
        what, more = "non-finite loss or gradient", {}
        if self.spike:
            self.loss_spikes, self.spikes_in_a_row = self.loss_spikes + 1, self.spikes_in_a_row + 1
            what = f"loss spike: {self.loss:.4g} is above {self.args.max_loss_spike:g} times the median, {self.spikes.median:.4g}"
            more = {"loss_spikes": self.loss_spikes}
        lines = self.lines_of_step(step - 1)
        self.monitor.write({"step": step, "bad_step": f"{what}; weights unchanged", **more, "train_file_lines": lines})
        if self.bad_steps >= self.args.max_bad_steps:
            count, self.loss_spikes = self.bad_steps, self.loss_spikes - self.spikes_in_a_row
            self.bad_steps = self.spikes_in_a_row = 0  # as after the last step that was taken
            self.saver.save(step - count)
            self.saver.wait()
            raise RunError(f"step {step}: {count} bad steps in a row; the last good state is saved, see metrics.jsonl")


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
