"""What may be wrong with a DeepSpeed JSON: its keys, what they mean together, beside train.py's flags, and on this machine."""

import contextlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from zerotune.engine import tensor_parallel
from zerotune.engine.deepspeed_config import check_precision, choose_deepspeed_accelerator, has_cuda, section, uses_nvme
from zerotune.errors import UserError, nearest

TOP_KEYS = set(
    (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 fp16 "
        "zero_optimization aio tensor_parallel activation_checkpointing communication_data_type prescale_gradients "
        "gradient_predivide_factor gradient_allreduce_op disable_allgather steps_per_print "
        "dump_state wall_clock_breakdown memory_breakdown data_types torch_autocast compile flops_profiler "
        "comms_logger tensorboard wandb csv_monitor log_level disable_python_gc"
    ).split()
)
OFFLOAD_KEYS = set("device nvme_path buffer_count pin_memory".split())
SECTIONS = {  # section -> the keys it may hold; a test compares them with DeepSpeed's own models
    "zero_optimization": set(
        (
            "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
            "allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights "
            "elastic_checkpoint offload_param offload_optimizer sub_group_size stage3_prefetch_bucket_size "
            "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
            "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters legacy_stage1 "
            "round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights "
            "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
            "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
            "save_muon_momentum_buffer_in_memory leaf_module zenflow"
        ).split()
    ),
    "zero_optimization.offload_optimizer": OFFLOAD_KEYS
    | set("pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc".split()),
    "zero_optimization.offload_param": OFFLOAD_KEYS | {"buffer_size", "max_in_cpu"},
    "bf16": set(("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states").split()),
    "fp16": set(
        (
            "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
            "min_loss_scale fp16_master_weights_and_grads"
        ).split()
    ),
    "data_types": set("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules".split()),
    "tensor_parallel": tensor_parallel.KEYS,
    "aio": set("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds".split()),
}
LEARNING_KEYS = {  # what a DeepSpeed JSON may not say, and the flags that do
    "optimizer": "--optim, --learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type and --warmup_steps",
    "zero_allow_untested_optimizer": "--optim",
    "zero_force_ds_cpu_optimizer": "--optim",
}
GONE = "DeepSpeed 0.19.8 has removed it and would stop; remove it"  # runtime/config.py, _reject_removed_config_keys
REFUSED = {  # key, wherever it stands: why, and what to do
    **dict.fromkeys(
        (
            "amp compression_training curriculum_learning eigenvalue graph_harvesting nebula progressive_layer_drop "
            "quantize_training sparse_attention sparse_gradients zeropp_loco_param"
        ).split(),
        GONE,
    ),
    "elasticity": f"{GONE}: a checkpoint is gone on from with any number of processes",
    "mics_shard_size": f"{GONE}, or use ds_configs/zero3_hpz.json",
    "mics_hierarchical_params_gather": f"{GONE}, or use ds_configs/zero3_hpz.json",
    # FastPersist's writers want CROSS_SIZE, which accelerate does not set (runtime/model_checkpointing/utils.py:76).
    "checkpoint": "is of DeepSpeed's own checkpoints and their writers, and train.py writes its own; remove it",
    "zenflow": (
        "overwrites gradient_accumulation_steps by an interval (runtime/zenflow/engine.py:75), applies most gradients later than "
        "they are due, and has moments that no checkpoint holds; remove it, or use ds_configs/zero3_offload.json"
    ),
    "super_offload": (
        "steps in a process of its own, whose moments no checkpoint of train.py finds (superoffload/superoffload_utils.py:76), and "
        "on CUDA alone; remove it"
    ),
    "zero_quantized_nontrainable_weights": (
        "keeps frozen weights in 8 bits alone, so that final/ would not hold the model's; remove it, or give --peft and --quantize"
    ),
}
QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients")
ZERO_PLUS_PLUS = (*QUANTISED, "zero_hpz_partition_size")  # arXiv:2306.10209
ONE_BIT = {"onebitadam", "onebitlamb", "zerooneadam"}
RECORDED = {"compute_grad_norm"}  # of zero_optimization: switching it off would leave records and bad-step checks without a norm


def check_keys(config, name):
    """Return problems with keys: unknown ones (with the nearest known), misplaced ones, and those that are flags' business."""
    problems = []
    homes = {key: path for path, keys in SECTIONS.items() for key in keys}
    for path in SECTIONS:
        parent, _, key = path.rpartition(".")
        value = (section(config, parent) if parent else config).get(key, {})
        if not isinstance(value, dict):
            problems.append(f"{name}: {path} is {json.dumps(value)}; it must be an object, as in ds_configs/")
    for path, known in [("", TOP_KEYS), *SECTIONS.items()]:
        for key in section(config, path) if path else config:
            place = f"{path}.{key}" if path else key
            given = section(config, path)[key] if path else config[key]
            if key in REFUSED and (given or key not in known):
                problems.append(f"{name}: {place}: {REFUSED[key]}")
            elif key in known:
                continue
            elif not path and key == "optimizer" and (kind := str(section(config, key).get("type"))).lower() in ONE_BIT:
                problems.append(f"{name}: optimizer.type {kind}: DeepSpeed 0.19.8 has it no more; remove it, and choose by --optim")
            elif not path and key in LEARNING_KEYS:
                problems.append(f"{name}: {key!r} is decided by {LEARNING_KEYS[key]} of train.py; remove it here")
            elif key in RECORDED:
                problems.append(f"{name}: {place} may not be set: train.py records the gradient norm; remove it")
            elif key in homes or key in TOP_KEYS:
                home = homes.get(key) or "the top level"
                problems.append(f"{name}: {place} is misplaced; it belongs in {home}")
            else:
                problems.append(f"{name}: unknown key {place}{nearest(key, known)}")
    return problems


def check_zero(config, name):
    """Return problems with the ZeRO section: stage, keys of another stage, offload devices."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return [f"{name}: zero_optimization is missing; copy one of ds_configs/*.json"]
    problems, stage = [], zero.get("stage")
    if section(config, "compile").get("deepcompile"):
        problems.append(
            f"{name}: compile.deepcompile does nothing without engine.compile(), which train.py does not call; remove it"
        )
    if stage not in (1, 2, 3):
        return [
            *problems,
            f"{name}: zero_optimization.stage is {stage!r}; allowed: 1, 2, 3 (without ZeRO: accelerate_configs/ddp.yaml)",
        ]
    if stage < 3:
        if "offload_param" in zero:
            problems.append(
                f"{name}: offload_param is only valid at stage 3 (this file: stage {stage}); "
                "remove it or use ds_configs/zero3_offload.json"
            )
        for key in zero:
            if key.startswith("stage3_") or key in ZERO_PLUS_PLUS:
                problems.append(f"{name}: {key} is only valid at stage 3 (this file: stage {stage}); remove it")
    elif not zero.get("stage3_gather_16bit_weights_on_model_save"):
        problems.append(f"{name}: stage 3 needs stage3_gather_16bit_weights_on_model_save: true, or final/ cannot be written")
    if (ratio := section(zero, "offload_optimizer").get("ratio", 1.0)) != 1.0:
        problems.append(
            f"{name}: offload_optimizer.ratio is {ratio}: for the part that stays DeepSpeed 0.19.8 makes an optimizer of its own, "
            "which no checkpoint holds and whose learning rate stays as it began; remove it"
        )
    for kind in ("offload_optimizer", "offload_param"):
        offload = zero.get(kind) or {}
        device = offload.get("device", "none") if isinstance(offload, dict) else offload
        if device not in ("none", "cpu", "nvme"):
            problems.append(f"{name}: {kind}.device is {device!r}; allowed: none, cpu, nvme")
        if device == "nvme" and stage < 3:
            problems.append(f"{name}: {kind}.device nvme is only valid at stage 3 (this file: stage {stage}); use cpu")
    return problems


def check_quantised(config, name, mixed_precision):
    """Return a problem with ZeRO++'s quantised gradients, whose kernels take every element for one of fp16.

    csrc/quantization/pt_binding.cpp:153; weights are cast for theirs (zero/partition_parameters.py:893).
    """
    sent = config.get("communication_data_type") or {"bf16": "bf16", "fp16": "fp16"}.get(mixed_precision, "fp32")
    if not section(config, "zero_optimization").get("zero_quantized_gradients") or sent == "fp16":
        return []
    return [
        f"{name}: zero_quantized_gradients reads gradients as fp16, and these are sent in {sent}, which it would take for other "
        'numbers; set "communication_data_type": "fp16", or remove it'
    ]


def check_kernels(config, name):
    """Return a problem with what has kernels for GPUs alone, on a machine without one."""
    found = [key for key in QUANTISED if section(config, "zero_optimization").get(key)]
    if not found or has_cuda():
        return []
    return [f"{name}: {', '.join(found)}: quantises by CUDA kernels, and this machine's device is a CPU; use ds_configs/zero3.json"]


def check_nvme_paths(config, name):
    """Return problems with the folders of what is offloaded to NVMe."""
    problems = []
    for kind in ("offload_optimizer", "offload_param"):
        offload = section(config, f"zero_optimization.{kind}")
        if offload.get("device") == "nvme":
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


def check_locked_memory(config, name, mixed_precision):
    """Return a problem if this user may not lock as much memory as DeepSpeed's buffers for parameters on NVMe take.

    DeepSpeed ends in an assertion then, after minutes (csrc/pin_memory/page_alloc.cpp: mlock). root has no such limit.
    """
    offload = section(config, "zero_optimization.offload_param")
    if offload.get("device") != "nvme" or os.geteuid() == 0:
        return []
    elements = offload.get("buffer_count", 5) * offload.get("buffer_size", 100_000_000)  # DeepSpeed's defaults
    needed, allowed = elements * (4 if mixed_precision == "no" else 2), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return []
    return [
        f"{name}: NVMe offload locks {needed:,} bytes of host memory in each process, and this user may lock {allowed:,}; raise "
        "the limit (ulimit -l, memlock in limits.conf), lower buffer_size in offload_param, or use zero3_offload"
    ]


def check_libaio(config, name):
    """Return a problem if NVMe offload is asked for and DeepSpeed's asynchronous I/O cannot be built here."""
    if not uses_nvme(config):
        return []
    choose_deepspeed_accelerator()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return []
    return [f"{name}: NVMe offload needs libaio with its headers and a C++ compiler (Debian: apt install libaio-dev g++)"]


def check_build_locks(cache=None):
    """Return problems with locks that killed builds left in the extension cache: the next build would wait for them for ever.

    cache: the cache's folder (default: torch's). A living builder keeps its lock file open; where no process of this machine has
    it open and it is older than a minute, its builder is gone.
    """
    cache = Path(cache or os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = [path for path in cache.glob("**/lock") if time.time() - path.stat().st_mtime > 60]
    if not locks or not Path("/proc/self/fd").exists():
        return []
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(link))
    return [
        f"{lock}: a lock without an owner, left by a killed build of a DeepSpeed operator; remove the file and start again"
        for lock in locks
        if str(lock.resolve()) not in held
    ]


def check_states(config, name, mixed_precision):
    """Return problems with weights and optimizer states of 16 bits, which DeepSpeed would only tell by an assertion."""
    problems, offload = [], section(config, "zero_optimization.offload_optimizer").get("device", "none")
    masters = {kind: section(config, kind).get(f"{kind}_master_weights_and_grads") for kind in ("bf16", "fp16")}
    in_bf16 = section(config, "bf16").get("bf16_optimizer_states")
    for kind in ("bf16", "fp16"):
        if masters[kind] and mixed_precision != kind:
            problems.append(
                f"{name}: {kind}.{kind}_master_weights_and_grads is for --mixed_precision {kind} (given: {mixed_precision}); "
                "remove it, or change the flag"
            )
        if masters[kind] and offload == "none" and not (kind == "bf16" and in_bf16):
            more = "; or set bf16_optimizer_states as well" if kind == "bf16" else ""
            problems.append(
                f"{name}: {kind}.{kind}_master_weights_and_grads needs optimizer states on the host, as in "
                f"ds_configs/zero2_offload.json{more}"
            )
    if in_bf16 and not masters["bf16"]:
        problems.append(f"{name}: bf16.bf16_optimizer_states needs bf16_master_weights_and_grads; set both, or none")
    return problems


def check_config(config, name, args):
    """Raise UserError with everything that is wrong with a DeepSpeed config beside train.py's flags, here on this machine."""
    problems = flag_problems(config, name, args)
    problems += check_kernels(config, name) + check_nvme_paths(config, name) + check_build_locks()
    problems += check_locked_memory(config, name, args.mixed_precision)
    if not problems:
        problems = check_libaio(config, name)
    if problems:
        raise UserError(*problems)


def flag_problems(config, name, args):
    """Return what is wrong with a DeepSpeed config beside train.py's flags, on any machine."""
    problems = check_keys(config, name) + check_zero(config, name) + check_precision(config, name, args.mixed_precision)
    problems += check_states(config, name, args.mixed_precision) + check_quantised(config, name, args.mixed_precision)
    problems += tensor_parallel.flag_problems(config, name, args)
    accumulation = section(config, "data_types").get("grad_accum_dtype", "auto")
    if accumulation not in ("auto", "fp32", "bf16", "fp16"):
        problems.append(f"{name}: data_types.grad_accum_dtype is {accumulation!r}; allowed: auto, fp32, bf16, fp16")
    if args.optim == "adafactor":
        problems.append(
            "--optim adafactor: ZeRO flattens the parameters, which takes away the rows and columns that Adafactor factors; "
            "use --optim adamw_torch_fused, or STRATEGY=ddp or single"
        )
    if args.optim == "muon":
        if args.max_grad_norm:
            problems.append(
                f"--max_grad_norm {args.max_grad_norm:g}: under ZeRO DeepSpeed 0.19.8 would clip Muon's finished steps by it, in "
                "place of gradients; give --max_grad_norm 0"
            )
        if section(config, "zero_optimization").get("stage") == 3 and section(config, "zero_optimization").get("reduce_scatter"):
            problems.append(f"{name}: reduce_scatter cuts the gradients that --optim muon needs whole; remove it, or use zero2")
        if section(config, "zero_optimization").get("zero_quantized_gradients"):
            problems.append(
                f"{name}: zero_quantized_gradients: DeepSpeed 0.19.8 refuses it with --optim muon; use ds_configs/zero3.json"
            )
        if args.reduce == "once":
            problems.append("--reduce once: has not been seen to go with --optim muon; use --reduce each")
    if args.peft == "adalora":
        problems.append(
            "--peft adalora: moves its ranks by each parameter's gradient after the step, which ZeRO has shared out and released; "
            "use --peft lora, or STRATEGY=ddp or single"
        )
    if args.peft == "trainable_tokens" and section(config, "zero_optimization").get("stage") == 3 and not has_cuda():
        problems.append("--peft trainable_tokens: peft collects the tokens of a sharded embedding on GPUs alone; use zero2 here")
    if args.torch_compile and section(config, "zero_optimization").get("stage") == 3:
        problems.append(
            "--torch_compile: ZeRO-3 gathers weights by hooks inside the blocks, and at each of them a compiled graph ends: many "
            "small ones, none faster; use zero2, or leave it out"
        )
    if args.quantize == "int8" and section(config, "zero_optimization").get("stage") == 3:
        problems.append("--quantize int8: bitsandbytes keeps whole copies of what ZeRO-3 shards; use --quantize nf4, or zero2")
    if args.quantize and not args.peft and section(config, "zero_optimization").get("stage") == 3:
        problems.append(
            "--quantize: without --peft final/ holds the quantised weights, which cannot be put together from shards; use zero2, "
            "or give an adapter"
        )
    offload = section(config, "zero_optimization.offload_optimizer").get("device", "none")
    if args.optim not in ("adamw_torch_fused", "adamw_torch", "adafactor") and offload != "none":
        problems.append(
            f"--optim {args.optim}: {name} keeps optimizer states on {offload}, where DeepSpeed's own AdamW steps in float32; use "
            "--optim adamw_torch_fused here, or a strategy without offload"
        )
    by_steps = args.save_strategy == "steps"
    if uses_nvme(config) and args.save_strategy != "no" and (args.save_steps or args.save_every_seconds or not by_steps):
        given = f"--save_steps {args.save_steps}" if args.save_strategy == "steps" else f"--save_strategy {args.save_strategy}"
        problems.append(
            f"{given}: DeepSpeed 0.19.8 does not restore what lies on NVMe, so a resumed run would go on from other weights; pass "
            "--save_strategy no (final/ is still written at the end), or use zero3_offload"
        )
    if uses_nvme(config) and args.freeze_schedule:
        problems.append(
            "--freeze_schedule: goes over its borders by checkpoints, and DeepSpeed 0.19.8 does not restore what lies on NVMe; use "
            "zero3_offload"
        )
    if args.max_loss_spike and section(config, "bf16").get("check_grad_overflow") is False:
        problems.append(
            f"--max_loss_spike {args.max_loss_spike:g}: a step is skipped by gradients that are not finite, for which {name} does "
            "not look; leave bf16.check_grad_overflow out of it"
        )
    return problems
