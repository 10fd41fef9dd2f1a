"""The planner's sizes of model states against the bytes that real runs of train.py hold, tensor by tensor, on each rank.

    python tests/test_states.py FOLDER [CASE ...]      what the fixture does: train in forks, leave FOLDER/CASE/rank0.json

A rank looks at its tensors just before the second step of the optimizer, when all gradients and the states of the first are there,
and lets torch's profiler tell what the step takes on top.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from conftest import ROOT, check_engine, flags_of, save_tokenizer, text, tiny_config

from zerotune.engine.deepspeed_config import read_deepspeed_config, resolve
from zerotune.errors import UserError
from zerotune.plan import parameters as plan
from zerotune.plan.states import states

BOUND = 0.005
WIDER = {  # a few million parameters in tensors of several sizes, so that no bucket and no partition ends with one
    "t5": {"d_model": 256, "d_kv": 64, "d_ff": 512},
    "bart": {"d_model": 256, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512},
    "llama": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "gpt2": {"n_embd": 256, "n_inner": 512, "n_layer": 4},
}
TASKS = {"t5": "seq2seq", "bart": "seq2seq", "llama": "causal", "gpt2": "causal"}
LORA = {"peft": "lora", "lora_r": 32, "lora_alpha": 32, "target_modules": ["all-linear"]}
QLORA = {**LORA, "quantize": "nf4"}
BF16, EIGHT_BITS, TWICE = (
    {"mixed_precision": "bf16"},
    {"optim": "adamw_bnb_8bit"},
    {"gradient_accumulation_steps": 2, "reduce": "each"},
)
CASES = {
    "zero2, full": ("zero2", 1, "t5", BF16),
    "zero2, 75 % frozen, unfused": ("zero2", 1, "gpt2", {**BF16, "freeze": ["layers[:3]"], "optim": "adamw_torch"}),
    "zero3, full, float32": ("zero3", 1, "gpt2", {}),
    "zero3, frozen encoder, unfused": ("zero3", 1, "bart", {**BF16, "freeze": ["encoder"], "optim": "adamw_torch"}),
    "zero1, full, 8 bits": ("zero1", 2, "llama", {**BF16, **EIGHT_BITS}),
    "zero2, frozen encoder, float32 sums": ("zero2", 2, "bart", {**BF16, **TWICE, "freeze": ["encoder"]}),
    "zero2, full, float32": ("zero2", 2, "gpt2", TWICE),
    "zero2, reduced once": ("zero2", 2, "gpt2", {**BF16, **TWICE, "reduce": "once"}),
    "zero3, reduced once, frozen encoder": ("zero3", 2, "bart", {**TWICE, "reduce": "once", "freeze": ["encoder"]}),
    "zero2, qlora": ("zero2", 2, "llama", {**BF16, **QLORA}),
    "zero3, 75 % frozen, 8 bits": (
        "zero3", 2, "t5", {**BF16, **TWICE, **EIGHT_BITS, "freeze": ["encoder", "decoder.layers[0]"]},
    ),
    "zero3, lora": ("zero3", 2, "bart", {**BF16, **LORA}),
    "zero3, qlora": ("zero3", 2, "llama", {**BF16, **QLORA}),
    "zero2_offload, frozen encoder": ("zero2_offload", 2, "t5", {"freeze": ["encoder"], **TWICE}),
    "zero3_offload, full": ("zero3_offload", 2, "llama", BF16),
    "zero3_hpz, frozen encoder": ("zero3_hpz", 4, "bart", {**BF16, **TWICE, "freeze": ["encoder"]}),
    "ddp, frozen encoder": ("ddp", 2, "t5", {"freeze": ["encoder"]}),
    "single, lora, unfused": (None, 1, "gpt2", {**LORA, "optim": "adamw_torch"}),
    "single, lion in 8 bits": (None, 1, "llama", {"optim": "lion_8bit"}),
    "single, lion": (None, 1, "gpt2", {"optim": "lion_32bit"}),
    "single, adafactor": (None, 1, "t5", {"optim": "adafactor"}),
}  # fmt: skip
ON_NVME = {"zero3_nvme, full": ("zero3_nvme", 1, "llama", {**BF16, "save_steps": 0})}
PARTS = {"weights": plan.WEIGHTS, "frozen": plan.FROZEN, "gradients": plan.GRADIENTS, "optimizer": plan.OPTIMIZER}
PARTS["buckets"] = plan.BUCKETS


# In the process that trains ---------------------------------------------------------------------------------------------------


def holdings(model, optimizer):
    """Return {part: bytes} of all tensors of this process, each storage once: those of PARTS, gathered weights, the rest."""
    from zerotune.run.profiling import eight_bit_state, quantisation_state, tensors_in

    engine = getattr(optimizer, "optimizer", optimizer)  # under accelerate's wrapper
    parameters = list(model.parameters())
    parts = {"weights": [], "frozen": list(model.buffers()), "buckets": [], "gathered": [], "gradients": [], "optimizer": []}
    parts["frozen"] += tensors_in([quantisation_state(p) for p in parameters] + [eight_bit_state(m) for m in model.modules()])
    for parameter in parameters:
        shards = [getattr(parameter, "ds_tensor", parameter), *tensors_in(getattr(parameter, "ds_secondary_tensor", None))]
        parts["weights" if parameter.requires_grad else "frozen"] += shards
        parts["gathered"].append(parameter)
    parts["buckets"] += tensors_in([bucket.buffer for bucket in getattr(engine, "ipg_buckets", {}).values()])
    for owner in (engine, getattr(engine, "optimizer", engine)):
        for name, value in vars(owner).items():
            parts["gradients" if "grad" in name else "optimizer"] += tensors_in(value)
    flat = [getattr(engine, name, []) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")]
    parts["gradients"] += [t.grad for t in [*parameters, *tensors_in(flat)] if t.grad is not None]
    parts["rest"] = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    seen, sizes = set(), dict.fromkeys(parts, 0)
    for part, tensors in parts.items():
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[part] += storage.nbytes()
    return sizes


def watch():
    """Have each rank of train.py write what it holds to the folder in $STATES_OUT, at the moment at which it profiles memory."""
    from zerotune.run import profiling

    report, counted = {}, profiling.memory_gib

    def count(model, optimizer):
        report["holds"] = holdings(model, optimizer)
        report["parameters"] = [vars(parameter) for parameter in plan.parameters_of(model)]
        scales = profiling.tensors_in([profiling.quantisation_state(p) for p in model.parameters()])
        report["other_bytes"] = sum(tensor.nbytes for tensor in [*model.buffers(), *scales])
        with torch.profiler.record_function("the step begins"):
            return counted(model, optimizer)

    class Trace(torch.profiler.profile):
        def __init__(self, **options):
            super().__init__(**{**options, "profile_memory": True})

        def stop(self):
            super().stop()
            events = sorted(self.profiler.kineto_results.events(), key=lambda event: event.start_ns())
            (begin,) = [event.start_ns() for event in events if event.name() == "the step begins"]
            now = at_begin = peak = 0
            for event in events:
                if event.name() == "[memory]":
                    now += event.nbytes()
                    if event.start_ns() < begin:
                        at_begin = peak = now
                    peak = max(peak, now)
            report["step_takes"] = peak - at_begin
            Path(os.environ["STATES_OUT"], f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))

    profiling.memory_gib, torch.profiler.profile = count, Trace


def main(folder, *names):
    forks.import_libraries()
    watch()
    environment = dict(os.environ)
    for name in names or CASES:
        strategy, processes, family, flags = {**CASES, **ON_NVME}[name]
        out = Path(folder, name)
        out.mkdir()
        fixed = {"model_name_or_path": f"{folder}/{family}", "train_file": f"{folder}/rows.jsonl", "output_dir": out / "run"}
        fixed |= {"task": TASKS[family], "max_steps": 2, "profile_steps": 1, "per_device_train_batch_size": 1, "save_steps": 0}
        words = [str(word) for word in flags_of({**fixed, **flags})]
        code = forks.run(
            strategy,
            processes,
            words,
            str(out / "log"),
            {**environment, "STATES_OUT": str(out), "MACHINES": "2" if "hpz" in name else "1"},
            timeout=300,
        )
        if code:
            sys.exit(f"{name}: exit code {code}\n{(out / 'log').read_text(errors='replace')[-3000:]}")


# In the tests -----------------------------------------------------------------------------------------------------------------


def make_inputs(folder):
    for family, sizes in WIDER.items():
        model_class, config = tiny_config(family, 0.0)
        for key, value in sizes.items():
            setattr(config, key, value)
        torch.manual_seed(1)
        model_class(config).save_pretrained(folder / family)
        save_tokenizer(folder / family)
    rows = [{"source": text(n, 2), "target": text(n + 3, 2)} for n in range(16)]  # short: what is measured are no activations
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_cases(folder, names):
    make_inputs(folder)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the folder in which all cases have been trained."""
    if torch.cuda.is_available():
        pytest.skip("measures CPU processes")
    return train_cases(tmp_path_factory.mktemp("states"), CASES)


def compare(folder, name):
    """Return (what is predicted, each rank's report) of a case that was trained, its engine checked."""
    strategy, processes, _, flags = {**CASES, **ON_NVME}[name]
    run = json.loads((folder / name / "run" / "run.json").read_text())
    if {"optim", "quantize"} & flags.keys():  # another optimizer, and a quantised model is sharded after it is loaded
        stage = int(strategy[4]) if strategy else 0
        assert (run["engine"]["num_processes"], run["engine"].get("zero_stage", 0)) == (processes, stage)
    else:
        check_engine(run["engine"], strategy, processes)
    ranks = [json.loads(path.read_text()) for path in sorted((folder / name).glob("rank*.json"))]
    assert len(ranks) == processes
    parameters = [plan.Parameter(**p | {"shape": tuple(p["shape"])}) for p in ranks[0]["parameters"]]
    predicted = states(
        parameters,
        ranks[0]["other_bytes"],
        num_processes=processes,
        config=run["deepspeed_config"],
        optim=flags.get("optim", "adamw_torch_fused"),
        mixed_precision=flags.get("mixed_precision", "no"),
        accumulation=flags.get("gradient_accumulation_steps", 1),
        reduces_once=flags.get("reduce") == "once",
        device_has_cuda=False,
    )
    return predicted, ranks


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_states_are_what_a_run_holds(measured, name):
    """Weights, gradients, optimizer states and lasting buckets, on the rank that holds most of each."""
    predicted, ranks = compare(measured, name)
    for part, category in PARTS.items():
        expected = sum(predicted[place].get(category, 0) for place in ("device", "host"))
        if category not in predicted["moments"]["step"] or (part == "buckets" and CASES[name][0] == "ddp"):
            continue  # released by then; DDP keeps its buckets to itself
        held = max(rank["holds"][part] for rank in ranks)
        assert held == pytest.approx(expected, rel=BOUND, abs=600), part  # abs: batches of numbers, as norms of parameters


@pytest.mark.launch
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] == 1])
def test_nothing_else_is_held_and_the_step_takes_what_it_should(measured, name):
    """One rank: gloo's threads, which let go of tensors when they come to it, have nothing to hold."""
    predicted, (rank,) = compare(measured, name)
    sizes = {category: sum(predicted[place].get(category, 0) for place in ("device", "host")) for category in plan.CATEGORIES}
    lasting = set(predicted["moments"]["step"]) - {plan.STEP}
    assert sum(rank["holds"].values()) == pytest.approx(sum(sizes[category] for category in lasting), rel=BOUND)
    assert rank["step_takes"] == pytest.approx(sizes[plan.STEP], rel=BOUND, abs=60_000)  # abs: the counting itself, zero_grad


@pytest.mark.launch
@pytest.mark.nvme
def test_states_on_nvme(tmp_path, monkeypatch):
    monkeypatch.setenv("NVME_PATH", str(tmp_path / "nvme"))
    (name,) = ON_NVME
    predicted, (rank,) = compare(train_cases(tmp_path, [name]), name)
    held = (plan.WEIGHTS, plan.FROZEN, plan.GRADIENTS, plan.OPTIMIZER, plan.BUCKETS)
    expected = sum(predicted[place].get(category, 0) for place in ("device", "host") for category in held)
    assert sum(rank["holds"].values()) == pytest.approx(expected, rel=BOUND)
    files = {path: path.stat().st_size for path in (tmp_path / "nvme").rglob("*.swp")}
    assert len(files) >= 3 and sum(files.values()) == pytest.approx(sum(predicted["nvme"].values()), rel=BOUND)


def seven_billion(learns=lambda name: True):
    """Return Parameters of the size of Llama 2 7B, in bf16."""
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096)}
    shapes |= {"up": (11008, 4096), "down": (4096, 11008), "norm1": (4096,), "norm2": (4096,)}
    named = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in shapes.items()}
    named = {"embed": (32000, 4096), **named, "norm": (4096,), "lm_head": (32000, 4096)}
    return [plan.Parameter(name, shape, 2, learns(name)) for name, shape in named.items()]


def resolved(name, **flags):
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "mixed_precision": "bf16"}
    given |= {"max_tokens_per_micro_batch": None, "optim": "adamw_torch_fused"}
    path = f"ds_configs/{name}.json"
    return resolve(read_deepspeed_config(path), path, SimpleNamespace(**given | flags), 8, 4096)


def of_seven_billion(strategy, optim="adamw_torch_fused", **flags):
    config, accumulation = resolved(strategy, **flags), flags.get("gradient_accumulation_steps", 1)
    given = {"num_processes": 8, "config": config, "optim": optim, "mixed_precision": "bf16", "accumulation": accumulation}
    return states(seven_billion(), 0, **given)


@pytest.mark.parametrize(
    "strategy, weights, gradients, optimizer, step",
    [("zero1", 2, 2 / 8, 12 / 8, 6 / 8), ("zero2", 2, 2 / 8, 12 / 8, 6 / 8), ("zero3", 2 / 8, 2 / 8, 12 / 8, 6 / 8)],
)
def test_bytes_of_a_parameter(strategy, weights, gradients, optimizer, step):
    """The table of ds_configs/README.md; 6: a flat copy of the gradients in bf16 and one in float32.

    Stages 1 and 2 hold the gradients of parameters at a partition's edges whole, here up to 8 % of all.
    """
    total, found = sum(p.numel for p in seven_billion()), of_seven_billion(strategy)
    device = found["device"]
    for category, each in [(plan.WEIGHTS, weights), (plan.GRADIENTS, gradients), (plan.OPTIMIZER, optimizer), (plan.STEP, step)]:
        assert each * total * 0.99 < device[category] < each * total * 1.08, category
    assert not found["host"] and not found["nvme"]
    lasts = plan.BUCKETS in found["moments"]["step"]
    assert device[plan.BUCKETS] == 2 * 4096**2 * (1 if strategy == "zero3" else 2) and lasts == (strategy == "zero3")


def test_float32_sums_and_another_optimizer():
    total = sum(p.numel for p in seven_billion())
    summed = of_seven_billion("zero2", gradient_accumulation_steps=4)["device"]
    assert summed[plan.GRADIENTS] == pytest.approx(4 * total / 8, rel=1e-3)
    assert summed[plan.STEP] == 8 * 32000 * 4096  # the largest parameter in float64, for the norm
    unfused = of_seven_billion("zero3", optim="adamw_torch")["device"]
    assert unfused[plan.STEP] == pytest.approx(8 * total / 8, rel=1e-3)  # float32 gradients, and square roots of as much
    small = of_seven_billion("zero2", optim="adamw_bnb_8bit")["device"]
    assert small[plan.OPTIMIZER] == pytest.approx((4 + 2 + 8 / 256) * total / 8, rel=1e-3)


def test_offload_leaves_the_device():
    total = sum(p.numel for p in seven_billion())
    half = of_seven_billion("zero2_offload")
    assert half["device"].get(plan.OPTIMIZER, 0) == half["device"].get(plan.STEP, 0) == 0
    assert half["host"][plan.OPTIMIZER] > (8 + 4 + 2) * total / 8  # pinned memory comes in powers of two
    whole = of_seven_billion("zero3_offload")
    assert whole["device"].get(plan.WEIGHTS, 0) == whole["device"].get(plan.GRADIENTS, 0) == 0 < whole["device"][plan.GATHERED]
    assert whole["host"][plan.WEIGHTS] == 2**31 + 2**17  # 2 bytes of 842 million elements, and of the norms'
    os.environ.setdefault("NVME_PATH", "/nvme")
    disk = of_seven_billion("zero3_nvme")
    assert disk["nvme"][plan.OPTIMIZER] == pytest.approx(12 * total / 8, rel=1e-3)


def test_what_is_not_modelled_is_refused():
    config = resolved("zero3")
    config["zero_optimization"] |= {"zero_quantized_gradients": True, "zero_quantized_weights": True}
    with pytest.raises(UserError, match="not modelled: zero_quantized_weights, zero_quantized_gradients; remove them"):
        states(seven_billion(), 0, num_processes=8, config=config, optim="adamw_torch", mixed_precision="bf16")


if __name__ == "__main__":
    main(*sys.argv[1:])
