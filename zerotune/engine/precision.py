"""Steps that must not be taken: non-finite numbers, and fp16's overflows with the loss scale that follows them."""

import math

from zerotune.errors import RunError

PATIENCE = 20  # overflowed steps in a row at the smallest loss scale before the run stops


class OverflowWatch:
    """Counts optimizer steps skipped for overflowed fp16 gradients."""

    def __init__(self, minimum=1.0):
        """minimum: the loss scale under which scaling no longer helps (DeepSpeed's min_loss_scale; 1 elsewhere)."""
        self.minimum, self.overflowed_steps, self.stuck = minimum, 0, 0

    def after_step(self, step, skipped, loss_scale):
        """Take note of one step; raise RunError after PATIENCE overflows in a row with the loss scale at its minimum."""
        self.overflowed_steps += bool(skipped)
        self.stuck = self.stuck + 1 if skipped and loss_scale <= self.minimum else 0
        if self.stuck >= PATIENCE:
            raise RunError(
                f"step {step}: fp16 gradients overflowed {PATIENCE} steps in a row at the smallest loss scale "
                f"({self.minimum:g}), so nothing is learned; use --mixed_precision bf16 (or no), or a smaller --learning_rate"
            )


def take_step(accelerator, optimizer, grad_norm):
    """Let the optimizer step, unless gradients are not finite; return whether the step was skipped, the same on every rank.

    A rank's non-finite loss makes its gradients so, and their reduction everyone's. Under DeepSpeed the last backward has stepped
    or skipped already and this only asks. With accelerate's scaler a smaller scale is the sign: a fused optimizer is called in any
    case and skips by itself, so that accelerate's own flag would never be set.
    """
    if accelerator.state.deepspeed_plugin is not None:
        skipped, inner = accelerator.optimizer_step_was_skipped, optimizer.optimizer
        if skipped and getattr(inner, "cpu_offload", False):
            # ZeRO-2 with offload sums 16-bit gradients of several micro-batches in buffers that it does not empty after a skipped
            # step (zero/stage_1_and_2.py, 3057): the next steps would add to what is not finite.
            inner.averaged_gradients = dict.fromkeys(inner.averaged_gradients)
        return skipped
    if accelerator.scaler is not None:
        before = accelerator.scaler.get_scale()
        optimizer.step()
        return accelerator.scaler.get_scale() < before
    if not math.isfinite(float(grad_norm)):
        return True
    optimizer.step()
    return False


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
