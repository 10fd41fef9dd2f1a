"""Fill a real file system in the middle of every file of a save, one run for each, and see that only that save is lost.

    .venv/bin/python tests/full_disk.py --out docs/full_disk.json      (as root: it mounts tmpfs)

Each run's output folder lies on a tmpfs with room for one checkpoint and a part of the next. tests/test_checkpoint.py does a few.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from torture import demo_flags, start  # noqa: E402

from zerotune.run import manifest  # noqa: E402
from zerotune.run.checkpoint import list_checkpoints  # noqa: E402

PAGE = 4096  # tmpfs counts whole pages


def pages(size):
    return -(-size // PAGE) * PAGE


def measure(strategy, folder, flags):
    """Return [(name, bytes in pages)] of a checkpoint's files in the order in which they are written."""
    with open(folder / "log", "w") as log:
        assert start(strategy, folder / "measure", flags, log).wait() == 0, (folder / "log").read_text()[-3000:]
    checkpoint = list_checkpoints(folder / "measure")[-1][1]
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    return [(path.relative_to(checkpoint).as_posix(), pages(path.stat().st_size)) for path in files]


def fill(strategy, folder, flags, files, index):
    """Run with a disk that is full in the middle of the index-th file of the second save; return what is wrong, '' if nothing."""
    disk = folder / f"disk{index}"
    disk.mkdir()
    before = sum(size for _, size in files)  # the first checkpoint, whole
    before += sum(size for _, size in files[:index]) + files[index][1] // (2 * PAGE) * PAGE  # whole pages of half the file
    records = pages((folder / "measure" / "run.json").stat().st_size) + PAGE  # metrics.jsonl has one page by then
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={before + records}", "tmpfs", disk], check=True)
    (disk / "run" / "report.html").mkdir(parents=True)  # no page can be written there, whose size would have to be foreseen here
    try:
        with open(folder / "log", "w") as log:
            start(strategy, disk / "run", flags, log).wait(timeout=300)
        output, found = (folder / "log").read_text(), list_checkpoints(disk / "run")
        if "save_failed" not in output:
            return "no save failed"
        if "step 9  epoch" not in output:
            return f"the run did not go on: {output[-2000:]}"
        if not found or manifest.verify(found[-1][1])[1]:
            return f"no whole checkpoint is left: {found}"
        leftovers = [path.name for path in (disk / "run").glob("checkpoint-*.tmp")]
        return f"left behind: {leftovers}" if leftovers else ""
    finally:
        subprocess.run(["umount", disk], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import zerotune.quiet  # noqa: F401
    from zerotune.run.records import environment_facts

    results = []
    for strategy in args.strategies:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            flags = [*demo_flags(folder, 9), "--save_total_limit", "1"]
            files = measure(strategy, folder, flags)
            for index, (file, _) in enumerate(files):
                results.append({"strategy": strategy, "full_in": file, "wrong": fill(strategy, folder, flags, files, index)})
                print(results[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment_facts(), "runs": results}, indent=2) + "\n")
    sys.exit(any(result["wrong"] for result in results))


if __name__ == "__main__":
    main()
