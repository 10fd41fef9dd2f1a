"""fp16's loss scale: count the steps that overflow, and stop a run that learns nothing any more."""

from zerotune.errors import UserError

PATIENCE = 20  # overflowed steps in a row at the smallest loss scale before the run stops


class OverflowWatch:
    """Counts optimizer steps skipped for overflowed fp16 gradients."""

    def __init__(self, minimum=1.0):
        """minimum: the loss scale under which scaling no longer helps (DeepSpeed's min_loss_scale; 1 elsewhere)."""
        self.minimum, self.overflowed_steps, self.stuck = minimum, 0, 0

    def after_step(self, step, skipped, loss_scale):
        """Take note of one step; raise UserError after PATIENCE overflows in a row with the loss scale at its minimum."""
        self.overflowed_steps += bool(skipped)
        self.stuck = self.stuck + 1 if skipped and loss_scale <= self.minimum else 0
        if self.stuck >= PATIENCE:
            raise UserError(
                f"step {step}: fp16 gradients overflowed {PATIENCE} steps in a row at the smallest loss scale "
                f"({self.minimum:g}), so nothing is learned; use --mixed_precision bf16 (or no), or a smaller --learning_rate"
            )


def take_step(accelerator, optimizer):
    """Let the optimizer step and return whether it skipped the step for non-finite gradients.

    Under DeepSpeed the last backward has stepped already and this only asks. With accelerate's scaler a smaller scale is the sign:
    a fused optimizer is called in any case and skips by itself, so that accelerate's own flag would never be set.
    """
    if accelerator.scaler is None:
        optimizer.step()
        return accelerator.optimizer_step_was_skipped
    before = accelerator.scaler.get_scale()
    optimizer.step()
    return accelerator.scaler.get_scale() < before


def loss_scale(accelerator, optimizer):
    """Return fp16's present loss scale, from accelerate's scaler or from DeepSpeed's optimizer."""
    if accelerator.scaler is not None:
        return accelerator.scaler.get_scale()
    return float(optimizer.optimizer.loss_scale)


def prepare_scaler(optimizer, deepspeed_config):
    """Return the smallest loss scale that fp16 can fall to, and keep DeepSpeed's scaler from raising when it gets there.

    DeepSpeed's own exception comes at the first overflow there, without advice; OverflowWatch waits for PATIENCE of them.
    """
    if deepspeed_config is None:
        return 1.0
    scaler = getattr(optimizer.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False
    fp16 = deepspeed_config.get("fp16", {})
    return float(fp16.get("loss_scale") or fp16.get("min_loss_scale", 1))
