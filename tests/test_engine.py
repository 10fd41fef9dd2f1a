"""The engine and its surroundings: float32 sums of bf16 gradients, a rank's neighbours, folders that cannot be written, final/."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from zerotune.run import export

ONE_ROW = '{"source": "w3 w1 w4 w1 w5 w9 w2 w6", "target": "w5 w3 w5 w8 w9 w7"}\n'


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bf16_gradients_are_summed_in_float32(train, tiny, tmp_path, strategy):
    """64 equal rows as 1 x 32 are the same gradient, to the bit, as 2 equal rows as 1 x 1.

    Each micro-batch's gradient is then 1/32 of the whole, a power of two, so bf16 holds it without another rounding; float32 holds
    every partial sum of 32 of them exactly, and bf16, with 8 bits, does not: summed in bf16, the norm is 2e-3 off.
    """
    rows = [tmp_path / "2.jsonl", tmp_path / "64.jsonl"]
    for path, number in zip(rows, (2, 64), strict=True):
        path.write_text(ONE_ROW * number)
    options = {
        "model_name_or_path": tiny("llama"), "task": "causal", "mixed_precision": "bf16", "per_device_train_batch_size": 1,
        "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 0,
    }  # fmt: skip
    one = train(strategy, name="one", train_file=rows[0], **options)
    many = train(strategy, name="many", train_file=rows[1], gradient_accumulation_steps=32, **options)
    assert "data_types" not in one.run["deepspeed_config"]
    assert many.run["deepspeed_config"]["data_types"] == {"grad_accum_dtype": "fp32"}
    norms = [[record["grad_norm"] for record in run.records("loss")] for run in (one, many)]
    assert norms[0] == norms[1] and len(norms[0]) == 3
    weights = one.weights()
    assert all(tensor.equal(weights[name]) for name, tensor in many.weights().items())


WATCHED = """
import os, sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
import torch.distributed as dist
from accelerate import PartialState
from zerotune.engine.stopping import Watchdog
state = PartialState(cpu=True, backend="gloo")
watchdog = Watchdog(1.0 if state.process_index == 0 and sys.argv[1] == "stalls" else 600.0, state.process_index)
watchdog.beat()
print("neighbours", state.process_index, len(watchdog.neighbours), flush=True)
if sys.stdin.readline():
    from zerotune.run import autopsy
    autopsy.end(SimpleNamespace(accelerator=state), MemoryError("no memory"))
time.sleep(300)
"""


@pytest.mark.launch
def test_who_ends_a_node_ends_its_own_alone(tmp_path):
    """Four ranks as two nodes of two, on one machine and so with one host name, beside another run of the same ranks.

    Rank 0 stalls and its watchdog ends rank 1; then rank 2 runs out of memory and ends rank 3. Nobody else is ended by either.
    """
    (tmp_path / "watched.py").write_text(WATCHED.format(root=str(ROOT)))

    def start(rank, what, port):
        place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4 if what == "stalls" else 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, tmp_path / "watched.py", what], env=environment, text=True, **pipes)

    port = 20000 + os.getpid() % 20000
    another = [start(rank, "runs beside", port + 1) for rank in range(2)]
    assert [rank.stdout.readline() for rank in another] == ["neighbours 0 1\n", "neighbours 1 1\n"]
    ranks = [start(rank, "stalls", port) for rank in range(4)]
    assert (ranks[0].wait(timeout=120), ranks[1].wait(timeout=120)) == (1, -9)
    assert all(rank.poll() is None for rank in [*ranks[2:], *another])
    ranks[2].stdin.write("end\n")
    ranks[2].stdin.flush()
    assert (ranks[2].wait(timeout=120), ranks[3].wait(timeout=120)) == (2, -9)
    assert all(rank.poll() is None for rank in another)
    for rank in another:
        rank.kill()
        rank.communicate()
    outputs = [rank.communicate() for rank in ranks]
    assert all(f"neighbours {number} 1" in out for number, (out, _) in enumerate(outputs)), outputs
    stacks = [error.count("most recent call first") > 0 for _, error in outputs]
    assert stacks == [True, True, False, False] and "out of memory: rank 2" in outputs[2][1], outputs


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_final_survives_a_kill_while_it_is_replaced(tmp_path, moment):
    final, temporary = tmp_path / "final", tmp_path / "final.tmp"
    for folder in (final, temporary):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    if (child := os.fork()) == 0:
        rename, calls = os.rename, []

        def killed(*names):
            if len(calls) == ("before", "between", "after").index(moment):
                os.kill(os.getpid(), 9)
            calls.append(names)
            rename(*names)

        os.rename = killed
        export.replace(temporary, final)
        os.kill(os.getpid(), 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert final.exists() == (moment != "between")
    export.repair(final)
    assert (final / "name").read_text() == ("final.tmp" if moment == "after" else "final")
    assert not export.previous_of(final).exists()


@pytest.mark.launch
@pytest.mark.parametrize("family, task", [("t5", "seq2seq"), ("llama", "causal")])
def test_deterministic_kernels_are_there_for_a_run(train, tiny, rows16, family, task):
    """With --deterministic true a run, evaluation and generation included, meets no operation that has no deterministic form."""
    options = {
        "model_name_or_path": tiny(family), "task": task, "train_file": rows16, "validation_file": rows16, "max_steps": 2,
        "save_steps": 0, "logging_steps": 1, "max_target_length": 8, "gradient_checkpointing": True,
    }  # fmt: skip
    runs = [train(None, name=name, deterministic=name == "on", **options) for name in ("on", "off")]
    assert [run.run["arguments"]["deterministic"] for run in runs] == [True, False]
    losses = [[record["loss"] for record in run.records("loss")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


@pytest.mark.launch
def test_a_folder_that_cannot_be_made_is_a_line(train, tiny, rows16):
    done = train(None, check=False, model_name_or_path=tiny("t5"), train_file=rows16, output_dir="/proc/x")
    assert done.code == 2 and done.output.count("\n") == 1
    assert "--output_dir /proc/x: /proc is not writable" in done.output
