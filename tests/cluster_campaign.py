"""Preempt, kill and cut off hosts of a run at random times, start it again with the same command until it is done, compare.

    .venv/bin/python tests/cluster_campaign.py --out docs/cluster_campaign.json

Hosts in network namespaces (tests/hosts.py; root), one rank each. A fault is a SIGTERM to one launcher, as a scheduler preempts; a
SIGKILL of all processes of a host; or a host's cable pulled, which to the others is also what a power cut is. Demanded: the
processes of all hosts end by themselves, the newest checkpoint is whole, and in the end weights, optimizer and losses are the
straight run's, bit for bit. EARLY of the faults come before the first step.
tests/test_clusters.py runs a short form.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts import Hosts  # noqa: E402
from torture import demo_flags, last_step, losses_of, start  # noqa: E402

KINDS = ("preempted", "killed", "cable pulled")
HANG_TIMEOUT = 15  # seconds, of --hang_timeout_seconds
EARLY = 0.2  # a share


def strike(hosts, started, kind, number):
    """Do a fault to a host; return the seconds until all processes of all hosts had ended."""
    if kind == "preempted":
        started[number].signal(signal.SIGTERM)
    elif kind == "killed":
        started[number].kill()
    else:
        hosts.pull(number)
    since = time.monotonic()
    for host in started:
        host.wait(timeout=1000)
    seconds = time.monotonic() - since
    if kind == "cable pulled":
        hosts.plug(number)
    return seconds


def compare(straight, struck):
    """Return what differs between a run in one go and one that was struck, '' if nothing."""
    from state import state_hash

    final = sorted(straight.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1].name
    if state_hash(straight / final) != state_hash(struck / final):
        return f"{final}: other weights or states"
    if len({(run / "final" / "model.safetensors").read_bytes() for run in (straight, struck)}) > 1:
        return "final/: other weights"
    return "" if losses_of(straight) == losses_of(struck) else "other losses"


def damaged(folder):
    """Return what is wrong with the newest checkpoint of a run, an empty list if nothing or there is none."""
    from zerotune.run import manifest
    from zerotune.run.checkpoint import list_checkpoints

    saved = list_checkpoints(folder)
    return [*folder.glob("*.damaged*"), *(manifest.verify(saved[-1][1])[1] if saved else [])]


def campaign(count, strategy, faults, steps, folder, generator, until=float("inf")):
    """Run a strategy on `count` hosts to its end under faults; return a dict of what happened, with "passed".

    until: a moment of time.time() after which no further fault is done.
    """
    from zerotune.run.checkpoint import list_checkpoints

    flags = [*demo_flags(folder, steps), "--hang_timeout_seconds", str(HANG_TIMEOUT)]
    flags += ["--deterministic", "true"] if strategy == "ddp" and count > 2 else []
    straight, struck = folder / "straight", folder / "struck"
    with open(folder / "straight.log", "w") as log:
        assert start(f"{strategy}:{count}", straight, flags, log).wait() == 0, (folder / "straight.log").read_text()[-3000:]
    hosts, done, starts, resumed_from, wrong = Hosts(count), [], 0, [], []
    try:
        while True:
            since, begin, starts = time.time(), time.monotonic(), starts + 1
            started = hosts.start(strategy, [*flags, "--output_dir", struck], folder)
            strikes = len(done) < faults and time.time() < until
            early = strikes and generator.random() < EARLY
            moment = generator.uniform(1, 8) if early else generator.uniform(0, 1.5)
            run = struck / "run.json"
            while not (trains := run.exists() and run.stat().st_mtime > since) and not any(host.ended() for host in started):
                if early and time.monotonic() - begin > moment:
                    break
                time.sleep(0.02)
            if trains:
                found = json.loads(run.read_text())["resumed_from"]
                resumed_from.append(int(found.rpartition("-")[2]) if found else 0)
            if trains and strikes:
                time.sleep(moment)
            if strikes and not any(host.ended() for host in started):
                kind, number = KINDS[len(done) % len(KINDS)], generator.randrange(count)
                seconds = strike(hosts, started, kind, number)
                saved = list_checkpoints(struck)
                done.append(
                    {
                        "kind": kind,
                        "host": number,
                        "before_the_first_step": not trains,
                        "step": last_step(struck),
                        "checkpoint": saved[-1][0] if saved else 0,
                        "part_of_a_save": bool(list(struck.glob("checkpoint-*.tmp"))),
                        "exit_codes": [host.wait()[0] for host in started],
                        "seconds_until_all_had_ended": round(seconds, 1),
                    }
                )
                print(f"{strategy} on {count}: {len(done)}: {done[-1]}", flush=True)
                wrong += map(str, damaged(struck))
            else:
                ends = [host.wait(timeout=1000) for host in started]
                assert all(code == 0 for code, _ in ends), [output[-3000:] for _, output in ends]
                break
    finally:
        hosts.remove()
    wrong += filter(None, [compare(straight, struck)])
    return {
        "hosts": count,
        "strategy": strategy,
        "steps": steps,
        "hang_timeout_seconds": HANG_TIMEOUT,
        "starts": starts,
        "resumed_from_steps": resumed_from,
        "faults": done,
        "wrong": wrong,
        "passed": not wrong,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["2:zero3:12:400", "3:ddp:12:300"]
    parser.add_argument("--campaigns", nargs="+", default=default, help="each HOSTS:STRATEGY:FAULTS:STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further fault is done")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import zerotune.quiet  # noqa: F401
    from zerotune.run.records import environment_facts

    until, results = time.time() + 60 * args.minutes, []
    for number, words in enumerate(args.campaigns):
        count, strategy, faults, steps = words.split(":")
        with tempfile.TemporaryDirectory() as folder:
            generator = random.Random(args.seed + number)
            results.append(campaign(int(count), strategy, int(faults), int(steps), Path(folder), generator, until))
        args.out.write_text(json.dumps({"environment": environment_facts(), "campaigns": results}, indent=2) + "\n")
    sys.exit(not all(result["passed"] for result in results))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["MACHINES_TIMEOUT"] = "60"  # seconds, for the waits before the first step
    main()
