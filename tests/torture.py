"""Kill random ranks of a run at random times, start it again with the same command until it is done, compare it with one in one go.

    .venv/bin/python tests/torture.py --out docs/torture.json

Each kill is a SIGKILL of one of two ranks at a random moment of training; saves are so frequent that many fall into one. Demanded:
the same bits in the end, at most one save interval lost by each kill, nothing repaired by hand. tests/test_checkpoint.py runs a
short form.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SAVE_STEPS = 3


def ranks_of(output_dir):
    """Return {rank: pid} of the training processes that write to output_dir."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(output_dir).encode() in words and b"--config_file" not in words:
                rank = [item[5:] for item in environment if item.startswith(b"RANK=")]
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if rank:
                    found.setdefault(int(rank[0]), []).append((int(entry.name), parent))
    # A data worker has its rank's command line too; the rank itself is the one whose parent is none of them.
    pids = {pid for group in found.values() for pid, _ in group}
    return {rank: next(pid for pid, parent in group if parent not in pids) for rank, group in found.items()}


def start(strategy, output_dir, flags, log, environment=None):
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), *flags, "--output_dir", str(output_dir)]
    environment = {**os.environ, "STRATEGY": strategy, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for_training(process, output_dir, since, timeout=300):
    """Return True once the run that was started at `since` trains, False if it ended before."""
    run, end = Path(output_dir) / "run.json", time.time() + timeout
    while time.time() < end:
        if run.exists() and run.stat().st_mtime > since and len(ranks_of(output_dir)) == 2:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise TimeoutError(f"{output_dir}: no training after {timeout} s")


def last_step(output_dir):
    """Return the last step that metrics.jsonl tells of; a line torn by the kill does not count."""
    steps = [0]
    path = Path(output_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            continue
    return max(steps)


def campaign(strategy, kills, flags, folder, generator):
    """Run one strategy to its end under `kills` kills; return a dict of what happened, with "passed"."""
    from state import state_hash

    from zerotune.run.checkpoint import list_checkpoints

    log = open(folder / f"{strategy}.log", "w")  # noqa: SIM115  open for the whole campaign
    straight, tortured = folder / f"{strategy}_straight", folder / f"{strategy}_tortured"
    assert start(strategy, straight, flags, log).wait() == 0, (folder / f"{strategy}.log").read_text()[-3000:]
    done, inside_saves, lost, starts, resumed_from = 0, 0, [], 0, []
    while True:
        since, starts = time.time(), starts + 1
        process = start(strategy, tortured, flags, log)
        trains = wait_for_training(process, tortured, since)
        if trains:
            resumed_from.append(json.loads((tortured / "run.json").read_text())["resumed_from"])
        if trains and done < kills:
            time.sleep(generator.uniform(0, 1.2))
            ranks = ranks_of(tortured)
            if not ranks or process.poll() is not None:
                continue
            rank = generator.choice(sorted(ranks))
            try:
                os.kill(ranks[rank], signal.SIGKILL)
            except ProcessLookupError:
                continue
            done += 1
            process.wait(timeout=60)  # a dead rank ends the job
            while ranks_of(tortured):  # the launcher ends before the last rank is gone
                time.sleep(0.05)
            inside_saves += bool(list(tortured.glob("checkpoint-*.tmp")))
            saved = list_checkpoints(tortured)
            lost.append(last_step(tortured) - (saved[-1][0] if saved else 0))
            print(f"{strategy}: kill {done} of rank {rank} at step {last_step(tortured)}, {lost[-1]} steps lost", flush=True)
        elif process.wait() == 0:
            break
    log.close()
    final = sorted(path.name for path in straight.glob("checkpoint-*"))[-1]
    hashes = [state_hash(run / final) for run in (straight, tortured)]
    exports = [(run / "final" / "model.safetensors").read_bytes() for run in (straight, tortured)]
    damaged = [path.name for path in tortured.glob("*.damaged*")]
    passed = hashes[0] == hashes[1] and exports[0] == exports[1] and max(lost, default=0) <= SAVE_STEPS and not damaged
    return {
        "strategy": strategy,
        "kills": done,
        "kills_that_left_a_part_of_a_save": inside_saves,
        "starts": starts,
        "largest_loss_in_steps": max(lost, default=0),
        "save_steps": SAVE_STEPS,
        "damaged_checkpoints": damaged,
        "state_hash_straight": hashes[0],
        "state_hash_tortured": hashes[1],
        "passed": passed,
    }


def demo_flags(folder, steps):
    """Return the flags of a small T5 with dropout and a frozen encoder on made-up rows, and write its files."""
    from conftest import save_tokenizer, text, tiny_config

    model_class, config = tiny_config("t5", 0.1)
    model_class(config).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    rows = [{"source": text(n, 1 + n % 40), "target": text(n + 3, 1 + n % 20)} for n in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "rows.jsonl")),
        *("--freeze", "encoder.layers[0]", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--max_steps", str(steps), "--save_steps", str(SAVE_STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--campaigns",
        nargs="+",
        default="ddp:no:18:600 zero2:no:18:240 zero3:bf16:18:240 zero3_offload:bf16:6:90".split(),
        help="each STRATEGY:PRECISION:KILLS:STEPS",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import zerotune.quiet  # noqa: F401
    from zerotune.run.records import environment_facts

    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = random.Random(args.seed)
        for words in args.campaigns:
            strategy, precision, kills, steps = words.split(":")
            flags = [*demo_flags(folder, int(steps)), "--mixed_precision", precision]
            result = {"mixed_precision": precision, "steps": int(steps)}
            results.append(campaign(strategy, int(kills), flags, folder, generator) | result)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": environment_facts(), "campaigns": results}, indent=2) + "\n")
    sys.exit(not all(result["passed"] for result in results))


if __name__ == "__main__":
    main()
