"""Ends that are not the end of training: signals, and ranks that stall.

A signal sets a flag on the rank that got it and nothing more; the ranks agree on it at the next step or evaluation batch, save, and
exit with 128 + its number. A second SIGINT ends the rank at once. A rank without a heartbeat for too long has every rank of its
machine dump its stacks and ends the job; another machine that does not answer for as long ends it from the rank's start to its end.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from zerotune.engine.connections import Connections
from zerotune.engine.ending import SIGNALS, finish, leave_note
from zerotune.engine.processes import COLLECTIVE_TIMEOUT, first_here, neighbours, other_addresses, signal_to


class Interrupted(Exception):
    """Raised on every rank when a signal has been agreed on inside an evaluation."""


class Stopper:
    """Remembers a stop signal of this rank and lets the ranks agree on it."""

    def __init__(self):
        self.received, self.received_at, self.known = 0, 0.0, 0
        self.wished = False
        # On GPUs the agreement goes through a group of its own on the CPU: it waits for no kernel.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if several else None
        # Python runs a handler only between two of its own instructions, never inside a collective that waits for a lost rank. The
        # interpreter's wake-up socket gets the signal's number at once, and a thread takes note of it.
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader):
        while numbers := reader.recv(1):
            number = numbers[0]
            # A terminal's Ctrl-C can reach a rank twice, directly and through the launcher; a person needs a second for another.
            if number == self.received == signal.SIGINT and time.monotonic() - self.received_at > 1.0:
                finish(128 + number)
            if not self.received and number in SIGNALS:
                self.received, self.received_at = number, time.monotonic()

    def agreed(self, wish=False):
        """Return the number of a signal that any rank has got, 0 if none; a collective, until one is known.

        wish: whatever else a rank wants; `wished` then tells, on all ranks, whether any wanted it.
        """
        if not self.known:
            flags = torch.tensor([self.received, int(wish)])
            if self.group is not None:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
            self.known, self.wished = int(flags[0]), bool(flags[1])
        return self.known

    def interrupt(self):
        """Raise Interrupted if a signal is agreed on; for loops inside an evaluation."""
        if self.agreed():
            raise Interrupted


class Watchdog:
    """A thread that ends this machine's ranks when there is no more hope for them.

    From the first `beat` to `stop`: when it has not been called for `timeout` seconds on this rank. All the time, on the first rank
    of a machine: when another machine has not answered for as long.
    """

    def __init__(self, timeout, rank):
        self.timeout, self.rank, self.last = timeout, rank, float("inf")
        self.neighbours = neighbours()
        self.connections = Connections(other_addresses(), timeout)
        faulthandler.enable()  # NCCL aborts a rank that it gives up
        # Another rank's watchdog asks for this one's stacks by SIGUSR2; faulthandler answers even from inside a library's C code.
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self):
        self.last = time.monotonic()

    def stop(self):
        self.last = float("inf")

    def _watch(self):
        tick, asked = min(1.0, self.timeout / 10), 0.0
        while time.monotonic() - self.last < self.timeout:
            time.sleep(tick)
            if self.rank == first_here() and time.monotonic() - asked >= min(10.0, 2 * tick):
                asked = time.monotonic()
                if lost := self.connections.lost():  # no note: the file system may lie behind the same cable, and hold this process
                    print(f"rank {self.rank}: {lost}; ending this machine's ranks", file=sys.stderr, flush=True)
                    self._kill()
        self._end()

    def _end(self):
        """Dump this rank's stacks, have the neighbours dump theirs, then end them all."""
        lost = self.connections.lost(0.5)
        reason = f"no progress for {self.timeout:g} s{lost and ', '}{lost}"
        print(f"rank {self.rank}: {reason}, ending the job; stacks follow", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        # Beside, as the file system may be what hangs.
        threading.Thread(target=leave_note, args=[reason], daemon=True).start()
        for number in (signal.SIGCONT, signal.SIGUSR2):  # a stopped process answers only once it goes on
            for pid in self.neighbours:
                signal_to(pid, number)
        time.sleep(5)
        self._kill()

    def _kill(self):
        for pid in self.neighbours:
            signal_to(pid, signal.SIGKILL)
        os._exit(1)
