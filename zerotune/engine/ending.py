"""How a process ends: its exit code, the lines of a mistake, and the signals that end it. Imports no library that takes time."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from zerotune.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What gloo and NCCL say on a rank whose partner has gone.
LOST = re.compile("Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted")
ADDRESS = re.compile(r"\[((?:\d+\.){3}\d+)\]")  # gloo tells it
STARTED_AGAIN = "ZEROTUNE_STARTED_AGAIN"  # how often this process has taken another's place
failures = None  # the folder of a run in which ranks leave notes on their failures, once the run has one
EXIT_CODE_FILE = "ZEROTUNE_EXIT_CODE_FILE"  # scripts/launch.sh reads the code there: the launcher itself always ends with 1


def restore_default_signals():
    """Let a signal end this process: until a Stopper takes note of them, and when it has nothing left to save.

    scripts/launch.sh's launcher ignores them, and its children inherit that.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def ignore_signals(worker_id=0):
    """Let a data worker live on at a signal: Slurm sends it to every process of a job, and the rank saves only while they live.

    A worker ends when its rank says so, or has ended.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_code(code):
    """Write the exit code of a failed run where scripts/launch.sh finds it."""
    if code and os.environ.get(EXIT_CODE_FILE):
        Path(os.environ[EXIT_CODE_FILE]).write_text(f"{code}\n")


def finish(code):
    """End this process with an exit code that scripts/launch.sh can pass on.

    Without the interpreter's own end: the libraries' threads do not always survive it (one launch in a hundred aborted there), and
    a finished run must not be reported as a failed one.
    """
    leave_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_again(words=(), environment=None):
    """Take this process's place with a new one of the same command line, `words` added to it; on every rank.

    The process keeps its number, by which the launcher knows it; a count of restarts keeps the new ranks' meeting apart from the
    old (processes.meet_again).
    """
    import multiprocessing

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise when a data worker ends
    for child in multiprocessing.active_children():  # they would stay: their parent's number does
        child.kill()
        child.join()
    os.environ |= {**(environment or {}), STARTED_AGAIN: str(int(os.environ.get(STARTED_AGAIN, "0")) + 1)}
    sys.stdout.flush()
    sys.stderr.flush()
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with contextlib.suppress(OSError):  # the list's own is gone by now
                os.set_inheritable(number, False)  # the others learn of the end by their lost connections
    os.execv(sys.executable, [sys.executable, *sys.argv, *words])


def exit_for(error):
    """End this process if a line says what an exception is; otherwise leave a note and return, as its traceback says more."""
    if isinstance(error, UserError):
        exit_with(error)
    exit_if_another_failed(error)
    words = str(error).strip().splitlines() or [""]
    leave_note(f"{type(error).__name__}: {words[0]}", "".join(traceback.format_exception(error)))


def leave_note(reason, text=""):
    """Say why this rank ends where it is found: in torchrun's report of the ranks, and in a file in the run's failures/.

    reason: a line. The files are named by the time: with several machines, whose logs know nothing of each other, the first one of
    a launch is of what ended it.
    """
    now, rank = datetime.now(UTC), os.environ.get("RANK", "0")
    with contextlib.suppress(OSError, MemoryError):  # nothing may keep this rank from its end; the log says it as well
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            told = text or reason
            facts = {"message": told, "extraInfo": {"py_callstack": told, "timestamp": str(int(now.timestamp()))}}
            write_whole(Path(path), json.dumps({"message": facts}))  # torchrun dies of half of one
        if failures is not None:
            failures.mkdir(exist_ok=True)
            stamp = now.isoformat(timespec="milliseconds").removesuffix("+00:00")
            write_whole(failures / f"{stamp}-rank{rank}.txt", f"rank {rank}, {socket.gethostname()}\n{reason}\n{text}")


def write_whole(path, text):
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


def exit_with(error):
    """Print a UserError's problems, a line each, and end with its code.

    All ranks tend to meet the same mistake. The launcher ends them all when the first one ends: the others let rank 0 speak, and
    speak up only if it had nothing to say.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        restore_default_signals()
        time.sleep(5)
    where = f" (rank {rank})" if rank > 0 else ""
    lines = "\n".join(f"train.py: error{where}: {problem}" for problem in error.problems)
    print(lines, file=sys.stderr, flush=True)
    leave_note(error.problems[0], f"{lines}\n")
    finish(error.code)


def exit_if_another_failed(error):
    """End with a line in place of a traceback if this rank failed because another one has gone; that one has said why.

    It waits before it does: the launcher ends all ranks of a machine at the first one's end, and names that one.
    """
    if isinstance(error, RuntimeError) and (found := LOST.search(str(error))):
        reason = f"the connection to another rank has ended ({', '.join([found[0], *ADDRESS.findall(str(error))[:1]])})"
        where = f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()})"
        print(f"train.py: error: {where}: {reason}; what ended that one is said by itself", file=sys.stderr, flush=True)
        restore_default_signals()
        time.sleep(5)
        leave_note(reason)
        os._exit(1)  # leaves no code: it would take the place of the other's
