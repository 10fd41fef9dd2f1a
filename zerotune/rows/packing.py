"""How the rows of a micro-batch are laid end to end into lines, so that little or nothing is padded."""

import numpy as np


def lines_of(sources, targets, hidden_size, multiple=1):
    """Share rows out over lines of about one length; return them as lists of row indices, every index once.

    sources, targets: tokens of each row (targets 0 without a decoder), int arrays of shape (rows,). multiple: lengths are padded to
    one. A single line has no padding, but attention over its whole length; as many lines as rows are an ordinary padded batch. The
    number of lines is the one that costs least, where the linear layers cost as much a token as attention over 6 x hidden_size
    tokens (24 h^2 and 4 h products a block and token: Kaplan et al. 2020, table 1).
    """
    number, best, best_cost = len(sources), None, None
    sizes = np.stack([sources, targets], axis=1)
    counts = sorted({number, *(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n < number)})
    for count in counts:
        lines, lengths = evened(*shared_out(sizes, count), sizes)
        source, target = (-(-int(longest) // multiple) * multiple for longest in lengths.max(axis=0))
        linear = 6 * hidden_size
        cost = count * (source * (linear + source) + target * (linear + target + source))
        if best_cost is None or cost < best_cost:
            best, best_cost = lines, cost
    return best


def shared_out(sizes, count):
    """Return (`count` lists of row indices, their tokens as an array of shape (count, 2)); sizes: (rows, 2).

    Longest rows first, each to the emptiest line (Graham 1969): the one whose fuller side, source or target, stays the emptiest.
    """
    shares = sizes / np.maximum(sizes.sum(axis=0), 1)
    lines, loads, lengths = [[] for _ in range(count)], np.zeros((count, 2)), np.zeros((count, 2), dtype=int)
    for place, row in enumerate(np.argsort(-shares.max(axis=1), kind="stable")):
        line = place if place < count else int((loads + shares[row]).max(axis=1).argmin())  # at first one each: none stays empty
        lines[line].append(int(row))
        loads[line] += shares[row]
        lengths[line] += sizes[row]
    return lines, lengths


def evened(lines, lengths, sizes, tries=40):
    """Exchange rows between the longest line and others for as long as that makes it shorter; both sides of a row count."""
    line_of = np.empty(len(sizes), dtype=int)
    for number, rows in enumerate(lines):
        line_of[rows] = number
    for side in [0, 1] * tries:
        longest = int(lengths[:, side].argmax())
        mine, others = np.flatnonzero(line_of == longest), np.flatnonzero(line_of != longest)
        if not len(others):
            break
        change = sizes[mine][:, None] - sizes[others][None]  # what the other line gains: (mine, others, 2)
        here, there = lengths[longest] - change, lengths[line_of[others]] + change
        larger = np.maximum(here, there)
        fits = (larger[:, :, side] < lengths[longest, side]) & (larger[:, :, 1 - side] <= lengths[:, 1 - side].max())
        if not fits.any():
            continue
        a, b = np.unravel_index(np.where(fits, larger[:, :, side], np.iinfo(int).max).argmin(), fits.shape)
        line = line_of[others[b]]
        lengths[longest], lengths[line] = here[a, b], there[a, b]
        line_of[mine[a]], line_of[others[b]] = line, longest
    return [np.flatnonzero(line_of == number).tolist() for number in range(len(lines))], lengths
