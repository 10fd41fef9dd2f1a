"""Token-exact loss: sums over target tokens, divided once by the number of target tokens of the whole step.

A mean of per-batch means weighs a token by the company it keeps: cut the same rows into other micro-batches and the update
changes. A sum divided by one global count does not depend on the cut.
"""

import torch
import torch.nn.functional as F

IGNORE = -100  # the label of a position that is no target; torch's cross_entropy skips it by default


def count_targets(batch):
    """Return the number of target positions in a collated batch, a Python int, from its CPU labels."""
    return int((batch["labels"] != IGNORE).sum())


def token_loss_sum(logits, labels):
    """Return the summed cross-entropy of the labelled positions, a float32 scalar on the logits' device.

    logits: (batch, length, vocabulary) or (batch, classes); labels: (batch, length) or (batch,), -100 where there is no
    target. The collator has already shifted the labels of causal models, so that position i predicts labels[i].
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def correct_sum(logits, labels):
    """Return how many labelled positions the most likely class gets right, an int64 scalar."""
    return ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum().to(torch.int64)
