"""Kill random ranks of a run at random times, start it again with the same command until it is done, compare it with one in one go.

    .venv/bin/python tests/torture.py --out docs/torture.json

Each kill is a SIGKILL of one rank at a random moment of training; saves are so frequent that many fall into the write of one.
Demanded: the same bits in the end, at most one save interval and the save being written lost by a kill, nothing repaired by hand.
In the campaign "any" each start has another strategy and number of processes, and losses agree within BOUND.
tests/test_checkpoint.py runs a short form.
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
# "any": each start has another of these layouts. A step has 12 rows.
LAYOUTS = "ddp:2 ddp:3 ddp:4 zero1:2 zero2:1 zero2:2 zero2:4 zero2_offload:2 zero3:2 zero3:3 zero3:4 zero3_offload:2".split()
BOUND = 1e-5  # of losses, between layouts: their sums are in another order


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
    """strategy: a name, or one with a number of processes, such as zero3:4."""
    strategy, _, processes = strategy.partition(":")
    environment = {"NUM_PROCESSES": processes} | (environment or {}) if processes else environment
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), *flags, "--output_dir", str(output_dir)]
    environment = {**os.environ, "STRATEGY": strategy, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for_training(process, output_dir, since, timeout=300, processes=2):
    """Return True once the run that was started at `since` trains on so many processes, False if it ended before."""
    run, end = Path(output_dir) / "run.json", time.time() + timeout
    while time.time() < end:
        if run.exists() and run.stat().st_mtime > since and len(ranks_of(output_dir)) == processes:
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


def losses_of(output_dir):
    """Return {step: loss} of metrics.jsonl."""
    records = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def campaign(strategy, kills, flags, folder, generator):
    """Run one strategy to its end under `kills` kills; return a dict of what happened, with "passed"."""
    from state import state_hash

    from zerotune.run.checkpoint import list_checkpoints

    log = open(folder / f"{strategy}.log", "w")  # noqa: SIM115  open for the whole campaign
    anywhere, layouts = strategy == "any", []
    straight, tortured = folder / f"{strategy}_straight", folder / f"{strategy}_tortured"
    assert start("zero2" if anywhere else strategy, straight, flags, log).wait() == 0, (folder / f"{strategy}.log").read_text()[
        -3000:
    ]
    done, inside_saves, lost, starts, resumed_from = 0, 0, [], 0, []
    while True:
        since, starts = time.time(), starts + 1
        layouts.append(generator.choice(LAYOUTS) if anywhere and layouts else f"{strategy.replace('any', 'zero2')}:2")
        process = start(layouts[-1], tortured, flags, log)
        trains = wait_for_training(process, tortured, since, processes=int(layouts[-1].partition(":")[2]))
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
    losses = [losses_of(run) for run in (straight, tortured)]
    error = max(abs(loss / losses[0][step] - 1) for step, loss in losses[1].items())
    same = error <= BOUND if anywhere else hashes[0] == hashes[1] and exports[0] == exports[1] and error == 0
    # A kill may find two saves unfinished: the one that is being written and the interval after it.
    passed = same and losses[0].keys() == losses[1].keys() and max(lost, default=0) <= 2 * SAVE_STEPS and not damaged
    return {
        "strategy": strategy,
        "kills": done,
        "kills_that_left_a_part_of_a_save": inside_saves,
        "starts": starts,
        "layouts": layouts if anywhere else [],
        "largest_error_of_a_loss": error,
        "largest_loss_in_steps": max(lost, default=0),
        "save_steps": SAVE_STEPS,
        "damaged_checkpoints": damaged,
        "state_hash_straight": hashes[0],
        "state_hash_tortured": hashes[1],
        "passed": passed,
    }


def demo_flags(folder, steps, dropout=0.1):
    """Return the flags of a small T5 with a frozen encoder block on made-up rows, and write its files."""
    from conftest import save_tokenizer, text, tiny_config

    model_class, config = tiny_config("t5", dropout)
    model_class(config).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    rows = [{"source": text(n, 1 + n % 40), "target": text(n + 3, 1 + n % 20)} for n in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "rows.jsonl")),
        *("--freeze", "encoder.layers[0]", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--max_steps", str(steps), "--save_steps", str(SAVE_STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"),
        *("--end_report", "false"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--campaigns",
        nargs="+",
        default="ddp:no:18:600 zero2:no:18:240 zero3:bf16:18:240 zero3_offload:bf16:6:90 any:no:50:1500".split(),
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
            anywhere = strategy == "any"
            flags = [*demo_flags(folder, int(steps), 0.0 if anywhere else 0.1), "--mixed_precision", precision]
            if anywhere:  # a rate at which a rounding stays one over so many steps
                flags += ["--gradient_accumulation_steps", "3", "--learning_rate", "1e-4"]
            result = {"mixed_precision": precision, "steps": int(steps)}
            results.append(campaign(strategy, int(kills), flags, folder, generator) | result)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": environment_facts(), "campaigns": results}, indent=2) + "\n")
    sys.exit(not all(result["passed"] for result in results))


if __name__ == "__main__":
    main()
