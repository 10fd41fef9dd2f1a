"""Damage finished checkpoints in every way at random and see that each is found and the one before is taken.

    .venv/bin/python tests/corruption.py --count 201 --out docs/corruption.json

tests/test_checkpoint.py does a few of each kind.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from zerotune.run import manifest  # noqa: E402
from zerotune.run.checkpoint import choose, list_checkpoints  # noqa: E402


def damage(folder, kind, generator):
    """Damage one checkpoint; return what was done."""
    files = [folder / name for name in manifest.list_files(folder)]
    victim = generator.choice(files)
    if kind == "bit flip":
        victim = generator.choice([*files, folder / manifest.NAME])
        content = bytearray(victim.read_bytes())
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
        victim.write_bytes(content)
    elif kind == "truncation":
        victim = generator.choice([*files, folder / manifest.NAME])
        victim.write_bytes(victim.read_bytes()[: generator.randrange(victim.stat().st_size)])
    elif kind == "missing file":
        victim = generator.choice([*files, folder / manifest.NAME])
        victim.unlink()
    elif kind == "swapped shards":
        other = next(path for path in files if path != victim and path.read_bytes() != victim.read_bytes())
        contents = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(contents[1])
        other.write_bytes(contents[0])
    elif kind == "stale manifest":
        older = list_checkpoints(folder.parent)[0][1]
        shutil.copy(older / manifest.NAME, folder / manifest.NAME)
    else:
        (folder / "extra.pt").write_bytes(b"unlisted")
    return f"{kind} of {victim.name}"


KINDS = ["bit flip", "truncation", "missing file", "swapped shards", "stale manifest", "unlisted file"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--count", type=int, default=201, help="damages, shared out over the strategies")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from accelerate import Accelerator
    from torture import demo_flags, start

    import zerotune.quiet  # noqa: F401
    from zerotune.run.records import environment_facts

    accelerator, generator, results = Accelerator(cpu=True), random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = demo_flags(folder, 9)
        for strategy in args.strategies:
            run, victim = folder / strategy, folder / "victim"
            with open(folder / "log", "w") as log:
                assert start(strategy, run, flags, log).wait() == 0, (folder / "log").read_text()[-3000:]
            (before, _), (last, _) = list_checkpoints(run)
            saved = manifest.read(run / f"checkpoint-{last}")
            compared = saved["fingerprint"], saved["layout"], []
            kinds, found = Counter(), 0
            for number in range(args.count // len(args.strategies)):
                kind = KINDS[number % len(KINDS)]
                shutil.copytree(run, victim)
                damage(victim / f"checkpoint-{last}", kind, generator)
                taken, content, _ = choose(accelerator, victim, "auto", *compared, lambda text: None)
                found += taken.name == f"checkpoint-{before}" and content["step"] == before
                kinds[kind] += 1
                shutil.rmtree(victim)
            results.append({"strategy": strategy, "damaged": sum(kinds.values()), "found_and_fell_back": found, "kinds": kinds})
            print(results[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment_facts(), "campaigns": results}, indent=2) + "\n")
    sys.exit(any(result["damaged"] != result["found_and_fell_back"] for result in results))


if __name__ == "__main__":
    main()
