"""Which rows go into which micro-batch: pure functions of (seed, step), so that resuming needs only the step number.

The examples form one endless stream of per-epoch permutations, or of draws from several sources. Optimizer step s takes items
[s*B, (s+1)*B) of that stream, B = per-device batch x processes x accumulation: every example once an epoch, none dropped, no short
last window.
"""

import math

import numpy as np

BLOCK = 256  # draws whose shares are exact, in random order; more where a source's share is smaller than one of them


class Stream:
    """The endless stream of rows that a run learns from: item 0, 1, ... is a row's number and follows from (seed, item) alone.

    sizes: rows of each source, numbered on end; each is gone through in permutations of its own. weights: Fractions, by which
    draws are shared out over the sources; None: all rows are one source.
    """

    def __init__(self, seed, sizes, weights=None):
        self.seed, self.source_sizes, self.weights = seed, list(sizes), None
        self.sizes = self.source_sizes if weights else [sum(sizes)]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.counted = 0, np.zeros(len(self.source_sizes), dtype=np.int64)  # the newest answer of `drawn`
        self.newest = {}  # source: (pass, its permutation), as steps go on from one to the next
        self.newest_block = None, None  # (number, its draws)
        if weights:
            whole = math.lcm(*(weight.denominator for weight in weights))
            self.weights = [int(weight * whole) for weight in weights]
            self.block = max(BLOCK, -(-sum(self.weights) // min(self.weights)))

    def rows(self, begin, end):
        """Return items [begin, end) as row numbers, int64."""
        if self.weights is None:
            return self.passed(0, np.arange(begin, end))
        first, last = begin // self.block, (end - 1) // self.block
        blocks = [self.draws(block) for block in range(first, last + 1)]
        sources, places = (np.concatenate(part) for part in zip(*blocks, strict=True))
        wanted = slice(begin - first * self.block, end - first * self.block)
        sources, places, rows = sources[wanted], places[wanted], np.empty(end - begin, dtype=np.int64)
        for source in np.unique(sources):
            rows[sources == source] = self.passed(int(source), places[sources == source])
        return rows

    def passed(self, source, places):
        """Return the rows at places 0, 1, ... of a source's own stream of permutations."""
        size = self.sizes[source]
        passes, places = places // size, places % size
        rows = np.empty(len(places), dtype=np.int64)
        for number in np.unique(passes):
            if self.newest.get(source, (None,))[0] != number:
                # A single source has the seeds it always had: a run that began before there were several goes on.
                words = [self.seed, int(number)] + ([source, 1] if self.weights else [])
                self.newest[source] = number, np.random.default_rng(words).permutation(size).astype(np.int32)
            rows[passes == number] = self.newest[source][1][places[passes == number]]
        return rows + self.starts[source]

    def draws(self, block):
        """Return (the source of each draw of a block, how many of its source came before it), int64 arrays."""
        if self.newest_block[0] == block:
            return self.newest_block[1]
        before = self.shares(block * self.block)
        counts = self.shares((block + 1) * self.block) - before
        sources = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([np.arange(n, n + count) for n, count in zip(before, counts, strict=True)])
        # In order of their places within a source, sources in random order.
        order = np.random.default_rng([self.seed, block, 0, 2]).permutation(sources)
        result = np.empty(self.block, dtype=np.int64)
        result[np.argsort(order, kind="stable")] = places
        self.newest_block = block, (order, result)
        return order, result

    def shares(self, draws):
        """Return how many of a whole number of blocks' draws each source has: its share, rounded so that they add up.

        The largest remainders are rounded up. A block has room for one draw of each source, so no count is less than before.
        """
        exact, total = [draws * weight for weight in self.weights], sum(self.weights)
        counts = np.array([part // total for part in exact])
        by_remainder = sorted(range(len(exact)), key=lambda source: -(exact[source] % total))
        counts[by_remainder[: draws - counts.sum()]] += 1
        return counts

    def drawn(self, item):
        """Return how many of the first `item` items each source has."""
        if self.weights is None:
            size, (begin, counts) = self.sizes[0], self.counted
            if not begin <= item < begin + size:
                begin, counts = item // size * size, item // size * np.array(self.source_sizes)
            sources = np.searchsorted(np.cumsum(self.source_sizes), self.rows(begin, item), side="right")
            self.counted = item, counts + np.bincount(sources, minlength=len(counts))
            return self.counted[1]
        begin = item // self.block * self.block
        sources, _ = self.draws(begin // self.block)
        return self.shares(begin) + np.bincount(sources[: item - begin], minlength=len(self.weights))


def rows_of_step(step, stream, batch_size, num_steps=1, offset=0, window=1, lengths=None):
    """Return the row numbers, int64 of shape (num_steps * batch_size,), that optimizer steps from `step` (from 0) on learn from.

    offset: items by which the stream is shifted, in a run whose batch_size has changed on the way. window: of so many steps on end,
    which take the same rows together as they would without, each step takes rows of like length; lengths: of all rows, for that.
    """
    if window > 1:
        first, last = step // window, (step + num_steps - 1) // window
        rows = np.concatenate([rows_of_window(n, stream, batch_size, offset, window, lengths) for n in range(first, last + 1)])
        return rows[step - first * window :][:num_steps].ravel()
    return stream.rows(step * batch_size + offset, (step + num_steps) * batch_size + offset)


def rows_of_window(number, stream, batch_size, offset, window, lengths):
    """Return the rows of one window, int64 of shape (window, batch_size): sorted by length, the steps in random order."""
    rows = rows_of_step(number * window, stream, batch_size, window, offset)
    rows = rows[np.argsort(-np.asarray(lengths)[rows], kind="stable")].reshape(window, batch_size)
    return rows[np.random.default_rng([stream.seed, number, window]).permutation(window)]


def most_micro_batches(args):
    """Return how many micro-batches a process may cut a step into at most: with a limit in tokens one a row."""
    rows = args.per_device_train_batch_size if args.max_tokens_per_micro_batch else 1
    return args.gradient_accumulation_steps * rows


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


def deal_by_tokens(rows, costs, limit, num_processes, packed=False):
    """Cut rows, in their order and dealt like cards, into micro-batches of at most `limit` tokens on each rank.

    rows: int64 array whose length num_processes divides. costs: tokens of each row's source and target, shape (rows, 2). A
    micro-batch's tokens are those of its padded tensors, rows x (longest source + longest target), or packed those of its rows. A
    single row is a micro-batch however long it is. As many micro-batches on every rank, each of as many rows.

    Returns [micro_batch][rank] -> int64 array of row numbers.
    """
    dealt, costs = rows.reshape(-1, num_processes), costs.reshape(-1, num_processes, 2)
    result, begin = [], 0
    while begin < len(dealt):
        # No more than `limit` rows fit, as each has a token: a look ahead that is bounded however many rows there are.
        ahead = costs[begin : begin + limit]
        if packed:
            tokens = ahead.sum(axis=2).cumsum(axis=0).max(axis=1)
        else:
            tokens = np.maximum.accumulate(ahead, axis=0).sum(axis=2).max(axis=1) * np.arange(1, len(ahead) + 1)
        count = max(1, int(np.searchsorted(tokens, limit, side="right")))
        result.append(list(dealt[begin : begin + count].T))
        begin += count
    return result


def evaluation_batches(costs, num_processes, rank, batch_size, limit=None, packed=False):
    """Cut all rows into this rank's evaluation batches, like lengths together, every row on exactly one rank.

    costs: as in deal_by_tokens; limit: of a batch's tokens, in place of batch_size, its rows. Every rank gets the same number of
    batches, because under ZeRO-3 each forward pass is a collective: where rows run out, the shortest row stands in, marked as not
    real.

    Returns a list of (row numbers, real) pairs, arrays of one size; `real` is False for fillers.
    """
    order = np.argsort(-costs.sum(axis=1), kind="stable")
    if not len(order):
        return []
    places = np.arange(-(-len(order) // num_processes) * num_processes)
    if limit is None:
        window = batch_size * num_processes
        places = np.arange(-(-len(order) // window) * window)
        batches = [part[rank::num_processes] for part in np.split(places, len(places) // window)]
    else:
        clipped = costs[order[np.minimum(places, len(order) - 1)]]
        batches = [ranks[rank] for ranks in deal_by_tokens(places, clipped, limit, num_processes, packed)]
    return [(order[np.minimum(part, len(order) - 1)], part < len(order)) for part in batches]
