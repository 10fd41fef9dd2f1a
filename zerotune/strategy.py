"""The memory strategy: a DeepSpeed JSON read, checked and resolved, the processes' backend, and the proof of which engine runs.

`accelerate launch` names the JSON in the environment; everything "auto" in it is filled in here from train.py's flags, so that
DeepSpeed and run.json get the same complete configuration. `python -m zerotune.strategy ACCELERATE.yaml --flags...` checks the
YAML's DeepSpeed JSON together with train.py's flags, without starting anything; scripts/launch.sh does so before each launch.
"""

import copy
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import UserError, nearest

TOP_KEYS = set(
    ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16", "zero_optimization", "aio", "activation_checkpointing", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "sparse_gradients", "disable_allgather", "steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown", "checkpoint", "data_types", "torch_autocast", "compile", "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "log_level", "disable_python_gc"]
)
OFFLOAD_KEYS = set(["device", "nvme_path", "buffer_count", "pin_memory"])
SECTIONS = {  # section -> the keys it may hold; a test compares them with DeepSpeed's own models
    "zero_optimization": set(
        ["stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module", "zenflow"]
    ),
    "zero_optimization.offload_optimizer": OFFLOAD_KEYS
    | set(["pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc"]),
    "zero_optimization.offload_param": OFFLOAD_KEYS | {"buffer_size", "max_in_cpu"},
    "bf16": set(["enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"]),
    "fp16": set(
        ["enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"]
    ),
    "aio": set(["block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"]),
}
LEARNING_KEYS = {  # what a DeepSpeed JSON may not say, and the flags that do
    "optimizer": "--optim, --learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type and --warmup_steps",
    "zero_allow_untested_optimizer": "--optim",
    "zero_force_ds_cpu_optimizer": "--optim",
}


def section(config, path):
    """Return the dict at a dotted path of a DeepSpeed config, or {} where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def read_deepspeed_config(path):
    """Return the JSON file as a dict; raise UserError if it is missing or not JSON."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the accelerate YAML's deepspeed_config_file names it") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object")
    return config


def check_keys(config, name):
    """Return problems with keys: unknown ones (with the nearest known), misplaced ones, and those that are flags' business."""
    problems = []
    homes = {key: path for path, keys in SECTIONS.items() for key in keys}
    for path, known in [("", TOP_KEYS), *SECTIONS.items()]:
        for key in section(config, path) if path else config:
            place = f"{path}.{key}" if path else key
            if key in known:
                continue
            if not path and key in LEARNING_KEYS:
                problems.append(f"{name}: {key!r} is decided by {LEARNING_KEYS[key]} of train.py; remove it here")
            elif key in homes or key in TOP_KEYS:
                home = homes.get(key) or "the top level"
                problems.append(f"{name}: {place} is misplaced; it belongs in {home}")
            else:
                problems.append(f"{name}: unknown key {place}{nearest(key, known)}")
    return problems


def check_zero(config, name):
    """Return problems with the ZeRO section: stage, keys of another stage, offload devices and paths."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return [f"{name}: zero_optimization is missing; copy one of ds_configs/*.json"]
    problems, stage = [], zero.get("stage")
    if stage not in (1, 2, 3):
        return [f"{name}: zero_optimization.stage is {stage!r}; allowed: 1, 2, 3 (without ZeRO: accelerate_configs/ddp.yaml)"]
    if stage < 3:
        if "offload_param" in zero:
            problems.append(
                f"{name}: offload_param is only valid at stage 3 (this file: stage {stage}); "
                "remove it or use ds_configs/zero3_offload.json"
            )
        for key in zero:
            if key.startswith("stage3_"):
                problems.append(f"{name}: {key} is only valid at stage 3 (this file: stage {stage}); remove it")
    elif not zero.get("stage3_gather_16bit_weights_on_model_save"):
        problems.append(f"{name}: stage 3 needs stage3_gather_16bit_weights_on_model_save: true, or final/ cannot be written")
    for kind in ("offload_optimizer", "offload_param"):
        offload = zero.get(kind) or {}
        device = offload.get("device", "none") if isinstance(offload, dict) else offload
        if device not in ("none", "cpu", "nvme"):
            problems.append(f"{name}: {kind}.device is {device!r}; allowed: none, cpu, nvme")
        if device == "nvme" and stage < 3:
            problems.append(f"{name}: {kind}.device nvme is only valid at stage 3 (this file: stage {stage}); use cpu")
        elif device == "nvme":
            problems += check_nvme(offload.get("nvme_path"), f"{name}: {kind}.nvme_path")
    return problems


def check_nvme(path, where):
    """Return problems with an NVMe folder: none given, not writable."""
    if path == "auto":
        path = os.environ.get("NVME_PATH")
        if not path:
            return [f'{where} is "auto" and NVME_PATH is not set; export NVME_PATH=/a/folder/on/a/fast/disk']
    if not path:
        return [f'{where} is missing; write the folder on a fast disk there, or "auto" and export NVME_PATH']
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return [f"{where} {path}: {error.strerror}; give a folder that can be written"]
    return []


def check_libaio(config, name):
    """Return a problem if NVMe offload is asked for and DeepSpeed's asynchronous I/O cannot be built here."""
    if not any(section(config, f"zero_optimization.offload_{kind}").get("device") == "nvme" for kind in ("optimizer", "param")):
        return []
    choose_deepspeed_accelerator()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return []
    return [f"{name}: NVMe offload needs libaio with its headers and a C++ compiler (Debian: apt install libaio-dev g++)"]


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


def resolve(config, name, args, num_processes, hidden_size):
    """Return the config as DeepSpeed will get it, with no "auto" left and every repeated flag filled in.

    hidden_size: the model's, for bucket sizes. Raises UserError naming both values and both homes where JSON and flags differ,
    and for an "auto" that no rule resolves.
    """
    config = copy.deepcopy(config)
    zero, problems = config["zero_optimization"], []
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    flags = {
        "train_micro_batch_size_per_gpu": (micro, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
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
    for kind in ("offload_optimizer", "offload_param"):
        offload = section(zero, kind)
        if offload.get("nvme_path") == "auto":
            offload["nvme_path"] = os.environ["NVME_PATH"]
    # The optimizer comes from zerotune/optimizer.py, DeepSpeedCPUAdam included. Unless this is false, accelerate builds another
    # one in its place under offload, and only knows torch's AdamW as decoupled: the weight decay would become an L2 penalty.
    config["zero_force_ds_cpu_optimizer"] = False
    problems += [f'{name}: no rule resolves "auto" at {place}; write a value' for place in autos(config)]
    if problems:
        raise UserError(*problems)
    return config


def autos(config, prefix=""):
    """Return the dotted places where "auto" is left."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


@dataclass
class Strategy:
    """What the launcher asked for: the DeepSpeed config as it is written (None: no DeepSpeed) and the file it came from."""

    config: dict | None
    name: str
    num_processes: int

    @property
    def launched(self):
        """Tell whether a launcher started this process as one of a group, be it of one."""
        return "WORLD_SIZE" in os.environ

    @property
    def optimizer_on_host(self):
        """Tell whether DeepSpeed keeps the optimizer states outside the device (CPU memory or NVMe)."""
        return section(self.config or {}, "zero_optimization.offload_optimizer").get("device", "none") != "none"

    def plugin(self, args, hidden_size):
        """Return accelerate's DeepSpeedPlugin holding the resolved config, or None without DeepSpeed."""
        if self.config is None:
            return None
        choose_deepspeed_accelerator()
        from accelerate.utils import DeepSpeedPlugin

        resolved = resolve(self.config, self.name, args, self.num_processes, hidden_size)
        return DeepSpeedPlugin(hf_ds_config=resolved, zero3_init_flag=resolved["zero_optimization"]["stage"] == 3)


def has_cuda():
    import torch

    return torch.cuda.is_available()


def choose_deepspeed_accelerator():
    """Tell DeepSpeed to run on CPU processes where there is no GPU; left to itself it stops at the missing one."""
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_device(args):
    """Return problems with a precision that this machine's devices do not have."""
    import torch

    if args.mixed_precision == "fp16" and not has_cuda():
        return ["--mixed_precision fp16: this machine's device is a CPU, which cannot train in fp16; use --mixed_precision bf16"]
    if args.mixed_precision == "bf16" and has_cuda() and not torch.cuda.is_bf16_supported():
        return ["--mixed_precision bf16: this GPU has no bf16; use --mixed_precision fp16 (or no)"]
    return []


def check_config(config, name, args):
    """Raise UserError with everything that is wrong with a DeepSpeed config beside train.py's flags."""
    problems = check_keys(config, name) + check_zero(config, name) + check_precision(config, name, args.mixed_precision)
    if args.optim == "adafactor":
        problems.append(
            "--optim adafactor: ZeRO flattens the parameters, which takes away the rows and columns that Adafactor factors; "
            "use --optim adamw_torch_fused, or STRATEGY=ddp or single"
        )
    if not problems:
        problems = check_libaio(config, name)
    if problems:
        raise UserError(*problems)


def launched_strategy(args):
    """Return the Strategy that `accelerate launch` (or its absence) asks for, checked; raise UserError."""
    environment = os.environ
    problems = check_device(args)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", args.mixed_precision):
        problems.append(
            f"the accelerate YAML says mixed_precision {precision}, but --mixed_precision is {args.mixed_precision}; "
            "remove mixed_precision from the YAML (its home is the flag)"
        )
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        problems.append("the accelerate YAML turns FSDP on; train.py runs on one process, DDP or DeepSpeed: see accelerate_configs/")
    config, name = None, "no DeepSpeed"
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if name == "none":
            problems.append("the accelerate YAML turns DeepSpeed on without deepspeed_config_file; see accelerate_configs/zero2.yaml")
        else:
            config = read_deepspeed_config(name)
    if problems:
        raise UserError(*problems)
    if config is not None:
        check_config(config, name, args)
    return Strategy(config, name, int(environment.get("WORLD_SIZE", 1)))


def check_processes(accelerator):
    """Raise RuntimeError if accelerate runs fewer processes than were launched: each would train alone on the same rows."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}")


def engine_facts(accelerator, strategy, model, optimizer):
    """Return what really runs, for run.json; raise RuntimeError where it is not what the launcher asked for."""
    is_deepspeed = type(model).__name__ == "DeepSpeedEngine"
    if is_deepspeed != (strategy.config is not None):
        raise RuntimeError(f"{strategy.name} was asked for, but the engine is {type(model).__name__}")
    inner = optimizer.optimizer
    facts = {
        "class": type(model).__name__,
        "optimizer": type(inner).__name__,
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device.type),
        "backend": None if accelerator.num_processes == 1 and not is_deepspeed else distributed_backend(),
    }
    if is_deepspeed:
        stage = model.zero_optimization_stage()
        if stage != strategy.config["zero_optimization"]["stage"]:
            raise RuntimeError(f"{strategy.name} asks for stage {strategy.config['zero_optimization']['stage']}, runs {stage}")
        facts |= {
            "zero_stage": stage,
            "offload_optimizer": section(strategy.config, "zero_optimization.offload_optimizer").get("device", "none"),
            "offload_param": section(strategy.config, "zero_optimization.offload_param").get("device", "none"),
            "base_optimizer": type(model.basic_optimizer).__name__,
        }
    return facts


def distributed_backend():
    import torch.distributed

    return torch.distributed.get_backend() if torch.distributed.is_initialized() else None


def main(argv):
    """Check an accelerate YAML, its DeepSpeed JSON and train.py's flags together."""
    import yaml

    from zerotune.arguments import parse_arguments

    path, *flags = argv
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    json_path = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    problems = []
    try:
        args = parse_arguments(flags)
    except UserError as error:
        args, problems = None, error.problems
    if args is None:
        raise UserError(*problems)
    problems += check_device(args) if needs_device_check(args) else []
    if json_path:
        config = read_deepspeed_config(json_path)
        try:
            check_config(config, json_path, args)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def needs_device_check(args):
    return args.mixed_precision != "no"  # importing torch costs seconds; float32 runs everywhere


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"train.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
