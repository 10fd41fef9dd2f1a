"""The connections to the run's other machines: whether these still answer.

A machine that loses its power or its network closes no connection: gloo would wait for it as long as for a rank that computes. The
kernel knows better: what it sends is acknowledged by the other machine's kernel, however busy the processes there are.
"""

import contextlib
import os
import socket
import struct
import time

from zerotune.errors import UserError

MACHINES_TIMEOUT = 300  # seconds until a machine is missing, unless the environment's MACHINES_TIMEOUT says otherwise
PROBES = 15  # seconds at most between the kernel's questions on a connection that has nothing to say


def machines_timeout():
    """Return the seconds for which machines, their launchers and their ranks wait for each other; UserError if they are none."""
    given = os.environ.get("MACHINES_TIMEOUT") or str(MACHINES_TIMEOUT)
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"MACHINES_TIMEOUT={given}: must be a whole number of seconds, at least 1")  # torch's launcher wants one
    return int(given)


def own_addresses():
    """Return the addresses from which this process is connected, but for the loopback's; the other machines see the same ones."""
    return sorted({local for _, local, _, _ in connected() if not local.startswith("127.")})


def connected():
    """Yield (file descriptor, own address, other (address, port), socket) of this process's connections by IPv4 TCP."""
    for name in os.listdir("/proc/self/fd"):
        # Another thread may close it at any time, or may have: then nothing is yielded, and nothing is lost.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    own, other = sock.getsockname(), sock.getpeername()
                    if sock.family in (socket.AF_INET, socket.AF_INET6):
                        yield int(name), own[0].removeprefix("::ffff:"), (other[0].removeprefix("::ffff:"), other[1]), sock


class Connections:
    """This process's connections to the addresses of other machines of the run."""

    def __init__(self, others, timeout):
        """others: addresses; timeout: seconds after which a machine that does not answer is lost."""
        self.others, self.timeout, self.since = set(others), timeout, {}

    def silence(self):
        """Return {address: seconds for which it has not answered what the kernel sent or asked}, without those that answer."""
        now, found, since = time.monotonic(), {}, {}
        for number, _, (address, port), sock in connected() if self.others else ():
            if address not in self.others:
                continue
            key = number, address, port
            since[key] = self.since.get(key, now)
            if key not in self.since:
                every = max(1, min(PROBES, int(self.timeout / 4)))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127)  # who gives up is the watchdog, with a reason
            # struct tcp_info of linux/tcp.h: bytes 2 and 3 count what was sent again and what was asked without an answer.
            facts = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
            answered = struct.unpack_from("I", facts, 56)[0] / 1000
            if facts[2] or facts[3]:
                found[address] = max(found.get(address, 0.0), min(answered, now - since[key]))
        self.since = since
        return found

    def lost(self, part=1.0):
        """Return a sentence about the machines that have not answered for this part of the timeout, '' without any."""
        silence = {other: seconds for other, seconds in self.silence().items() if seconds >= part * self.timeout}
        words = ", ".join(f"{other} for {seconds:.0f} s" for other, seconds in sorted(silence.items()))
        return f"no answer from {words}: that machine is down, or the network between is" if words else ""
