"""Loss spikes: steps whose loss is finite, and so far above those before it that learning from it would do harm."""

import math
import statistics
from collections import deque

WINDOW = 64  # losses that the median is of
FEWEST = 16  # no spike is told of fewer: the first losses of a run fall fast


class LossSpikes:
    """The losses of the last steps that were taken, per target token and over all ranks."""

    def __init__(self, factor, losses=()):
        """factor: a loss above this many times the median is a spike. losses: the window, of a manifest."""
        self.factor, self.losses = factor, deque(losses, maxlen=WINDOW)

    @property
    def median(self):
        return statistics.median(self.losses)

    def is_spike(self, loss):
        """Tell whether a step's loss is one; losses that may be negative have no spikes while their median is."""
        return math.isfinite(loss) and len(self.losses) >= FEWEST and loss > self.factor * self.median > 0

    def taken(self, loss):
        """Take note of the loss of a step that was taken; a spike's is not, so that one does not hide the next."""
        self.losses.append(loss)
