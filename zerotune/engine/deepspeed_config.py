"""A DeepSpeed JSON: read, and every "auto" in it resolved from train.py's flags; deepspeed_checks.py has what may be wrong with it.

The JSON is the home of the memory strategy (stage, offload, buckets). What it repeats of the flags is "auto" or equal to them; what
DeepSpeed and run.json get is complete.
"""

import copy
import json
import os
import shutil
import sysconfig
from pathlib import Path

from zerotune.errors import UserError
from zerotune.rows.batches import most_micro_batches


def section(config, path):
    """Return the dict at a dotted path of a DeepSpeed config, or {} where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def read_deepspeed_config(path):
    """Return the JSON file as a dict; raise UserError if it is missing or not JSON.

    A relative path that is not under the working folder is one of this repository's (accelerate_configs/*.yaml name them so).
    """
    try:
        file = Path(path) if Path(path).exists() else Path(__file__).resolve().parents[2] / path
        config = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the accelerate YAML's deepspeed_config_file names it") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object")
    return config


def uses_nvme(config):
    """Tell whether optimizer states or parameters lie on NVMe."""
    return any(section(config, f"zero_optimization.offload_{kind}").get("device") == "nvme" for kind in ("optimizer", "param"))


def check_precision(config, name, mixed_precision):
    """Return problems with fp16/bf16 sections that contradict each other or --mixed_precision."""
    on = {kind: section(config, kind).get("enabled", "auto") for kind in ("fp16", "bf16")}
    if on["fp16"] is True and on["bf16"] is True:
        return [f'{name}: fp16.enabled and bf16.enabled are both true; write "auto" and choose with --mixed_precision']
    return [
        f"{name}: {kind}.enabled is {json.dumps(value)}, but --mixed_precision is {mixed_precision}; "
        f'write "auto" in the JSON or change the flag'
        for kind, value in on.items()
        if value != "auto" and value != (mixed_precision == kind)
    ]


def resolve(config, name, args, num_processes, hidden_size, num_machines=1):
    """Return the config as DeepSpeed will get it, with no "auto" left and every repeated flag filled in.

    hidden_size: the model's, for bucket sizes. num_machines: that the processes are on, as many on each. Raises UserError naming
    both values and both homes where JSON and flags differ, and for an "auto" that no rule resolves.
    """
    config = copy.deepcopy(config)
    zero, problems = config["zero_optimization"], []
    accumulation = most_micro_batches(args)  # train.py says at each step which micro-batch is the last
    micro = args.per_device_train_batch_size * args.gradient_accumulation_steps // accumulation
    by_tokens = " under --max_tokens_per_micro_batch" if args.max_tokens_per_micro_batch else ""
    flags = {
        "train_micro_batch_size_per_gpu": (micro, f"--per_device_train_batch_size{by_tokens}"),
        "gradient_accumulation_steps": (accumulation, f"--gradient_accumulation_steps{by_tokens}"),
        "train_batch_size": (micro * accumulation * num_processes, "batch x accumulation x processes"),
        "gradient_clipping": (args.max_grad_norm, "--max_grad_norm"),
    }
    for key, (value, home) in flags.items():
        given = config.setdefault(key, "auto")
        if given == "auto":
            config[key] = value
        elif given != value:
            problems.append(f'{name}: {key} is {given}, but {home} is {value}; write "auto" in the JSON or change the flag')
    problems += check_precision(config, name, args.mixed_precision)
    for kind in ("fp16", "bf16"):
        config.setdefault(kind, {})["enabled"] = args.mixed_precision == kind
    resolve_accumulation(config, args)
    # A bucket of hidden_size^2 elements is Hugging Face's choice for "auto"; below a million, latency would eat the gain.
    bucket = max(hidden_size**2, 1_000_000)
    sizes = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": int(0.9 * bucket),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = value
    if "zero_hpz_partition_size" in zero:
        problems += resolve_secondary(zero, name, num_processes, num_machines)
    if args.optim == "muon" and zero["stage"] == 3:  # DeepSpeed asks for it: whole matrices have to meet (zero/stage3.py:360)
        zero.setdefault("reduce_scatter", False)
    for kind in ("offload_optimizer", "offload_param"):
        offload = section(zero, kind)
        if offload.get("nvme_path") == "auto":
            offload["nvme_path"] = os.environ["NVME_PATH"]
    # The optimizer comes from engine/optimizer.py, DeepSpeedCPUAdam included. Unless this is false, accelerate builds another one
    # in its place under offload, and only knows torch's AdamW as decoupled: the weight decay would become an L2 penalty.
    config["zero_force_ds_cpu_optimizer"] = False
    problems += [f'{name}: no rule resolves "auto" at {place}; write a value' for place in autos(config)]
    if problems:
        raise UserError(*problems)
    return config


def resolve_secondary(zero, name, num_processes, num_machines):
    """Resolve zero_hpz_partition_size: over how many ranks, side by side, hpZ keeps a second copy of the weights; return problems.

    The backward pass gathers from that copy (ZeRO++, arXiv:2306.10209), so its ranks should be those of one machine.
    """
    here, size = num_processes // num_machines, zero["zero_hpz_partition_size"]
    if size == "auto":
        size = zero["zero_hpz_partition_size"] = here
    given = f"{name}: zero_hpz_partition_size is {json.dumps(size)}"
    if num_machines == 1:
        return [f"{given}, on one machine: hpZ spares traffic between machines, and there is none; use zero3"]
    if type(size) is not int or size < 2 or here % size:
        return [
            f'{given}, and of {num_processes} processes {here} are on a machine; write "auto" or a number above 1 that divides '
            "them, or use zero3 where a machine has one process"
        ]
    return []


def resolve_accumulation(config, args):
    """Resolve data_types.grad_accum_dtype: left to itself, DeepSpeed sums micro-batches' gradients in the training precision.

    In bf16 a long sum then depends on how the rows are cut. At stage 1 float32 would exchange ZeRO's optimizer for DeepSpeed's
    BF16_Optimizer (deepspeed/runtime/engine.py, _do_optimizer_sanity_check), so it is not a default there.
    """
    types = config.setdefault("data_types", {})
    if types.setdefault("grad_accum_dtype", "auto") == "auto":
        del types["grad_accum_dtype"]
        if args.mixed_precision == "bf16" and most_micro_batches(args) > 1 and config["zero_optimization"]["stage"] > 1:
            types["grad_accum_dtype"] = "fp32"
    if not types:
        del config["data_types"]


def autos(config, prefix=""):
    """Return the dotted places where "auto" is left."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def has_cuda():
    import torch

    return torch.cuda.is_available()


def choose_deepspeed_accelerator():
    """Tell DeepSpeed to run on CPU processes where there is no GPU; left to itself it stops at the missing one."""
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def find_ninja():
    """Put pip's ninja, with which DeepSpeed builds operators, on PATH where it has none: the environment need not be active."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
