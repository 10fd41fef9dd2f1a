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
    counts = sorted({number, *(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n < number)})
    for count in counts:
        lines, lengths = shared_out(sources, targets, count)
        source, target = (-(-int(longest) // multiple) * multiple for longest in lengths.max(axis=0))
        linear = 6 * hidden_size
        cost = count * (source * (linear + source) + target * (linear + target + source))
        if best_cost is None or cost < best_cost:
            best, best_cost = lines, cost
    return best


def shared_out(sources, targets, count):
    """Return (`count` lists of row indices, their tokens as an array of shape (count, 2)).

    Longest rows first, each to the emptiest line (Graham 1969): the one whose fuller side, source or target, stays the emptiest.
    """
    sizes = np.stack([sources, targets], axis=1).astype(float)
    shares = sizes / np.maximum(sizes.sum(axis=0), 1)
    lines, loads, lengths = [[] for _ in range(count)], np.zeros((count, 2)), np.zeros((count, 2))
    for row in np.argsort(-shares.max(axis=1), kind="stable"):
        # A line that is still empty comes before all others: each must have a row.
        line = int(np.argmin([(loads[n] + shares[row]).max() if lines[n] else -1 for n in range(count)]))
        lines[line].append(int(row))
        loads[line] += shares[row]
        lengths[line] += sizes[row]
    return lines, lengths
