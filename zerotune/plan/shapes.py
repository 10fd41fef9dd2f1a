"""The largest micro-batches that a run's rows really make: which shapes, in which step, on which rank."""

from dataclasses import dataclass

import numpy as np

from zerotune.rows.batches import rows_of_step

ITEMS_AT_ONCE = 2_000_000  # rows that are looked at together


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows, tokens of a row's (longest) source, of its target (0: no decoder), and whether any row is padded.

    step, from 0, micro_batch and rank say where it comes first; row: of which row it is a multiple. Neither: it is no run's, but
    the largest that the flags allow.
    """

    rows: int
    source_length: int
    target_length: int = 0
    padded: bool = True
    step: int | None = None
    micro_batch: int = 0
    rank: int = 0
    row: int | None = None

    def __str__(self):
        return f"{self.rows} x {self.source_length}" + (f" + {self.target_length}" if self.target_length else "") + " tokens"

    @property
    def tokens(self):
        return self.rows * (self.source_length + self.target_length)


def largest_allowed(args):
    """Return the one shape that bounds what any rows make under the flags, [[Shape]] as `largest_shapes` does."""
    source, target = args.max_source_length, args.max_target_length if args.task == "seq2seq" else 0
    if args.task == "causal" and not args.text_column:
        source += args.max_target_length
    rows = args.per_device_train_batch_size
    if args.max_tokens_per_micro_batch:
        rows *= args.gradient_accumulation_steps
        rows = max(1, min(rows, args.max_tokens_per_micro_batch // (source + target)))
    return [[Shape(rows, source, target)]]


def largest_by_tokens(costs, limit, most_rows, multiple):
    """Return the shapes among which the largest micro-batch of at most `limit` tokens is, as largest_shapes does.

    costs: tokens of each row's source and target, (rows, 2); most_rows: that a micro-batch can have. Which rows meet in a step is
    not looked at: a shape is of the row with the longest source, target, sum, or most tokens of a side, as often as it fits.
    """
    padded = -(-costs // multiple) * multiple
    count = np.clip(limit // padded.sum(axis=1), 1, most_rows)
    measures = padded.sum(axis=1), *padded.T, *(count[:, None] * padded).T
    places = dict.fromkeys(int(measure.argmax()) for measure in measures)
    shapes = [Shape(int(count[row]), *map(int, padded[row]), row=row) for row in places]
    return [[shape] * (1 + (shape.rows < most_rows)) for shape in shapes]  # a second one comes beside the gradients of the first


def largest_shapes(costs, stream, *, rows, accumulation, num_processes, max_steps, by_length, multiple, window=1):
    """Return the shapes among which the largest micro-batch of a run is, a list of steps, each the list of its shapes.

    costs: tokens of each row's source and target, (rows, 2); rows: of a micro-batch; multiple: what lengths are padded to. A step
    is the largest first micro-batch and, where there are several, the largest that comes while gradients are there already. What is
    largest depends on the model where there is a decoder: then the longest in sum, source and target are all returned.

    Does for all steps and ranks at once what rows/batches.py does for one.
    """
    (sources, targets), size = costs.T, rows * accumulation * num_processes
    measures = [lambda s, t: s + t] + ([lambda s, t: s, lambda s, t: t] if targets.any() else [])
    best = {}
    at_once = max(1, ITEMS_AT_ONCE // size)
    for start in range(0, max_steps, at_once):
        steps = range(start, min(start + at_once, max_steps))
        items = rows_of_step(start, stream, size, len(steps), 0, window, sources + targets).reshape(len(steps), size)
        if by_length:
            order = np.argsort(-(sources + targets)[items], axis=1, kind="stable")
            items = np.take_along_axis(items, order, axis=1)
        # batches.deal: the next slice for all ranks together, dealt like cards
        dealt = items.reshape(len(steps), accumulation, rows, num_processes)
        s, t = sources[dealt], targets[dealt]
        widths = [-(-part.max(axis=2) // multiple) * multiple for part in (s, t)]
        padded = ((s != widths[0][:, :, None]) | ((t != widths[1][:, :, None]) & targets.any())).any(axis=2)
        for later in (False, True)[: 1 + (accumulation > 1)]:
            for number, measure in enumerate(measures):
                value = measure(*widths)[:, 1:] if later else measure(*widths)[:, :1]
                # Of equal ones the first that has a mask, which takes more than none.
                flat = (2 * value + padded[:, 1:] if later else 2 * value + padded[:, :1]).argmax()
                step, micro, rank = np.unravel_index(flat, value.shape)
                place = step, micro + later, rank
                found = value[step, micro, rank], bool(padded[place])
                if found > best.get((later, number), (found[0] - 1,))[:2]:
                    shape = Shape(
                        rows,
                        int(widths[0][place]),
                        int(widths[1][place]),
                        bool(padded[place]),
                        start + int(step),
                        *map(int, place[1:]),
                    )
                    best[later, number] = (*found, shape)
    pairs = [[best[later, number][2] for later in (False, True) if (later, number) in best] for number in range(len(measures))]
    return list({tuple((p.rows, p.source_length, p.target_length, p.padded) for p in pair): pair for pair in pairs}.values())
