"""When the ranks exchange gradients: once a step, or under ZeRO-2 and 3 at each micro-batch.

DDP and ZeRO-1 wait for a step's last micro-batch. ZeRO-2 and 3 reduce at each one, so that no rank holds more than its share, and
send as many times the bytes. Once is DeepSpeed's coalesce_grad_reduction (runtime/engine.py, 3239): a step's gradients are summed
on each rank first, whole ones, and reduced after the last micro-batch.
"""

import contextlib

import torch

from zerotune.engine.processes import unwrap
from zerotune.rows.batches import most_micro_batches


class Reduction:
    """Goes around a step's micro-batches, and around each of them."""

    def __init__(self, accelerator, model, choice):
        """choice: "once", "each", or None where there is none."""
        self.accelerator, self.model, self.once = accelerator, model, choice == "once"
        self.words = "at each micro-batch" if choice == "each" else "once a step"
        self.learning = [parameter for parameter in unwrap(model).parameters() if parameter.requires_grad]
        self.sums = {}  # parameter: its gradient so far, float32; of 16 bits alone, where a sum would lose the small ones
        self.block = None

    @contextlib.contextmanager
    def of_step(self, trial=False):
        """Around all forward and backward passes of a step; when it ends, DeepSpeed's optimizer has stepped.

        trial: nothing is to come of the passes; the caller forgets the gradients that the engine has by then.
        """
        if not self.once:
            yield
            return
        # Kept, and not left in an error: then its end would wait for ranks that do not come.
        self.block = self.model.coalesce_grad_reduction()
        self.block.__enter__()
        yield
        if trial:
            self.sums.clear()
            self.model.zero_grad()
        self.block.__exit__(None, None, None)
        if not trial:
            self.model.set_gradient_accumulation_boundary(True)
            self.model.step()

    @contextlib.contextmanager
    def of_micro_batch(self, is_last):
        """Around a forward and backward pass; is_last: of its step."""
        self.accelerator.sync_gradients = is_last and not self.once  # what accelerate tells DDP and DeepSpeed
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
            yield
        if self.once and (self.sums or not is_last):
            self.sum_up(is_last)

    @torch.no_grad()
    def sum_up(self, is_last):
        """Add the gradients of a pass to those before it, in float32, and give the engine the sum after the last."""
        for parameter in self.learning:
            gradient = parameter.grad
            if gradient is None or gradient.dtype == torch.float32:  # autograd's own sum is as good
                continue
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(gradient, dtype=torch.float32)
            self.sums[parameter].add_(gradient)
            # In place: a sharded parameter lets nobody give it a gradient of the whole shape.
            gradient.copy_(self.sums.pop(parameter)) if is_last else gradient.zero_()


def can_choose(args, config):
    """Tell whether gradients can be exchanged once a step or each time; config: a DeepSpeed JSON, or None."""
    zero = config["zero_optimization"] if config else {}
    return zero.get("stage") in (2, 3) and most_micro_batches(args) > 1
