"""How long the training stands still for a save, beside the copy alone and beside a save that is waited for.

    .venv/bin/python tests/save_cost.py --out docs/save_cost.json

A T5 of 45 M parameters, two processes under DDP, ZeRO-2 and ZeRO-3 on the CPU; each save is repeated, the three in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
REPEATS = 7


def measure():
    """Be a rank: train one step, then save again and again; the main process prints its seconds as JSON."""
    import train
    from zerotune.run.arguments import arguments_or_exit
    from zerotune.run.saving import copied, size_of
    from zerotune.run.state_files import tensors_to_save

    run = train.setup(arguments_or_exit())
    train.load_rows(run)
    train.cut_steps(run)
    train.load_model(run)
    train.accompany(run, train.resume(run))
    train.train(run, 0)
    copies = {}
    found = {"copy": [], "stall": [], "waited_for": []}
    for repeat in range(1, REPEATS + 1):
        run.accelerator.wait_for_everyone()
        begin = time.perf_counter()
        tensors, _ = tensors_to_save(run.accelerator, run.model, run.optimizer)
        copies = copied(tensors, copies)
        found["copy"].append(time.perf_counter() - begin)
        size = sum(map(size_of, copies.values()))
        begin = time.perf_counter()
        run.saver.save(repeat)
        found["stall"].append(time.perf_counter() - begin)
        run.saver.wait()
        found["waited_for"].append(time.perf_counter() - begin)
    if run.accelerator.is_main_process:
        print("SAVES " + json.dumps(found | {"bytes_a_rank": size}), flush=True)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    import torch
    import transformers as t
    from conftest import save_tokenizer, text

    from zerotune.run.records import environment_facts

    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(1)
        config = t.T5Config(vocab_size=8000, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0)
        t.T5ForConditionalGeneration(config).save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps({"source": text(n, 5), "target": "w1"}) + "\n" for n in range(4)))
        for strategy in ("ddp", "zero2", "zero3"):
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            command += ["--config_file", f"accelerate_configs/{strategy}.yaml", "--num_processes", "2", __file__]
            command += ["--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "rows.jsonl")]
            command += ["--output_dir", str(folder / strategy), "--max_steps", "1", "--save_steps", "0", "--save_total_limit", "1"]
            command += ["--per_device_train_batch_size", "2"]
            environment = os.environ | {"SAVE_COST_RANK": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("SAVES ")] or sys.exit(
                done.stdout + done.stderr
            )
            found = json.loads(line.removeprefix("SAVES "))
            seconds = {kind: [round(value, 4) for value in found[kind]] for kind in ("copy", "stall", "waited_for")}
            median = {kind: statistics.median(values) for kind, values in seconds.items()}
            results[strategy] = {"bytes_a_rank": found["bytes_a_rank"], "seconds": seconds, "median": median}
            results[strategy]["stall_of_waited_for"] = round(median["stall"] / median["waited_for"], 3)
            print(strategy, results[strategy]["median"], results[strategy]["stall_of_waited_for"], flush=True)
    out.write_text(json.dumps({"environment": environment_facts(), "saves": results}, indent=2) + "\n")


if __name__ == "__main__":
    measure() if "SAVE_COST_RANK" in os.environ else main()
