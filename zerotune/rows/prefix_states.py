"""Outputs of the frozen part of a model on disk, row by row: computed once, whole or absent, shared by ranks and runs.

A folder for each (weights, rows, precision) holds states.bin, all rows end to end without padding, and done.bin, a byte for each
row. The byte is written after the row's states are on the disk, so a row that a kill or a full disk has cut off was never there.
Ranks write different places of the same files; two runs that compute the same row write the same numbers, but for rounding.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from zerotune.errors import RunError, UserError

FLUSH_SECONDS = 60  # between two times that what was computed is made to last


class PrefixStates:
    """The states of `lengths` rows, (tokens, width) each in `dtype`, under `folder`, which names what they follow from."""

    def __init__(self, folder, lengths, width, dtype):
        self.folder, self.width, self.dtype = Path(folder), width, dtype
        self.row_bytes = width * torch.empty((), dtype=dtype).element_size()
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.states = self.done = None  # descriptors of the files
        self.pending, self.flushed = set(), time.monotonic()

    @property
    def num_bytes(self):
        return int(self.ends[-1]) * self.row_bytes

    def make(self, facts):
        """Make the files where they are missing; UserError where there is no room, or another's lie there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {"states.bin": self.num_bytes, "done.bin": len(self.ends)}
        for name, size in sizes.items():
            path = self.folder / name
            if path.exists() and path.stat().st_size not in (0, size):
                raise UserError(f"{path}: {path.stat().st_size:,} bytes, not {size:,}: no cache of these rows; remove its folder")
        # The states' file is one hole at first; what is in it already needs no room.
        used = (self.folder / "states.bin").stat().st_blocks * 512 if (self.folder / "states.bin").exists() else 0
        free = shutil.disk_usage(self.folder).free
        if self.num_bytes - used > free:
            needed = (self.num_bytes - used) / 2**30
            raise UserError(
                f"--cache_frozen {self.folder.parent}: {needed:.3g} GiB are needed, and {free / 2**30:.3g} GiB are free; give a "
                "folder on another disk, or leave it out"
            )
        if not (self.folder / "states.bin").exists() or not (self.folder / "states.bin").stat().st_size:
            (self.folder / "done.bin").unlink(missing_ok=True)  # marks of states that are gone
        for name, size in sizes.items():
            with open(self.folder / name, "ab") as file:
                os.truncate(file.fileno(), size)
        (self.folder / "about.json").write_text(json.dumps(facts, indent=2) + "\n")

    def refresh(self):
        """Look which rows are there; what others write later is not seen until the next time."""
        if self.states is None:
            self.states, self.done = (os.open(self.folder / name, os.O_RDWR) for name in ("states.bin", "done.bin"))
        content = os.pread(self.done, len(self.ends), 0)
        self.there = np.frombuffer(content, dtype=np.uint8) == 1
        self.whole = bool(self.there.all())

    def place(self, row):
        """Return (first byte, bytes) of a row."""
        size = int(self.lengths[row]) * self.row_bytes
        return int(self.ends[row]) * self.row_bytes - size, size

    def read(self, rows):
        """Return the states of rows end to end, a CPU tensor (tokens, width)."""
        buffer = torch.empty(int(self.lengths[rows].sum()), self.width, dtype=self.dtype)
        view, begin = memoryview(buffer.view(torch.uint8).numpy()).cast("B"), 0
        for row in rows:
            at, size = self.place(row)
            if os.preadv(self.states, [view[begin : begin + size]], at) != size:
                raise RunError(f"{self.folder / 'states.bin'}: it has been cut short while it was in use; remove its folder")
            begin += size
        return buffer

    def write(self, rows, states):
        """Keep states of rows, end to end as `read` returns them, of rows that are not there yet."""
        content = memoryview(states.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()).cast("B")
        begin = 0
        for row in map(int, rows):
            at, size = self.place(row)
            if not self.there[row] and row not in self.pending:
                try:
                    written = os.pwrite(self.states, content[begin : begin + size], at)
                except OSError as error:
                    raise self.full(error) from None
                if written != size:
                    raise self.full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
                self.pending.add(row)
            begin += size
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def full(self, error):
        return RunError(
            f"--cache_frozen {self.folder.parent}: {error.strerror}; give it more room, or leave it out: the run goes on"
        )

    def flush(self):
        """Make what was written last, and say so in done.bin."""
        try:
            os.fdatasync(self.states)
            for row in self.pending:
                os.pwrite(self.done, b"\x01", row)
            os.fdatasync(self.done)
        except OSError as error:
            raise self.full(error) from None
        self.pending.clear()
        self.flushed = time.monotonic()
