"""How the rows of a micro-batch are laid end to end into lines, so that little or nothing is padded."""

import numpy as np

COUNTS = 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128  # of lines, that are tried


def lines_of(sources, targets, hidden_size, multiple=1, count=None):
    """Share rows out over lines of about one length; return them as lists of row indices, every index once.

    sources, targets: tokens of each row (targets 0 without a decoder), int arrays of shape (rows,). multiple: lengths are padded to
    one. count: of lines. A single line has no padding, but attention over its whole length; as many lines as rows are an ordinary
    padded batch. Without a count it is the one that costs least, where the linear layers cost as much a token as attention over
    6 x hidden_size tokens (24 h^2 and 4 h products a block and token: Kaplan et al. 2020, table 1).
    """
    number, sizes, linear = len(sources), np.stack([sources, targets], axis=1), 6 * hidden_size

    def cost(shared):
        lines, lengths = shared
        source, target = (-(-int(longest) // multiple) * multiple for longest in lengths.max(axis=0))
        return len(lines) * (source * (linear + source) + target * (linear + target + source))

    counts = [count] if count else sorted({number, *(n for n in COUNTS if n < number)})
    likely = sorted((shared_out(sizes, n) for n in counts), key=cost)[:3]
    return min((evened(*shared, sizes) for shared in likely), key=cost)[0]


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
    sides = [side for side in (0, 1) if sizes[:, side].any()] if len(lines) > 1 else []
    for _ in range(tries):
        helped = [exchange(side, line_of, lengths, sizes) for side in sides]
        if not any(helped):
            break
    return [np.flatnonzero(line_of == number).tolist() for number in range(len(lines))], lengths


def exchange(side, line_of, lengths, sizes):
    """Exchange a row of the line that is longest on one side with a row of another, if that helps; tell whether it did."""
    longest = int(lengths[:, side].argmax())
    mine, others = np.flatnonzero(line_of == longest), np.flatnonzero(line_of != longest)
    change = sizes[mine][:, None] - sizes[others][None]  # what the other line gains: (mine, others, 2)
    here, there = lengths[longest] - change, lengths[line_of[others]] + change
    larger = np.maximum(here, there)
    fits = (larger[:, :, side] < lengths[longest, side]) & (larger[:, :, 1 - side] <= lengths[:, 1 - side].max())
    if not fits.any():
        return False
    a, b = np.unravel_index(np.where(fits, larger[:, :, side], np.iinfo(int).max).argmin(), fits.shape)
    line = line_of[others[b]]
    lengths[longest], lengths[line] = here[a, b], there[a, b]
    line_of[mine[a]], line_of[others[b]] = line, longest
    return True
