"""Compiled blocks, blocks that are computed again in part, and activations that wait on the host: the same losses."""

import dataclasses
import shutil

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from train import forward_loss, make_trainable
from zerotune.model import activations
from zerotune.model.activations import WAYS, enable_gradient_checkpointing, every_nth, offload_activations
from zerotune.model.compiling import MOST_GRAPHS
from zerotune.plan.forecast import Planner
from zerotune.plan.machine import planned_machine
from zerotune.run.arguments import Arguments

STEPS = 6
CASES = {  # name: (family, strategy, flags)
    "t5-single": ("t5", None, {"freeze": "encoder", "frozen_eval": True}),
    "llama-zero2": ("llama", "zero2", {"peft": "lora", "gradient_checkpointing": "every:2", "activation_offload": True}),
    "bart-ddp": ("bart", "ddp", {"packing": True, "loss_chunks": 2}),
}


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_train_the_same(train, tiny, rows16, tmp_path, name):
    """Losses within 1e-5 over rows of any length by a few graphs, and a resumed run in the same bits."""
    family, strategy, flags = CASES[name]
    options = {
        "model_name_or_path": tiny(family), "task": "seq2seq" if family in ("t5", "bart") else "causal", "train_file": rows16,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "logging_steps": 1,
        "learning_rate": 1e-3, "save_steps": STEPS // 2, **flags,
    }  # fmt: skip
    plain = train(strategy, name="plain", **options)
    compiled = train(strategy, name="compiled", torch_compile=True, **options)
    expected, found = ([record["loss"] for record in run.records("loss")] for run in (plain, compiled))
    assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-5)
    graphs = [record["compiled_graphs"] for record in compiled.records("loss")]
    assert graphs[0] >= 1 and graphs[-1] <= 12 < MOST_GRAPHS and not plain.records("compiled_graphs")
    lengths = {record["real_tokens"] for record in compiled.records("loss")}
    assert len(lengths) == STEPS  # none of the batches is like another

    cut = tmp_path / "cut"
    shutil.copytree(compiled.folder, cut)
    for folder in (f"checkpoint-{STEPS}", "final"):
        shutil.rmtree(cut / folder)
    again = train(strategy, name="again", torch_compile=True, **options | {"output_dir": cut})
    assert again.run["resumed_from"].endswith(f"checkpoint-{STEPS // 2}")
    straight, resumed = ([(r["loss"], r["grad_norm"]) for r in run.records("loss")] for run in (compiled, again))
    assert resumed == straight


@pytest.mark.launch
def test_compiled_blocks_and_sharded_weights_do_not_go_together(train, tiny, rows16):
    options = {"model_name_or_path": tiny("t5"), "train_file": rows16}
    result = train("zero3", check=False, torch_compile=True, **options)
    assert result.code == 2 and "--torch_compile: ZeRO-3 gathers weights by hooks inside the blocks" in result.output


def model_and_batch(family):
    model_class, config = tiny_config(family, 0.0)
    torch.manual_seed(1)
    model, ids = model_class(config).train(), torch.arange(4, 52).reshape(4, 12)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).tril(8),
        "labels": ids[:, 5:].contiguous(),
        "use_cache": False,
    }
    return model, batch if model.config.is_encoder_decoder else batch | {"labels": ids}


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_one_block_in_n_is_computed_again(family):
    """Counted in FLOPs: of Llama's four equal blocks one, two or four; of two stacks with two blocks each, their first ones."""
    model, batch = model_and_batch(family)

    def flops():
        with FlopCounterMode(display=False) as counter:
            gradients(model, batch)
        return counter.get_total_flops()

    before, more = flops(), {}
    for way in WAYS[1:]:
        enable_gradient_checkpointing(model, every_nth(way))
        more[way] = flops() - before
    assert more[True] > 0
    if family == "llama":
        assert more[True] == 2 * more["every:2"] == 4 * more["every:4"]
    else:
        assert more["every:2"] == more["every:4"] and 0.4 < more["every:2"] / more[True] < 0.6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gpt2"])
def test_activations_wait_elsewhere(family, checkpointing, monkeypatch):
    """What leaves is no weight and no mask, and comes back as it was; with checkpointing it is the blocks' inputs alone."""
    model, batch = model_and_batch(family)
    if checkpointing:
        enable_gradient_checkpointing(model)
    expected = gradients(model, batch)
    left, weights = [], {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def to_host(tensor):
        assert tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights
        left.append(tensor.clone())
        return tensor.device, left[-1]

    monkeypatch.setattr(activations, "to_host", to_host)
    monkeypatch.setattr(activations, "from_host", lambda packed: packed[1].clone())
    offload_activations(model)
    found = gradients(model, batch)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    left.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which has its own copies of weights, of 16 bits
        gradients(model, batch)
    assert not [tensor.shape for tensor in left if tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes]
    left.clear()
    gradients(model, batch)
    blocks = 2 + 2 if family in ("t5", "bart") else len(model.get_decoder().layers if family == "llama" else model.transformer.h)
    count = sum(tensor.numel() > 0 for tensor in left)  # torch 2.11 saves an empty one beside each
    assert count == blocks if checkpointing else count > 4 * blocks


def test_as_few_blocks_as_there_is_room_for(tiny, rows16):
    """--gradient_checkpointing auto: less memory, more blocks; and what waits on the host is no longer on the GPU."""
    args = Arguments(
        model_name_or_path=str(tiny("llama")), task="causal", train_file=[str(rows16)], max_source_length=4096,
        per_device_train_batch_size=64, loss_chunks=64,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    planner = Planner(args, config, forward_loss, make_trainable)
    given = {"num_gpus": 1, "gpus_per_node": 1, "gpu": None, "host_memory_gib": 64, "nvme_gib": None}

    def forecast(gib=80, **flags):
        machine = planned_machine(gpu_memory_gib=gib, **given)
        return planner.forecast("single", machine, dataclasses.replace(args, **flags))

    by_hand = [forecast(gradient_checkpointing=way) for way in WAYS]
    sizes = [found.device_bytes for found in by_hand]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[-1]
    for found, way in zip(by_hand, WAYS, strict=True):
        auto = forecast((found.device_bytes + 2**20) / 2**30, gradient_checkpointing="auto")
        assert auto.fits and auto.gradient_checkpointing == way and f"gradient_checkpointing {str(way).lower()}" in auto.remark
    none = forecast(sizes[-1] / 2**31, gradient_checkpointing="auto")
    assert not none.fits and none.gradient_checkpointing is True

    plain, away = forecast(), forecast(activation_offload=True)
    assert plain.host.keys() == {"libraries"} and away.device["activations"] < plain.device["activations"] / 3
    # Some of it is copied only once and was shared before: masks of dropout, views.
    assert away.host["activations"] > plain.device["activations"] - away.device["activations"]
