"""DeepSpeed JSONs: the shipped ones are whole and pair up, "auto" is resolved, and what cannot be is refused by name."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
import yaml
from conftest import ROOT

from zerotune.engine.deepspeed_checks import (
    RECORDED,
    REFUSED,
    SECTIONS,
    TOP_KEYS,
    check_build_locks,
    check_config,
    check_keys,
    check_locked_memory,
    flag_problems,
)
from zerotune.engine.deepspeed_config import autos, resolve
from zerotune.errors import UserError
from zerotune.run.arguments import Arguments

JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
YAMLS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ARGS = Arguments(
    per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.7, mixed_precision="bf16", save_steps=0
)


def config_of(stem):
    return json.loads((ROOT / "ds_configs" / f"{stem}.json").read_text())


def test_shipped_configurations_pair_up():
    stems = {path.stem for path in JSONS}
    assert stems == {
        "zero1",
        "zero2",
        "zero2_offload",
        "zero2_tp",
        "zero3",
        "zero3_hpz",
        "zero3_sp",
        "zero3_offload",
        "zero3_nvme",
        "zeropp",
    }
    assert {path.stem for path in YAMLS} == stems | {"cpu", "single", "ddp"}
    for path in YAMLS:
        content = yaml.safe_load(path.read_text())
        assert len(path.read_text().splitlines()) <= 12
        assert not {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping"} & content.keys()
        if path.stem in stems:
            assert content["deepspeed_config"]["deepspeed_config_file"] == f"ds_configs/{path.stem}.json"
            assert content["deepspeed_config"]["zero3_init_flag"] == path.stem.startswith(("zero3", "zeropp"))


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.nvme] * ("nvme" in path.stem)) for path in JSONS]
)
def test_shipped_json_is_resolved_without_auto(path):
    config = config_of(path.stem)
    check = flag_problems if path.stem == "zeropp" else check_config  # for GPUs alone, which this machine need not have
    assert not check(config, path.name, dataclasses.replace(ARGS, task="causal"))
    resolved = resolve(config, path.name, ARGS, num_processes=4, hidden_size=1024, num_machines=2)
    assert autos(config) and not autos(resolved)
    assert resolved["train_batch_size"] == 4 * 3 * 4 and resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_clipping"] == 0.7 and resolved["gradient_accumulation_steps"] == 3
    assert resolved["bf16"]["enabled"] and not resolved["fp16"]["enabled"]
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1024**2
    documented = (ROOT / "ds_configs" / "README.md").read_text()
    for section in (
        config,
        config["zero_optimization"],
        config["zero_optimization"].get("offload_optimizer", {}),
        config.get("aio", {}),
        config.get("tensor_parallel", {}),
    ):
        assert all(f"`{key}`" in documented for key in section), section


def test_known_keys_are_deepspeeds_own():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    def keys(model):
        fields = model.model_fields.items()
        return {field.alias or name for name, field in fields if not (field.json_schema_extra or {}).get("deprecated")}

    assert keys(DeepSpeedZeroConfig) == SECTIONS["zero_optimization"] | RECORDED
    assert keys(DeepSpeedZeroOffloadOptimizerConfig) == SECTIONS["zero_optimization.offload_optimizer"]
    assert keys(DeepSpeedZeroOffloadParamConfig) == SECTIONS["zero_optimization.offload_param"]
    assert keys(DeepSpeedBF16Config) == SECTIONS["bf16"]
    assert keys(DeepSpeedFP16Config) == SECTIONS["fp16"]
    assert len(TOP_KEYS) > 20


def change(stem, place, value):
    config = copy.deepcopy(config_of(stem))
    *parents, key = place.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return config


@pytest.mark.parametrize(
    "stem, place, value, message",
    [
        (
            "zero2",
            "zero_optimization.offload_param",
            {"device": "cpu"},
            "offload_param is only valid at stage 3 .this file: stage 2",
        ),
        ("zero2", "zero_optimization.offload_optimizer", {"device": "nvme", "nvme_path": "/tmp"}, "nvme is only valid at stage 3"),
        ("zero2", "zero_optimization.stage3_max_live_parameters", 1, "stage3_max_live_parameters is only valid at stage 3"),
        ("zero2", "zero_optimization.stage", 4, "stage is 4; allowed: 1, 2, 3"),
        (
            "zero2",
            "zero_optimization.reduce_bucket_sise",
            1,
            "unknown key zero_optimization.reduce_bucket_sise .did you mean reduce_bucket",
        ),
        ("zero2", "reduce_bucket_size", 1, "reduce_bucket_size is misplaced; it belongs in zero_optimization"),
        ("zero2", "zero_optimization.gradient_clipping", 1, "misplaced; it belongs in the top level"),
        ("zero2", "optimizer", {"type": "AdamW"}, "'optimizer' is decided by --optim"),
        ("zero2", "gradient_accumulation_steps", 8, "gradient_accumulation_steps is 8, but --gradient_accumulation_steps is 3"),
        ("zero2", "gradient_clipping", 1.0, "gradient_clipping is 1.0, but --max_grad_norm is 0.7"),
        ("zero2", "train_batch_size", 7, "train_batch_size is 7, but batch x accumulation x processes is 24"),
        ("zero2", "bf16", True, "bf16 is true; it must be an object"),
        (
            "zero2",
            "zero_optimization.offload_optimizer",
            "cpu",
            'zero_optimization.offload_optimizer is "cpu"; it must be an object',
        ),
        ("zero2", "zero_optimization.compute_grad_norm", False, "compute_grad_norm may not be set"),
        ("zero3", "compile", {"deepcompile": True}, "compile.deepcompile does nothing without engine.compile()"),
        ("zero2", "fp16.enabled", True, "fp16.enabled is true, but --mixed_precision is bf16"),
        ("zero2", "zero_optimization.overlap_comm", "auto", 'no rule resolves "auto" at zero_optimization.overlap_comm'),
        ("zero3", "zero_optimization.stage3_gather_16bit_weights_on_model_save", False, "or final/ cannot be written"),
        ("zero3_nvme", "zero_optimization.offload_param.nvme_path", None, "nvme_path is missing"),
        ("zero3_nvme", "zero_optimization.offload_param.nvme_path", "/proc/no", "offload_param.nvme_path /proc/no: "),
        ("zero3_offload", "zero_optimization.offload_optimizer.device", "gpu", "device is 'gpu'; allowed: none, cpu, nvme"),
        ("zero3_offload", "zero_optimization.offload_optimizer.ratio", 0.5, "ratio is 0.5: for the part that stays DeepSpeed"),
        ("zero2", "bf16.bf16_optimizer_states", True, "bf16_optimizer_states needs bf16_master_weights_and_grads"),
        (
            "zero2",
            "bf16.bf16_master_weights_and_grads",
            True,
            "on the host, as in .*zero2_offload.json; or set bf16_optimizer_states",
        ),
        ("zero2_offload", "fp16.fp16_master_weights_and_grads", True, "is for --mixed_precision fp16 .given: bf16"),
        ("zero3", "zero_optimization.mics_shard_size", 4, "mics_shard_size: DeepSpeed 0.19.8 has removed it .*zero3_hpz.json"),
        ("zero3", "zero_optimization.mics_hierarchical_params_gather", True, "gather: DeepSpeed 0.19.8 has removed it"),
        ("zero2", "elasticity", {"enabled": False}, "elasticity: DeepSpeed 0.19.8 has removed it .*any number of processes"),
        ("zero2", "sparse_gradients", False, "sparse_gradients: DeepSpeed 0.19.8 has removed it"),
        ("zero2", "optimizer", {"type": "OneBitAdam"}, "optimizer.type OneBitAdam: DeepSpeed 0.19.8 has it no more"),
        ("zero2", "optimizer", {"type": "ZeroOneAdam"}, "optimizer.type ZeroOneAdam: DeepSpeed 0.19.8 has it no more"),
        ("zero2", "checkpoint.writer", {"type": "python"}, "checkpoint: is of DeepSpeed's own checkpoints and their writers"),
        ("zero2_offload", "zero_optimization.zenflow", {"topk_ratio": 0.1}, "zenflow: overwrites gradient_accumulation_steps"),
        (
            "zero3_offload",
            "zero_optimization.offload_optimizer.super_offload",
            True,
            "super_offload: steps in a process of its own",
        ),
        ("zero3", "zero_optimization.zero_quantized_nontrainable_weights", True, "keeps frozen weights in 8 bits alone"),
        ("zero3", "zero_optimization.zero_quantized_gradients", True, "reads gradients as fp16, and these are sent in bf16"),
        ("zero2", "zero_optimization.zero_quantized_weights", True, "zero_quantized_weights is only valid at stage 3"),
        ("zero2", "zero_optimization.zero_hpz_partition_size", 2, "zero_hpz_partition_size is only valid at stage 3"),
    ],
)
def test_refused(stem, place, value, message):
    config = change(stem, place, value)
    with pytest.raises(UserError, match=message):
        check_config(config, f"{stem}.json", ARGS)
        resolve(config, f"{stem}.json", ARGS, num_processes=2, hidden_size=64)


def test_what_deepspeed_has_removed_is_refused_before_it():
    from deepspeed.runtime import config as deepspeeds

    removed = deepspeeds._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | deepspeeds._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert len(removed) > 10 and removed <= REFUSED.keys()
    for key in ("zenflow", "zero_quantized_nontrainable_weights"):
        assert not check_keys(change("zero3", f"zero_optimization.{key}", False), "zero3.json")


def test_quantised_communication_is_for_gpus():
    config = config_of("zeropp")
    assert flag_problems(config, "zeropp.json", ARGS) == []
    if torch.cuda.is_available():
        check_config(config, "zeropp.json", ARGS)
    else:
        words = (
            "zeropp.json: zero_quantized_weights, zero_quantized_gradients: quantises by CUDA kernels, and this machine's device"
        )
        with pytest.raises(UserError, match=words):
            check_config(config, "zeropp.json", ARGS)


@pytest.mark.launch
@pytest.mark.parametrize("stem", ["zero2", "zero3", "zero2_offload"])
def test_states_in_bf16(stem, train, tiny, rows16, tmp_path):
    """Half the bytes of master weights and moments, as planned; the same training but for rounding; resumed in the same bits."""
    config, own = config_of(stem), tmp_path / "own.json"
    config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    own.write_text(json.dumps(config))
    options = {
        "model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "save_steps": 3,
        "mixed_precision": "bf16", "end_report": "true",
    }  # fmt: skip
    plain = train(stem, name="plain", **options)
    small = train(stem, name="small", environment={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(own)}, **options)
    assert small.run["deepspeed_config"]["bf16"]["bf16_optimizer_states"] is True
    losses = [[record["loss"] for record in run.records("loss")] for run in (plain, small)]
    # bf16 keeps 8 bits of a weight: an update of 1e-2 on weights of 0.02 to 0.2 is off by some percent, the loss by far less.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1] != losses[0] and losses[1][-1] < 0.95 * losses[1][0]
    planned, measured = (small.run["memory"][f"{kind}_bytes"]["optimizer states"] for kind in ("planned", "measured"))
    kept = [run.run["memory"]["measured_bytes"]["optimizer states"] for run in (plain, small)]
    others = 2 if "offload" in stem else 0  # on the host a copy in bf16 beside them, as before
    assert kept[1] == pytest.approx(kept[0] * (6 + others) / (12 + others), rel=0.02)
    if not others:  # there planned apart, as the host's
        assert planned == pytest.approx(measured, rel=0.02)

    cut = tmp_path / "cut"
    shutil.copytree(small.folder, cut)
    for folder in ("checkpoint-6", "final"):
        shutil.rmtree(cut / folder)
    environment = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(own)}
    again = train(stem, name="again", environment=environment, **options | {"output_dir": cut})
    assert again.run["resumed_from"].endswith("checkpoint-3")
    assert all(torch.equal(weight, again.weights()[name]) for name, weight in small.weights().items())


def test_saves_from_nvme_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NVME_PATH", str(tmp_path))
    with pytest.raises(UserError, match="--save_steps 500: DeepSpeed 0.19.8 does not restore what lies on NVMe"):
        check_config(config_of("zero3_nvme"), "zero3_nvme.json", Arguments())
    check_config(config_of("zero3_offload"), "zero3_offload.json", Arguments())


def test_both_precisions_and_adafactor_are_refused():
    config = change("zero2", "fp16.enabled", True)
    config["bf16"]["enabled"] = True
    with pytest.raises(UserError, match="both true"):
        check_config(config, "zero2.json", ARGS)
    with pytest.raises(UserError, match="adafactor: ZeRO flattens"):
        check_config(config_of("zero2"), "zero2.json", Arguments(optim="adafactor"))


def launch_sh(*flags, **environment):
    environment = {**os.environ, **environment}
    environment.pop("NVME_PATH", None) if "NVME_PATH" not in environment or not environment["NVME_PATH"] else None
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_launcher_checks_before_it_launches(tiny, rows16, tmp_path):
    good = ["--model_name_or_path", tiny("t5"), "--train_file", rows16, "--output_dir", tmp_path / "out"]
    dry = launch_sh(*good, STRATEGY="zero3_offload", NUM_PROCESSES="4", DRY_RUN="1")
    assert dry.returncode == 0, dry.stderr
    assert f"launch --config_file {ROOT}/accelerate_configs/zero3_offload.yaml --num_processes 4 {ROOT}/train.py" in dry.stdout
    assert "accelerate" in dry.stdout and not (tmp_path / "out").exists()
    mistakes = {
        "STRATEGY=zero9 is not known; allowed: cpu ddp single zero1": launch_sh(*good, STRATEGY="zero9"),
        "--lr: no flag of train.py": launch_sh(*good, "--lr", "1"),
        "no such file": launch_sh(*good, "--validation_file", tmp_path / "none.jsonl"),
        "NVME_PATH is not set": launch_sh(*good, STRATEGY="zero3_nvme", NVME_PATH=""),
        "invalid choice: 'fp8'": launch_sh(*good, "--mixed_precision", "fp8"),
        "must be greater than 0": launch_sh(*good, "--per_device_train_batch_size", "0"),
    }
    for message, done in mistakes.items():
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (message, done.stderr)


def test_missing_libaio_is_named(tmp_path, monkeypatch):
    # DeepSpeed compiles a probe against libaio; a compiler that always fails is what a machine without its headers looks like.
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("NVME_PATH", str(tmp_path))
    with pytest.raises(UserError, match="NVMe offload needs libaio with its headers"):
        check_config(config_of("zero3_nvme"), "zero3_nvme.json", ARGS)


def test_too_little_memory_to_lock_is_named(monkeypatch):
    """As another user than root: DeepSpeed's buffers for parameters on NVMe are 5 x 1e8 elements unless the JSON says otherwise."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (8_000_000, 8_000_000))
    (problem,) = check_locked_memory(config_of("zero3_nvme"), "zero3_nvme.json", "bf16")
    assert "locks 1,000,000,000 bytes" in problem and "may lock 8,000,000; raise the limit (ulimit -l" in problem
    small = change("zero3_nvme", "zero_optimization.offload_param.buffer_size", 100_000)
    assert check_locked_memory(small, "zero3_nvme.json", "no") == [] == check_locked_memory(config_of("zero3"), "zero3.json", "no")


NINJA = """
import os
import sys
from torch.utils.cpp_extension import verify_ninja_availability
from zerotune.engine.deepspeed_config import find_ninja
os.environ["PATH"] = sys.argv[1]
try:
    verify_ninja_availability()
except RuntimeError as error:
    print(error)
for _ in range(2):
    find_ninja()
    verify_ninja_availability()
    print(os.environ["PATH"])
"""


def test_ninja_of_an_environment_that_is_not_activated_is_found(tmp_path):
    """torch asks PATH for the ninja that builds DeepSpeed's operators; Debian's packages of the README bring none."""
    done = subprocess.run([sys.executable, "-c", NINJA, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, *paths = done.stdout.splitlines()
    assert "Ninja is required" in missing and len(paths) == 2
    assert paths == 2 * [os.pathsep.join([str(tmp_path), sysconfig.get_path("scripts")])]  # last, and once


def test_a_lock_without_an_owner_is_named(tmp_path):
    """torch's builds wait for ever on the lock of a killed one; one that a living process holds open is no problem."""
    lock = tmp_path / "py311_cpu" / "deepspeed_cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert check_build_locks(tmp_path) == []  # younger than a minute
    os.utime(lock, (0, 0))
    assert str(lock) in check_build_locks(tmp_path)[0] and "remove the file" in check_build_locks(tmp_path)[0]
    with open(lock):
        assert check_build_locks(tmp_path) == []
