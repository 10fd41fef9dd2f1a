"""Strategies for large machines, held to a plain loop: hpZ, tensor parallel, sequences cut over ranks."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from state import copy_at, state_hash
from test_equivalence import FLAGS, UPDATE_BOUND, batch_loss, distance, load_rows, reference
from test_strategy import ARGS, change, config_of, launch_sh

from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import resolve
from zerotune.engine.sequence_parallel import launch_problems
from zerotune.engine.sequence_parallel import model_problems as sequence_problems
from zerotune.engine.tensor_parallel import model_problems
from zerotune.errors import UserError
from zerotune.rows.collation import stretch_of
from zerotune.tools import checkpoint

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


def test_hpz_is_of_one_machines_ranks(tiny, rows16, tmp_path):
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
    flags = ["--model_name_or_path", tiny("t5"), "--train_file", rows16, "--output_dir", tmp_path]
    pod = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # machines that launch.sh finds out
    for processes, code in (("4", 0), ("2", 2)):
        done = launch_sh(*flags, STRATEGY="zero3_hpz", NUM_PROCESSES=processes, DRY_RUN="1", **pod)
        assert done.returncode == code and ("of 2 processes 1 are on a machine" in done.stderr) == (code == 2), done.stderr


def plain_loss(final, rows):
    """Return the mean loss of rows under an exported causal model."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        loss = batch_loss(AutoModelForCausalLM.from_pretrained(final), rows, causal=True, reduction="sum")
    return loss.item() / sum(label != -100 for row in rows for label in row[1])


def plain_generations(final, rows, length):
    """Return what an exported causal model makes of each row's prompt, alone in a batch and so without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, texts = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final), []
    for ids, labels in rows:
        prompt = torch.tensor([ids[: next(place for place, label in enumerate(labels) if label != -100) + 1]])
        made = model.generate(input_ids=prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))
    return texts


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

    # Weights come from all ranks once a step, and at the first not even that; all else comes from the machine's own copy.
    options |= {"model_name_or_path": tiny("llama"), "task": "causal", "source_suffix": "", "freeze": None, "test_file": None}
    counted = train("zero3_hpz", 4, name="llama", environment=TWO_MACHINES | {"SCRIPT": "tests/gathered.py"}, **options)
    hold(counted, tiny("llama"), rows16, causal=True)
    lines = [line.partition("gathered ")[2] for line in counted.output.splitlines()]
    first, *later = [json.loads(line) for line in lines if line]
    assert len(later) == FLAGS["max_steps"] - 1 and set(first) == {"2"}
    weights = sum(weight.numel() for weight in counted.weights().values())
    assert all(0.9 * weights < step["4"] <= weights < 1.5 * step["2"] for step in later)  # some small ones stay everywhere


TP = {"autotp_size": 2, "vocab_parallel_lm_head": False}


@pytest.mark.parametrize(
    "section, flags, words",
    [
        ({"autotp_size": 1}, {}, "tensor_parallel.autotp_size is 1; give a number of ranks above 1"),
        ({"autotp_size": "auto"}, {}, "tensor_parallel.autotp_size is 'auto'; give a number of ranks"),
        ({"autotp_size": 2}, {}, "vocab_parallel_lm_head must be false: train.py's loss wants whole logits"),
        ({"tp_size": 2}, {}, "unknown key tensor_parallel.tp_size .did you mean autotp_size"),
        (TP, {"peft": "lora"}, "--peft: has not been seen to go with tensor_parallel"),
        (TP, {"optim": "lion_8bit"}, "--optim lion_8bit: has not been seen to go with tensor_parallel"),
        (TP, {"task": "seq2seq"}, "--task seq2seq: tensor_parallel is for causal models .llama, mistral, qwen2, qwen3."),
    ],
)
def test_tensor_parallel_refuses(section, flags, words):
    args = dataclasses.replace(ARGS, **{"task": "causal", **flags})
    check_config(config_of("zero2_tp"), "zero2_tp.json", dataclasses.replace(ARGS, task="causal"))
    with pytest.raises(UserError, match=words):
        check_config(config_of("zero2") | {"tensor_parallel": section}, "zero2_tp.json", args)
    with pytest.raises(UserError, match="tensor_parallel at stage 3: transformers 5.23 loads no model"):
        check_config(config_of("zero3") | {"tensor_parallel": TP}, "zero3.json", args)


def test_models_that_cannot_be_cut_are_named():
    def problems(family, processes=4, machines=1, size=2, freezes=True, **sizes):
        _, config = tiny_config(family, 0.0)
        config.update(sizes)
        return model_problems({"tensor_parallel": {"autotp_size": size}}, "own.json", config, processes, machines, freezes)

    assert problems("llama") == [] == model_problems({}, "zero2.json", None, 3, 1, True)
    assert problems("qwen3", freezes=False) == [] and "--freeze: DeepSpeed 0.19.8 cannot cut qwen3" in problems("qwen3")[0]
    assert "phi3 has not been seen to train so; allowed: llama, mistral, qwen2, qwen3; use zero3" in problems("phi3")[0]
    assert "gpt2 has not been seen" in problems("gpt2")[0] and "t5 has not been seen" in problems("t5")[0]
    assert problems("llama", num_key_value_heads=1) == [
        "own.json: tensor_parallel.autotp_size 2: does not divide the model's key-value heads (1)"
    ]
    assert "does not divide the 1 processes of a machine" in problems("llama", machines=4)[0]
    assert len(problems("llama", size=3, processes=3)) == 4


@pytest.mark.parametrize(
    "stem, sizes, flags, words",
    [
        ("zero3", {"TP": 2}, {}, "parallelism_config_tp_size is 2; train.py knows parallelism_config_sp_size alone"),
        ("zero2", {"SP": 2}, {}, "parallelism_config_sp_size 2: has been seen to work at stage 3 alone; use .*zero3_sp.yaml"),
        ("zero3_hpz", {"SP": 2}, {}, "zero_hpz_partition_size has not been seen to go with parallelism_config_sp_size 2"),
        ("zero3_offload", {"SP": 2}, {}, "offload_param has not been seen to go with parallelism_config_sp_size 2"),
        ("zero3", {"SP": 2}, {"packing": True}, "--packing: has not been seen to go with parallelism_config_sp_size 2"),
        (
            "zero3",
            {"SP": 2},
            {"task": "seq2seq"},
            "--task seq2seq: .* 2 is for causal models .llama, qwen2, qwen3.",
        ),
        ("zero3", {"SP": 2}, {"attn_implementation": "eager"}, "--attn_implementation eager: has not been seen .* use sdpa"),
    ],
)
def test_sequence_parallel_refuses(stem, sizes, flags, words):
    args = dataclasses.replace(ARGS, **{"task": "causal", **flags})
    assert launch_problems({"SP": 1}, config_of(stem), stem, args) == []
    (problem,) = [found for found in launch_problems(sizes, config_of(stem), stem, args) if re.search(words, found)]
    assert "\n" not in problem


def test_models_whose_sequences_cannot_be_cut_are_named(tiny, rows16, tmp_path):
    def problems(family, size=2, processes=4, **sizes):
        _, config = tiny_config(family, 0.0)
        config.update(sizes)
        return sequence_problems(size, config, processes)

    assert problems("llama") == [] == problems("t5", size=1)
    assert "t5 has not been seen to train so; allowed: llama, qwen2, qwen3; use zero3" in problems("t5")[0]
    assert (
        "phi3 has not been seen" in problems("phi3")[0] and "does not divide the 3 processes" in problems("llama", processes=3)[0]
    )
    assert len(problems("llama", size=8, processes=8)) == 2
    assert "sliding window" in problems("llama", use_sliding_window=True)[0]
    # scripts/launch.sh reads the YAML before anything is started.
    done = launch_sh("--model_name_or_path", tiny("t5"), "--train_file", rows16, "--output_dir", tmp_path, STRATEGY="zero3_sp")
    assert done.returncode == 2 and "--task seq2seq: parallelism_config_sp_size 2 is for causal" in done.stderr


@pytest.mark.launch
def test_tensor_parallel(train, tiny, rows16):
    """One group of two ranks, then two of them: rows, counts, dropout's seeds and evaluations are those of the groups."""
    folder, options = (
        tiny("llama"),
        {"train_file": rows16, "task": "causal", "source_suffix": "", "model_name_or_path": tiny("llama")},
    )
    options |= FLAGS | {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    pair = options | {
        "gradient_accumulation_steps": 4,
        "save_steps": 3,
        "validation_file": rows16,
        "test_file": rows16,
        **EVALUATED,
    }
    straight = train("zero2_tp", 2, name="straight", **pair)
    assert straight.run["engine"]["tensor_parallel"] == 2 and straight.run["engine"]["parameters_cut"] >= 4 * 7
    assert "4 rows x 1 group(s) of 2 processes x 4 accumulation = 16 rows a step" in straight.run["batch_arithmetic"]
    hold(straight, folder, rows16, causal=True)
    rows = load_rows(folder, rows16, causal=True)
    (tokens,) = {(record["target_tokens"], record["real_tokens"]) for record in straight.records("loss")}
    assert tokens == (sum(label != -100 for row in rows for label in row[1]), sum(len(row[0]) for row in rows))
    evaluated = straight.records("eval_loss")
    assert len(evaluated) == 2 and {record["eval_target_tokens"] for record in evaluated} == {tokens[0]}
    assert evaluated[1]["eval_loss"] == pytest.approx(plain_loss(straight.folder / "final", rows), rel=1e-5)
    predictions = [json.loads(line) for line in (straight.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in predictions] == plain_generations(straight.folder / "final", rows, length=4)

    copy_at(straight.folder, straight.folder.with_name("again"), 3)
    again = train("zero2_tp", 2, name="again", **pair)
    assert again.run["resumed_from"].endswith("checkpoint-3")
    assert state_hash(again.folder / "checkpoint-6") == state_hash(straight.folder / "checkpoint-6")
    assert all(torch.equal(weight, again.weights()[name]) for name, weight in straight.weights().items())
    copy_at(straight.folder, straight.folder.with_name("other"), 3)
    other = train("zero2", 2, name="other", check=False, **pair | {"gradient_accumulation_steps": 2})
    assert (
        other.code == 2 and "its layers are cut into 2 piece(s), and here into 1; go on under the tensor_parallel" in other.output
    )

    with pytest.raises(UserError, match="its layers are cut into 2 pieces .tensor_parallel.; take the run's final/"):
        checkpoint.main(["export", str(straight.folder / "checkpoint-3"), str(straight.folder / "model")])

    frozen = options | {"gradient_accumulation_steps": 2, "freeze": ["embeddings", "layers[:2]"], "reduce": "once"}
    frozen |= {"model_name_or_path": tiny("qwen2"), "tokenizer_name": folder}
    two = train("zero2_tp", 4, name="two", **frozen)
    hold(two, tiny("qwen2"), rows16, causal=True, frozen=["model.embed_tokens", "model.layers.0.", "model.layers.1."])


def test_stretches_are_the_rows():
    batch = {"input_ids": torch.arange(2, 16).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=int), "use_cache": False}
    batch["labels"] = batch["input_ids"] + 1
    parts = [stretch_of(batch, 3, part, pad=1) for part in range(3)]
    for name, filler in {"input_ids": 1, "attention_mask": 0, "labels": -100}.items():
        whole = torch.cat([part[name] for part in parts], dim=1)
        assert torch.equal(whole[:, :7], batch[name]) and whole.shape == (2, 9) and (whole[:, 7:] == filler).all()
    assert [part["position_ids"][1].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert all(part["use_cache"] is False and "sources" not in part for part in parts)


@pytest.mark.launch
def test_sequences_cut_over_ranks(train, tiny, rows16):
    """One group of two ranks, then two of them; rows are of odd lengths, and prompts of an evaluation are padded on the left."""
    folder, options = tiny("llama"), FLAGS | {"train_file": rows16, "task": "causal", "source_suffix": ""}
    options |= {"model_name_or_path": folder, "per_device_train_batch_size": 4, "gradient_checkpointing": True}
    pair = options | EVALUATED | {"gradient_accumulation_steps": 4, "save_steps": 3, "loss_chunks": 2}
    pair |= {"validation_file": rows16, "test_file": rows16}
    straight = train("zero3_sp", 2, name="straight", **pair)
    assert straight.run["engine"]["sequence_parallel"] == 2
    hold(straight, folder, rows16, causal=True)
    rows = load_rows(folder, rows16, causal=True)
    (tokens,) = {(record["target_tokens"], record["real_tokens"]) for record in straight.records("loss")}
    assert tokens == (sum(label != -100 for row in rows for label in row[1]), sum(len(row[0]) for row in rows))
    evaluated = straight.records("eval_loss")[-1]
    assert evaluated["eval_loss"] == pytest.approx(plain_loss(straight.folder / "final", rows), rel=1e-5)
    assert evaluated["eval_target_tokens"] == tokens[0]
    predictions = [json.loads(line) for line in (straight.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in predictions] == plain_generations(straight.folder / "final", rows, length=4)

    copy_at(straight.folder, straight.folder.with_name("again"), 3)
    again = train("zero3_sp", 2, name="again", **pair)
    assert again.run["resumed_from"].endswith("checkpoint-3")
    assert state_hash(again.folder / "checkpoint-6") == state_hash(straight.folder / "checkpoint-6")
    assert all(torch.equal(weight, again.weights()[name]) for name, weight in straight.weights().items())

    frozen = options | {"gradient_accumulation_steps": 2, "freeze": ["embeddings", "layers[:2]"], "reduce": "once"}
    frozen |= {"model_name_or_path": tiny("qwen3"), "tokenizer_name": folder}
    two = train("zero3_sp", 4, name="two", **frozen)
    hold(two, tiny("qwen3"), rows16, causal=True, frozen=["model.embed_tokens", "model.layers.0.", "model.layers.1."])
