"""What a step costs beside its passes, in Python calls and bytes; tests/overhead.py has the times."""

import json
import os

import pytest
from conftest import flags_of

from zerotune.tools.synthetic import build_rows

# Calls of a step, with its record, and of each of its micro-batches: a third more than were counted (289 and 123).
OF_STEP, OF_MICRO_BATCH = 385, 164


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for length in (16, 64):
        build_rows(folder / f"{length}.jsonl", 64, [length // 2, length // 2], [length // 2, length // 2])
    return folder


def clocked(forks, folder, model, rows, strategy, accumulation):
    out = folder / f"{strategy}-{rows.stem}-{accumulation}.json"
    flags = {
        "model_name_or_path": model, "task": "causal", "train_file": rows, "output_dir": out.with_suffix(""), "max_steps": 6,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant",
        "save_steps": 0,
    }  # fmt: skip
    environment = {"SCRIPT": "tests/step_clock.py", "OMP_NUM_THREADS": "1"}
    _, output = forks.run(strategy, None, [str(out), *flags_of(flags)], out.with_suffix(".log"), {**os.environ, **environment})
    assert out.exists(), output[-3000:]
    return json.loads(out.read_text())


@pytest.mark.launch
def test_python_calls_of_a_step(forks, tiny, rows, tmp_path):
    """So many a step and so many a micro-batch, the same for rows of any length; none walks over the model's modules."""
    cases = ((16, None, 2), (16, None, 8), (64, None, 2), (16, "zero2", 2))
    found = [clocked(forks, tmp_path, tiny("llama"), rows / f"{case[0]}.jsonl", *case[1:]) for case in cases]
    calls = [sum(facts["calls"].values()) for facts in found]
    assert calls[0] == calls[2]
    of_micro_batch = (calls[1] - calls[0]) / 6
    assert of_micro_batch < OF_MICRO_BATCH and calls[0] - 2 * of_micro_batch < OF_STEP
    for facts in found:
        assert "module.py:Module.named_modules" not in facts["calls"]

    alone, sharded = found[0], found[3]
    assert not alone["collective_bytes"] and sharded["collective_bytes"]["allreduce"] >= 4 * sharded["parameters"]["trainable"]
    steps = [step["bare_loss"] for step in alone["steps"]]
    assert len(steps) == 4 and steps == pytest.approx(alone["losses"][:4], rel=1e-5)  # the bare loop takes the same steps
