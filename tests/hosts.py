"""Separate hosts on one machine: each with a network, a host name, process numbers, /tmp and caches of its own, on one switch.

For tests/test_clusters.py and tests/cluster_campaign.py. A host name means the loopback, as Debian writes it into /etc/hosts. A
host is killed as by a power cut, all its processes at once, by killing the first one of its process namespace. The checkout,
Python, and the folders that the launcher is told of stand for a file system that all hosts share.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A host's first process: it starts the launcher, notes its exit code, and stays until the host is switched off.
FIRST = """
hostname "$0" && eval "$OWN" || exit
eval "$BEFORE"
bash scripts/launch.sh "$@" >"$LOG" 2>&1
echo $? >"$LOG.code"
read -r _
exit
"""


def lacks():
    """Return what this machine lacks for hosts of their own, '' if nothing."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "hosts in network namespaces need root and iproute2"
    made = subprocess.run(["ip", "netns", "add", "zerotune-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "zerotune-try"], capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def lay_over(place, own, shared):
    """Return the shell commands that lay a folder of a host's own over `place`, in which the host still sees what it shares.

    shared: paths; of those in `place`, the folder next below it is bound to where it was, by way of /mnt.
    """
    paths = [Path(path).resolve() for path in shared]
    entries = {path.relative_to(place).parts[0] for path in paths if place in path.parents}
    commands = [["--rbind", place, "/mnt"], ["--bind", own, place]]
    own.mkdir(parents=True, exist_ok=True)
    for entry in sorted(entry for entry in entries if (place / entry).is_dir()):
        (own / entry).mkdir(exist_ok=True)
        commands.append(["--rbind", f"/mnt/{entry}", place / entry])
    return " && ".join([*(shlex.join(["mount", *map(str, words)]) for words in commands), "umount -l /mnt"])


class Hosts:
    """`count` hosts of 10.77.0.1 and on, whose cables end in a switch of 1 Gbit/s."""

    def __init__(self, count):
        # With this process's number: other tests on this machine have hosts of their own.
        self.names = [f"zerotune{os.getpid()}-{number}" for number in range(count)]
        self.switch, self.started = f"zerotune{os.getpid()}-switch", []
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            cable = f"cable{number}"
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            Path(f"/etc/netns/{name}").mkdir(parents=True, exist_ok=True)
            Path(f"/etc/netns/{name}/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            ip("-n", name, "link", "add", cable, "type", "veth", "peer", "name", cable, "netns", self.switch)
            ip("-n", self.switch, "link", "set", cable, "master", "bridge")
            ip("-n", self.switch, "link", "set", cable, "up")
            ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", cable)
            self.plug(number)
            # Without it the kernel's own speed; some kernels have no such queue.
            shape = ["qdisc", "add", "dev", cable, "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, *shape], capture_output=True)

    def address(self, number):
        return f"10.77.0.{number + 1}"

    def pull(self, number):
        """Pull a host's cable."""
        ip("-n", self.names[number], "link", "set", f"cable{number}", "down")

    def plug(self, number):
        ip("-n", self.names[number], "link", "set", f"cable{number}", "up")

    def start(self, strategy, flags, folder, first=None):
        """Start launch.sh on each host; return a Started for each.

        folder: for logs and the hosts' own files; first: {host: a shell command before the launcher}.
        """
        every = range(len(self.names))
        started = [Started(self, number, strategy, flags, Path(folder), (first or {}).get(number, "")) for number in every]
        self.started += started
        return started

    def remove(self):
        for host in self.started:
            host.kill()  # what a failed test has left
        for name in [*self.names, self.switch]:
            ip("netns", "del", name, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


class Started:
    """A host on which a launcher was started."""

    def __init__(self, hosts, number, strategy, flags, folder, before):
        name, count = hosts.names[number], len(hosts.names)
        caches, folder = Path.home() / ".cache", folder.resolve()
        shared = [ROOT, sys.prefix, sys.base_prefix, folder, *flags, os.environ.get("HF_HOME") or caches / "huggingface"]
        shared.append(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions")
        places = [place.resolve() for place in (Path("/tmp"), caches) if place.is_dir()]
        own = [lay_over(place, folder / f"{name}.own" / place.name, shared) for place in places]
        self.log = folder / f"{name}.{len(list(folder.glob(f'{name}.*.log')))}.log"
        given = {"STRATEGY": strategy, "NUM_MACHINES": count, "NUM_PROCESSES": count, "MACHINE_RANK": number}
        given |= {"MAIN_PROCESS_IP": hosts.address(0), "MACHINES_SHARED_TIMEOUT": 2, "OMP_NUM_THREADS": 1}
        given |= {"PYTHON": sys.executable, "TMPDIR": "/tmp", "HF_DATASETS_CACHE": "/tmp/rows", "HF_MODULES_CACHE": "/tmp/modules"}
        given |= {"LOG": self.log, "OWN": " && ".join(own), "BEFORE": before}
        inherited = {key: value for key, value in os.environ.items() if not key.endswith("_SOCKET_IFNAME")}
        namespaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", name, *namespaces, "bash", "-c", FIRST, name, *map(str, flags)],
            cwd=ROOT,
            env=inherited | {key: str(value) for key, value in given.items()},
            stdin=subprocess.PIPE,
        )
        end = time.monotonic() + 60
        while not (first := children(self.process.pid)) or namespace(first[0]) == namespace(self.process.pid):
            assert self.process.poll() is None and time.monotonic() < end, f"{name} did not start"
            time.sleep(0.01)
        self.first = first[0]

    def pids(self):
        """Return the numbers, outside of the host, of all its processes but the first."""
        mine = namespace(self.first)
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in everyone if mine and pid != self.first and namespace(pid) == mine and not is_zombie(pid)]

    def rank(self):
        """Return the number, outside of the host, of its first rank of train.py; None without one.

        What a test has started before launch.sh may look like a rank, but lacks the file that launch.sh gives its ranks.
        """
        for pid in self.pids():
            with contextlib.suppress(OSError):
                environment = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
                if b"\0LOCAL_RANK=0\0" in environment and b"\0ZEROTUNE_EXIT_CODE_FILE=" in environment:
                    return pid
        return None

    def signal(self, number):
        """Send launch.sh a signal, as a scheduler does."""
        for pid in children(self.first)[:1]:
            os.kill(pid, number)

    def kill(self):
        """Kill all processes of the host; the kernel closes its connections. To the others a power cut is a pulled cable."""
        self.process.kill()
        self.process.wait()

    def ended(self, besides=0):
        """Tell whether the host is off, or the launcher has ended and as many processes are left as were started before it."""
        if self.process.poll() is not None:
            return True
        return self.log.with_name(f"{self.log.name}.code").exists() and len(self.pids()) <= besides

    def wait(self, timeout=300, besides=0):
        """Wait until all processes have ended; return (exit code of launch.sh, -9 if the host was killed; output)."""
        end = time.monotonic() + timeout
        while not self.ended(besides):
            assert time.monotonic() < end, f"not ended after {timeout} s: {self.output[-3000:]}"
            time.sleep(0.05)
        if self.process.poll() is None:
            assert len(self.pids()) == besides, "a process was ended that is not the launcher's"
            self.process.stdin.close()
            self.process.wait()
        code = self.log.with_name(f"{self.log.name}.code")
        return int(code.read_text()) if code.exists() else -signal.SIGKILL, self.output

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""


def namespace(pid):
    """Return the namespace of a process's number, None if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(pid):
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []
