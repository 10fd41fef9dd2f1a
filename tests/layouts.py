"""A run that is killed again and again, and goes on under another strategy and number of processes each time.

    .venv/bin/python tests/layouts.py --out docs/layouts.json

For each model a walk over the layouts in which every ordered pair of them comes once, a SIGKILL of a random rank at each
change; then kills at random moments, a random layout after each. Demanded: what is loaded is, to the bit, what was saved; every
loss is that of the run in one go within BOUND; a kill costs one save interval and the save being written at most.
tests/test_layouts.py does a part.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import flags_of, save_tokenizer, text, tiny_config  # noqa: E402
from forks import Server  # noqa: E402
from state import state_hash  # noqa: E402
from torture import last_step, losses_of  # noqa: E402

from zerotune.run.checkpoint import list_checkpoints  # noqa: E402

STRATEGIES = "ddp zero1 zero2 zero2_offload zero3 zero3_offload".split()
LAYOUTS = [(strategy, processes) for strategy in STRATEGIES for processes in (1, 2, 4)]
MODELS = {
    "t5": {"freeze": "encoder"},
    "llama": {"task": "causal"},
    "gpt2": {"task": "causal", "peft": "lora", "target_modules": "all-linear"},
}
FIRST, SAVE_STEPS, BOUND = ("zero2", 2), 2, 1e-5
# At 1e-4 two undisturbed runs of the Llama, ZeRO-2 on 2 processes and DDP on 4, are alike to 1e-7 for 100 steps and apart by 5e-3
# after 400: it has learned its rows by heart by then, and roundings grow. At 1e-5 they are 2e-7 apart after 1,236 steps.
LEARNING_RATE = 1e-5


def walk(layouts, first):
    """Return layouts from `first` on, in which each ordered pair of different ones follows each other once (Hierholzer 1873)."""
    left = {one: [other for other in layouts if other != one] for one in layouts}
    stack, found = [first], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            found.append(stack.pop())
    return found[::-1]


def campaign(server, folder, family, legs, generator, at_random):
    """Run one model through layouts; return what happened, with "passed"."""
    run, straight, log = folder / f"{family}_run", folder / f"{family}_straight", folder / "log"
    options = MODELS[family] | {
        "model_name_or_path": folder / family, "train_file": folder / "rows.jsonl", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_total_limit": 2, "end_report": "false", "max_steps": (8 if at_random else 4) * SAVE_STEPS * len(legs) // 2 + 8,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRIPT": "tests/reload.py"}

    def start(layout, output_dir, **more):
        shutil.rmtree(f"{output_dir}_loaded", ignore_errors=True)
        log.unlink(missing_ok=True)
        flags = flags_of(options | {"output_dir": output_dir, "save_steps": SAVE_STEPS})
        return server.run(*layout, flags, log, environment | more)

    code, output = start(FIRST, straight)
    assert code == 0, output[-3000:]
    lost, kills, wrong, before, done = [], 0, [], None, 0
    for number, layout in enumerate([*legs, FIRST]):
        last = number == len(legs)
        layout = layout if before else FIRST  # without a checkpoint there is nothing to go on from
        target = {"KILLED_AFTER": f"{generator.uniform(0, 0.5):.3f}"} if at_random else {"KILLED_AT": str(done + SAVE_STEPS)}
        more = {} if last else target | {"KILLED_RANK": str(generator.randrange(layout[1]))}
        code, output = start(layout, run, **more)
        if not last and code != -9 or last and code != 0:
            wrong.append(f"{layout}: exit code {code}: {output[-500:]}")
            break
        kills += not last
        if before is not None and state_hash(list_checkpoints(f"{run}_loaded")[0][1]) != before:
            wrong.append(f"{layout}: another state was loaded than was saved")
        saved = list_checkpoints(run)
        done, before = (saved[-1][0], state_hash(saved[-1][1])) if saved else (0, None)
        lost.append(last_step(run) - done)
        print(family, layout, f"step {done}", flush=True)
    losses = [losses_of(one) for one in (straight, run)]
    error = max(abs(loss / losses[0][step] - 1) for step, loss in losses[1].items())
    if losses[0].keys() != losses[1].keys():
        wrong.append("not the same steps")
    return {
        "model": family,
        "kills": kills,
        "at": "random moments" if at_random else "each change of layout",
        "layouts": [" x ".join(map(str, layout)) for layout in legs]
        if at_random
        else f"{len(legs) - 1} of {len(LAYOUTS) * (len(LAYOUTS) - 1)} ordered pairs",
        "learning_rate": LEARNING_RATE,
        "steps": len(losses[1]),
        "largest_error_of_a_loss": error,
        "largest_loss_in_steps": max(lost),
        "wrong": wrong,
        "passed": not wrong and error <= BOUND and max(lost) <= 2 * SAVE_STEPS,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, help="so many of the walk's pairs alone; 0: no walk")
    parser.add_argument("--kills", type=int, default=50, help="at random moments, of the first model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch

    from zerotune.run.records import environment_facts

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    results, generator, server = [], random.Random(0), Server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        rows = [{"source": text(n, 1 + 4 * n), "target": text(n + 3, 1 + (n * 11) % 31)} for n in range(16)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for family in MODELS:
            torch.manual_seed(1)
            model_class, config = tiny_config(family, 0.0)
            model_class(config).save_pretrained(folder / family)
            save_tokenizer(folder / family)
        legs = {"random": [FIRST, *(generator.choice(LAYOUTS) for _ in range(args.kills - 1))]}
        plans = [(args.models[0], legs["random"], True)] if args.kills else []
        plans += [
            (family, walk(LAYOUTS, FIRST)[: args.pairs and args.pairs + 1], False) for family in args.models * (args.pairs != 0)
        ]
        for family, walked, at_random in plans:
            for leftover in folder.glob(f"{family}_*"):
                shutil.rmtree(leftover)
            results.append(campaign(server, folder, family, walked, generator, at_random))
            print({key: value for key, value in results[-1].items() if key != "layouts"}, flush=True)
            args.out.write_text(json.dumps({"environment": environment_facts(), "campaigns": results}, indent=2) + "\n")
    server.stop()
    sys.exit(not all(result["passed"] for result in results))


if __name__ == "__main__":
    main()
