"""Strategies for several large machines, held to a plain loop: hpZ. Ranks are told that they are on so many machines."""

import pytest
import torch
from safetensors.torch import load_file
from state import copy_at, state_hash
from test_equivalence import FLAGS, UPDATE_BOUND, distance, reference
from test_strategy import ARGS, change, config_of

from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import resolve
from zerotune.errors import UserError

TWO_MACHINES = {"MACHINES": "2"}
EVALUATED = {"eval_steps": 3, "predict_with_generate": False, "generation_max_length": 4}


def hold(result, folder, path, causal, frozen=()):
    """Assert that a run of FLAGS has the losses and the weights of the plain loop."""
    losses, weights = reference(folder, path, causal, frozen=frozen)
    assert [record["loss"] for record in result.records("loss")] == pytest.approx(losses, rel=1e-5)
    initial = load_file(folder / "model.safetensors")
    assert distance(result.weights(), weights, initial) < UPDATE_BOUND
    for name, weight in result.weights().items():
        if name.startswith(tuple(frozen)):
            assert torch.equal(weight, initial[name]), name
    return losses


def test_hpz_is_of_one_machines_ranks():
    def size(given, processes, machines):
        config = change("zero3_hpz", "zero_optimization.zero_hpz_partition_size", given)
        resolved = resolve(config, "zero3_hpz.json", ARGS, processes, 64, machines)
        return resolved["zero_optimization"]["zero_hpz_partition_size"]

    check_config(config_of("zero3_hpz"), "zero3_hpz.json", ARGS)
    assert size("auto", 16, 2) == 8 and size(4, 16, 2) == 4
    with pytest.raises(UserError, match="is 8, on one machine: hpZ spares traffic between machines, and there is none; use zero3"):
        size("auto", 8, 1)
    for given, processes in ((3, 16), (16, 16), (1, 16), ("2", 16), ("auto", 2)):
        with pytest.raises(
            UserError, match=f"of {processes} processes {processes // 2} are on a machine; write .auto. or a number"
        ):
            size(given, processes, 2)


@pytest.mark.launch
def test_hpz(train, tiny, rows16):
    """Two machines of two ranks, for an encoder-decoder with a frozen part and a causal model; resumed, evaluated and exported."""
    folder, options = tiny("t5"), {"train_file": rows16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= FLAGS | {"save_steps": 3, "freeze": ["encoder"], "validation_file": rows16, "test_file": rows16, **EVALUATED}
    options |= {"model_name_or_path": folder}
    straight = train("zero3_hpz", 4, name="straight", environment=TWO_MACHINES, **options)
    assert straight.run["engine"]["secondary_shards"] == [2]
    assert straight.run["deepspeed_config"]["zero_optimization"]["zero_hpz_partition_size"] == 2
    hold(straight, folder, rows16, causal=False, frozen=["encoder.", "shared."])
    evaluated = straight.records("eval_loss")
    assert len(evaluated) == 2 and evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert len((straight.folder / "predictions.jsonl").read_text().splitlines()) == 16

    copy_at(straight.folder, straight.folder.with_name("again"), 3)
    again = train("zero3_hpz", 4, name="again", environment=TWO_MACHINES, **options)
    assert again.run["resumed_from"].endswith("checkpoint-3")
    assert state_hash(again.folder / "checkpoint-6") == state_hash(straight.folder / "checkpoint-6")
    assert again.records("eval_loss") and all(torch.equal(w, again.weights()[n]) for n, w in straight.weights().items())

    llama = options | {"model_name_or_path": tiny("llama"), "task": "causal", "source_suffix": "", "freeze": None}
    hold(train("zero3_hpz", 4, name="llama", environment=TWO_MACHINES, **llama), tiny("llama"), rows16, causal=True)
