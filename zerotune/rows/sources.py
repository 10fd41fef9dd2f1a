"""Which files a run's rows come from: --train_file A B:2 'web/*.jsonl':0.5 in words, files, names and weights.

Imports nothing that takes time: the flags are checked by it before the libraries are there.
"""

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from zerotune.errors import UserError
from zerotune.rows.files import COMPRESSED, kind_of

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
WEIGHTED = re.compile(r"(.+):([^:/]*)", re.DOTALL)
WILD = re.compile(r"[*?[\]]+")
SMALLEST_SHARE = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class Source:
    """A file, or the files of a pattern in alphabetical order: what is weighted, counted and evaluated as one."""

    name: str  # in records: the file's name without its endings, or more of its path where that is not enough
    files: tuple
    weight: Fraction | None = None


def sources_of(words, flag):
    """Return the Sources of a flag's words; UserError with a line for each word that is none.

    Weights are for train_file; where one word has one, the others weigh 1. A word that is a file's path is nothing else.
    """
    problems, given = [], []
    for word in words:
        path, weight = word, None
        if not Path(word).is_file() and (match := WEIGHTED.fullmatch(word)) and (Path(match[1]).is_file() or WILD.search(match[1])):
            path, weight = match[1], match[2]
        try:
            given.append((path, files_of(path), weight_of(weight, flag)))
        except ValueError as error:
            problems.append(f"--{flag} {word}: {error}")
    files = [file for _, some, _ in given for file in some]
    for file in (file for file, count in Counter(map(os.path.abspath, files)).items() if count > 1):
        problems.append(f"--{flag} {file}: is given twice; give it once" + ", with a weight" * (flag == "train_file"))
    weights = [weight for *_, weight in given] if len(given) > 1 else [None] * len(given)  # all draws are the only one's
    if any(weight is not None for weight in weights):
        weights = [weight or Fraction(1) for weight in weights]
        for word, weight in zip(words, weights, strict=False):
            if not problems and weight / sum(weights) < SMALLEST_SHARE:
                problems.append(f"--{flag} {word}: is less than one draw in a million; leave it out, or give it a larger weight")
    if problems:
        raise UserError(*problems)
    names = names_of([path for path, *_ in given])
    return [Source(name, files, weight) for name, (_, files, _), weight in zip(names, given, weights, strict=True)]


def files_of(path):
    """Return the files of a path or pattern as a tuple of texts; raise ValueError with what is wrong."""
    if Path(path).is_file():
        files = (path,)
    elif WILD.search(path):
        files = tuple(sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file()))
        if not files:
            raise ValueError("matches no file")
    else:
        raise ValueError("no such file, or not readable")
    for file in files:
        try:
            open(file, "rb").close()
        except OSError:
            raise ValueError(
                f"{file}: no such file, or not readable" if file != path else "no such file, or not readable"
            ) from None
        if kind_of(file) not in DATA_SUFFIXES:
            which = "" if file == path else f"{file}: "
            raise ValueError(f"{which}the ending must be one of {' '.join(DATA_SUFFIXES)}, compressed: .gz or .zst after it")
    return files


def weight_of(text, flag):
    """Return a weight as it is written, exactly; raise ValueError."""
    if text is None:
        return None
    if flag != "train_file":
        raise ValueError(f"an evaluation counts each row once; leave out the weight ({text})")
    try:
        weight = Fraction(text)
    except ValueError:
        raise ValueError(f"the weight {text} is no number") from None
    if weight <= 0:
        raise ValueError(f"the weight {text} must be greater than 0; leave out a file that is not to be learned from")
    return weight


def names_of(paths):
    """Return a short name for each path or pattern, all different: its stem, or as many of its folders as it takes."""
    return [
        next((name for name in names if sum(name in others for others in map(likely_names, paths)) == 1), path)
        for path, names in zip(paths, map(likely_names, paths), strict=True)
    ]


def likely_names(path):
    """Return the names that a path may go by, the shortest first."""
    *folders, last = Path(path).parts
    bare = Path(last).stem if Path(last).suffix in COMPRESSED else last
    parts = [WILD.sub("", part).strip("-_. ") for part in (*folders, Path(bare).stem)]
    parts = [part for part in parts if part and part != "/"]
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
