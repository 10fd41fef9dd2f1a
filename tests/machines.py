"""Make other machines out of this one and run the tests on each: other processors, another user, folders that are not writable.

    sudo .venv/bin/python tests/machines.py --out docs/machines.json     docs/machines.md beside it; goes on where it was stopped
    .venv/bin/python tests/machines.py --out runs/m.json --only avx2 --tests "tests/test_equivalence.py -k bart"

The variants that need root (another user, mounts) are named as left out without it; the other user has to be able to reach the
interpreter, wherever it is installed. What is not stated is as the machine has it.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

USER = 4321  # of no account
VARIANTS = {  # name: (what it stands for, environment)
    "as it is": ("this machine", {}),
    "default": ("a processor without vector units", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "avx2": ("a processor with AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "aten default": ("other kernels of torch alone", {"ATEN_CPU_CAPABILITY": "default"}),
    "onednn sse41": ("other products of oneDNN alone", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "two threads": ("two threads a rank", {"OMP_NUM_THREADS": "2"}),
    "allocator": ("glibc with one arena, each block mapped", {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}),
    "path": ("a checkout in a folder with a space and a letter beyond ASCII", {}),
    "read-only home": ("a home folder that cannot be written", {}),
    "small shm": ("64 MiB of /dev/shm, as in a container", {}),
    "user": ("a user other than root; without CI, so that what root alone may do is skipped", {"CI": ""}),
}
# The interpreter by its own path, not by a link in the checkout: DeepSpeed's operators are compiled anew when their includes move.
PYTHON = str(ROOT / ".venv/bin/python")
NEEDS_ROOT = ("read-only home", "small shm", "user")
DEFAULT_TESTS = "-m launch"


def command_of(name, scratch, tests):
    """Return the command that runs the tests as a variant has it."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    if name == "read-only home":
        home = scratch / "home"
        home.mkdir(exist_ok=True)
        mount = f"mount --bind {home} {home} && mount -o remount,bind,ro {home}"
        return ["unshare", "-m", "bash", "-c", f'{mount} && export HOME={home} && exec "$@"', "bash", *pytest]
    if name == "small shm":
        return ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "bash", *pytest]
    if name == "user":
        subprocess.run(["chown", "-R", str(USER), scratch], check=True)
        return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--", *pytest]
    return pytest


def run(name, tests, timeout):
    """Return what one variant came to."""
    scratch = Path(tempfile.mkdtemp(prefix="machines-"))
    scratch.chmod(0o755)
    checkout = scratch / ("a path with ü" if name == "path" else "checkout")
    try:
        subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
        operators = scratch / "torch_extensions"  # of DeepSpeed: built once for all variants
        built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or ROOT / ".cache/torch_extensions")
        if built.is_dir():
            shutil.copytree(built, operators)
        environment = os.environ | VARIANTS[name][1] | {"TMPDIR": str(scratch), "TORCH_EXTENSIONS_DIR": str(operators)}
        environment |= {"HF_HOME": str(scratch / "huggingface"), "PYTHON": PYTHON} | (
            {"HOME": str(scratch)} if name == "user" else {}
        )
        begin = time.time()
        command = command_of(name, scratch, tests)
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=timeout)
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout.splitlines()[-1])}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return {"counts": counts, "failed": failed, "code": done.returncode, "seconds": round(time.time() - begin)}
    except subprocess.TimeoutExpired:
        return {"counts": {}, "failed": ["timeout"], "code": -1, "seconds": timeout}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(results):
    """Return the results as Markdown."""
    facts = results["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "deepspeed", "transformers"))
    lines = ["# The tests on other machines", "", f"Written by tests/machines.py on an {facts['cpu']}; {versions}.", ""]
    lines += ["| variant | what it stands for | tests | passed | failed | skipped | commit |", "|---|---|---|---|---|---|---|"]
    for name, (what, environment) in VARIANTS.items():
        settings = " ".join(f"`{key}={value}`" for key, value in environment.items())
        found = results["variants"].get(name)
        if found:
            counts = [str(found["counts"].get(word, 0)) for word in ("passed", "failed", "skipped")]
            cells = [name, f"{what}{': ' * bool(settings)}{settings}", f"`{found['tests']}`", *counts, found["git_commit"][:12]]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{name}: {test}" for name, found in results["variants"].items() for test in found["failed"])]
    return "\n".join(lines).rstrip() + "\n"


def main():
    from zerotune.run.records import environment_facts, write_json

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--tests", default=DEFAULT_TESTS, help="words for pytest")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a variant may take")
    args = parser.parse_args()
    os.environ.setdefault("CI", "true")  # nothing is skipped
    facts = environment_facts() | {"command_line": None}
    facts["cpu"] = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    results = json.loads(args.out.read_text()) if args.out.exists() else {"variants": {}}
    results["environment"] = facts
    for name in args.only:
        if name in NEEDS_ROOT and os.geteuid() != 0:
            print(f"{name}: left out, it needs root")
            continue
        if results["variants"].get(name, {}).get("code") != 0:
            what = {"tests": args.tests, "git_commit": facts["git_commit"]}
            results["variants"][name] = run(name, shlex.split(args.tests), args.timeout) | what
            print(f"{name}: {results['variants'][name]}", flush=True)
            write_json(args.out, results)
            args.out.with_suffix(".md").write_text(table(results))
    return int(any(found["code"] for found in results["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
