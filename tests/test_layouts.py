"""A run goes on under another strategy, another number of processes, another cut: the same state, the same losses."""

import shutil

import pytest
from state import state_hash

from zerotune.run.checkpoint import list_checkpoints

OPTIONS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
    "lr_scheduler_type": "constant", "save_total_limit": 1,
}  # fmt: skip
# Each layout is left and entered once. A step has 12 rows, which 1, 2, 3 and 4 processes cut as they have to.
LEGS = [
    ("zero2", 2), ("ddp", 3), ("zero3", 2), (None, 1), ("zero1", 4), ("zero3_offload", 2), ("zero2", 1), ("zero3", 3),
    ("zero2_offload", 2), ("ddp", 2),
]  # fmt: skip
MODELS = {  # family: (flags, legs)
    "t5": ({"freeze": "encoder"}, LEGS),
    "llama": ({"task": "causal"}, LEGS[1:5]),
    "gpt2": ({"task": "causal", "peft": "lora", "target_modules": "all-linear", "gradient_checkpointing": "true"}, LEGS[5:]),
}
# Float32 sums in another order: the losses of these runs differ by some 1e-7; smooth activations and 20 steps amplify nothing.
BOUND = 1e-5


@pytest.mark.launch
@pytest.mark.parametrize("family", MODELS)
def test_a_run_goes_on_in_any_layout(train, tiny, rows16, family):
    """Two steps in each layout by the same flags, against one run in one go; what is loaded is what was saved, to the bit."""
    flags, legs = MODELS[family]
    options = OPTIONS | flags | {"model_name_or_path": tiny(family), "train_file": rows16}
    straight = train("zero2", name="straight", max_steps=2 * len(legs), **options)
    losses = [record["loss"] for record in straight.records("loss")]
    before = None
    for number, (strategy, processes) in enumerate(legs, 1):
        leg = train(strategy, processes, name="run", max_steps=2 * number, environment={"SCRIPT": "tests/reload.py"}, **options)
        ((step, folder),) = list_checkpoints(leg.folder)
        assert step == 2 * number
        if before:
            loaded = leg.folder.with_name("run_loaded")
            assert state_hash(list_checkpoints(loaded)[0][1]) == before, (strategy, processes)
            shutil.rmtree(loaded)
            assert f"checkpoint-{step - 2} goes on with a change: strategy " in leg.output
        before = state_hash(folder)
    records = leg.records("loss")
    assert len(records) == len(losses) == 2 * len(legs)
    for record, loss in zip(records, losses, strict=True):
        assert abs(record["loss"] - loss) <= BOUND * loss, (record["step"], record["loss"], loss)
    told = leg.run["legs"]
    assert [(one["strategy"], one["num_processes"]) for one in told] == [(name or "single", count) for name, count in legs]
    assert [one["from_step"] for one in told] == list(range(0, 2 * len(legs), 2))
    assert f"processes {legs[0][1]} -> {legs[1][1]}" in told[1]["changes"]
