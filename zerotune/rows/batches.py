"""Which rows go into which micro-batch: pure functions of (seed, step), so that resuming needs only the step number.

The examples form one endless stream of per-epoch permutations. Optimizer step s takes items [s*B, (s+1)*B) of that
stream, B = per-device batch x processes x accumulation: every example once an epoch, none dropped, no short last window.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a step touches at most two neighbouring epochs unless the data is smaller than B
def epoch_permutation(num_rows, seed, epoch):
    """Return the order of epoch `epoch` as an int64 array of shape (num_rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def rows_of_step(step, num_rows, batch_size, seed, num_steps=1, offset=0, window=1, lengths=None):
    """Return the row numbers, int64 of shape (num_steps * batch_size,), that optimizer steps from `step` (from 0) on learn from.

    offset: items by which the stream is shifted, in a run whose batch_size has changed on the way. window: of so many steps on end,
    which take the same rows together as they would without, each step takes rows of like length; lengths: of all rows, for that.
    """
    if window > 1:
        first, last = step // window, (step + num_steps - 1) // window
        given = num_rows, batch_size, seed, offset, window, lengths
        rows = np.concatenate([rows_of_window(number, *given) for number in range(first, last + 1)])
        return rows[step - first * window :][:num_steps].ravel()
    items = np.arange(step * batch_size, (step + num_steps) * batch_size) + offset
    epochs, places = items // num_rows, items % num_rows
    rows = np.empty(len(items), dtype=np.int64)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = epoch_permutation(num_rows, seed, int(epoch))[places[epochs == epoch]]
    return rows


def rows_of_window(number, num_rows, batch_size, seed, offset, window, lengths):
    """Return the rows of one window, int64 of shape (window, batch_size): sorted by length, the steps in random order."""
    rows = rows_of_step(number * window, num_rows, batch_size, seed, window, offset)
    rows = rows[np.argsort(-np.asarray(lengths)[rows], kind="stable")].reshape(window, batch_size)
    return rows[np.random.default_rng([seed, number, window]).permutation(window)]


def deal(rows, lengths, num_micro_batches, num_processes):
    """Cut a step's rows into micro-batches of like length.

    Sorted by length, longest first (a batch that does not fit fails at once, not after an hour); each micro-batch takes the
    next slice for all ranks together, dealt like cards so that the ranks' shares are alike too. Every row keeps its weight
    in the loss, so the update differs from any other cut by rounding only.

    Returns [micro_batch][rank] -> int64 array of row numbers, all of one size.
    """
    lengths = np.asarray(lengths)
    order = rows[np.argsort(-lengths, kind="stable")]
    return [[part[rank::num_processes] for rank in range(num_processes)] for part in np.split(order, num_micro_batches)]


def evaluation_batches(lengths, batch_size, num_processes, rank):
    """Cut all rows into this rank's evaluation batches, like lengths together, every row on exactly one rank.

    Every rank gets the same number of batches, because under ZeRO-3 each forward pass is a collective: where rows run out,
    a batch is filled with row 0 and marked as not real.

    Returns a list of (row numbers, real) pairs, both arrays of shape (batch_size,); `real` is False for fillers.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    window = batch_size * num_processes
    num_windows = -(-len(order) // window)
    padded = np.full(num_windows * window, -1)
    padded[: len(order)] = order
    mine = [part[rank::num_processes] for part in np.split(padded, num_windows)] if num_windows else []
    return [(np.where(part < 0, 0, part), part >= 0) for part in mine]
