"""What a strategy holds for a model's states: bytes on each device, in each process on the host, and on NVMe, computed from shapes.

The formulas are those of the pinned libraries, read in their source. A place such as zero/stage3.py:791 is a file under
deepspeed/runtime of DeepSpeed 0.19.8; others name their library, the pinned one. Activations are not counted here (trace.py has
them), nor what lies outside torch's allocator, nor what loading the model takes. tests/test_states.py compares with what real runs
hold.

Sizes differ a little between ranks, as partitions cut through parameters: each is that of the rank which holds most of it.
"""

from collections import Counter
from math import gcd
from types import SimpleNamespace

from zerotune.engine.deepspeed_config import section
from zerotune.errors import UserError
from zerotune.plan.parameters import (
    BUCKETS,
    CATEGORIES,
    FLOAT32,
    FROZEN,
    GATHERED,
    GRADIENTS,
    LOCAL,
    OPTIMIZER,
    REDUCTION,
    STEP,
    WEIGHTS,
    optimizer_groups,
    optimizer_states,
    optimizer_temporaries,
)
from zerotune.plan.zero import flattened, sharded, whole_gradients

SWAPPABLE = 2**20  # bytes of the smallest tensor that goes to NVMe (swap_tensor/utils.py:16)
NOT_MODELLED = "zero_quantized_weights zero_quantized_gradients stage3_use_all_reduce_for_fetch_params".split()


def states(
    parameters,
    other_bytes,
    *,
    num_processes,
    config,
    optim,
    mixed_precision="no",
    accumulation=1,
    reduces_once=False,
    device_has_cuda=True,
):
    """Return {"device": {category: bytes}, "host": {...}, "nvme": {...}, "moments": {moment: [category]}}.

    parameters: Parameters in the model's order. other_bytes: of buffers and quantisation scales, which no strategy shards; they
    count as frozen weights. config: the DeepSpeed JSON as engine/deepspeed_config.py resolves it, or None for one process or DDP,
    where the model is loaded in float32. optim: --optim; DeepSpeed's own AdamW takes its place where states leave the device.
    accumulation: micro-batches of a step; reduces_once: as engine/reduction.py has it. device_has_cuda: without it the device is a
    CPU process, and torch's AdamW, its counters and pinned memory behave otherwise.

    moments says which categories exist together: "backward" (and forward, from the second step on) beside the activations, and
    "step" while the optimizer works, without them. A device's peak is the larger sum of the two. What has the same size in both is
    exact; "gathered weights", "reduction transients" and "step transients" are the most that can be there at once.

    device: the GPU's bytes as torch's allocator is asked for them; host: one process's, pinned memory as torch rounds it; nvme: the
    files of one process. Raises UserError for a DeepSpeed setting that is not modelled.
    """
    held = {place: Counter() for place in ("device", "host", "nvme")}
    if config is None:
        replicated(held, parameters, num_processes, optim, accumulation, device_has_cuda)
    else:
        # To the engine a step that is reduced once is a single micro-batch.
        s = settings(config, num_processes, mixed_precision, 1 if reduces_once else accumulation, device_has_cuda)
        if s.stage == 3:
            sharded(held, parameters, s, optim)
        elif s.stage == 1 and mixed_precision == "bf16" and s.accumulated == FLOAT32 and s.offload_optimizer == "none":
            whole_gradients(held, parameters, s, optim)  # engine.py:2301
        else:
            flattened(held, parameters, s, optim)
    held["device"][FROZEN] += other_bytes
    if reduces_once:  # whole gradients on each rank, and their sums in float32 beside those of 16 bits
        each = s.itemsize + (FLOAT32 if s.itemsize < FLOAT32 else 0)
        held["device"][LOCAL] = each * sum(p.numel for group in optimizer_groups(parameters) for p in group)
    temporary = {"backward": {STEP}, "step": {GATHERED, REDUCTION, LOCAL}}
    if config is not None and s.stage < 3:
        temporary["step"].add(BUCKETS)  # released at the end of a backward pass: zero/stage_1_and_2.py:1061
    moments = {moment: [c for c in CATEGORIES if c not in absent] for moment, absent in temporary.items()}
    sizes = {place: {c: int(found[c]) for c in CATEGORIES if found[c]} for place, found in held.items()}
    return sizes | {"moments": moments}


def settings(config, num_processes, mixed_precision, accumulation, cuda):
    """Return what decides sizes in a resolved DeepSpeed config, with DeepSpeed's defaults (zero/config.py, zero/offload_config.py).

    Sizes of elements are in bytes: itemsize of weights and local gradients, accumulated of the gradients a step collects,
    communicated of those that are reduced, master of the weights that the optimizer changes, moment of its states on a host.
    """
    zero = config["zero_optimization"]
    on = [key for key in NOT_MODELLED if zero.get(key)]
    on += ["tensor_parallel"] * bool(section(config, "tensor_parallel"))
    on += ["torch_autocast"] * bool(section(config, "torch_autocast").get("enabled"))
    if on:
        raise UserError(f"the memory of these DeepSpeed settings is not modelled: {', '.join(on)}; remove them, or measure a run")
    stage, bytes_of = zero["stage"], {"fp32": 4, "bf16": 2, "fp16": 2}
    itemsize = FLOAT32 if mixed_precision == "no" else 2
    precision = section(config, mixed_precision)
    low_master = precision.get("bf16_master_weights_and_grads") or precision.get("fp16_master_weights_and_grads")
    optimizer, param = section(zero, "offload_optimizer"), section(zero, "offload_param")
    aio = section(config, "aio")
    return SimpleNamespace(
        stage=stage,
        ranks=num_processes,
        accumulation=accumulation,
        cuda=cuda,
        itemsize=itemsize,
        accumulated=bytes_of.get(section(config, "data_types").get("grad_accum_dtype"), itemsize),  # engine.py:1806
        communicated=bytes_of.get(config.get("communication_data_type"), itemsize),  # engine.py:1719
        master=2 if low_master else FLOAT32,  # base_optimizer.py:523
        moment=2 if precision.get("bf16_optimizer_states") else FLOAT32,  # of DeepSpeedCPUAdam
        checks_infinity=mixed_precision == "fp16",
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buffers=2 if zero.get("overlap_comm", stage == 3) else 1,
        contiguous=zero.get("contiguous_gradients", True),
        alignment=16 // gcd(16, itemsize) if zero.get("parameter_alignment") else 1,
        round_robin=zero.get("round_robin_gradients", False),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        model_persistence=zero.get("stage3_model_persistence_threshold", float("inf")),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        offload_optimizer=optimizer.get("device", "none"),
        optimizer_buffers=optimizer.get("buffer_count", 4),
        pin_optimizer=optimizer.get("pin_memory", True),
        offload_param=param.get("device", "none"),
        param_buffers=param.get("buffer_count", 5),
        param_buffer=int(param.get("buffer_size", 1e8)),
        max_in_cpu=int(param.get("max_in_cpu", 1e9)),
        pin_param=param.get("pin_memory", True),
        secondary=int(zero.get("zero_hpz_partition_size", 1)),
        swappable=max(SWAPPABLE, aio.get("block_size", 2**20)),  # swap_tensor/optimizer_utils.py:180
        aligned=1024 * aio.get("intra_op_parallelism", 1),
    )


def replicated(held, parameters, num_processes, optim, accumulation, cuda):
    """Add what one process holds without DeepSpeed."""
    device, groups = held["device"], optimizer_groups(parameters)
    trainable = [p for group in groups for p in group]
    device[WEIGHTS] = size = sum(p.numel * p.itemsize for p in trainable)
    device[FROZEN] = sum(p.numel * p.itemsize for p in parameters if not p.learns)
    device[GRADIENTS] = size  # under DDP its buckets, of which gradients are views (gradient_as_bucket_view in train.py)
    itemsize = max(p.itemsize for p in trainable)
    device[OPTIMIZER], held["host"][OPTIMIZER] = optimizer_states(optim, [p.shape for p in trainable], itemsize, cuda)
    if accumulation > 1 or num_processes > 1:  # autograd's own, before it is added to the one that is there or copied to its bucket
        device[REDUCTION] = max(p.numel * p.itemsize for p in trainable)
    device[STEP] = max(optimizer_temporaries(optim, [p.shape for p in group], itemsize, cuda) for group in groups)
