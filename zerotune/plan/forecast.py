"""What a run will take under a strategy, before anything of it is there: memory by category, bytes that are sent, relative speed.

Model states and the engine's transients are counted (states.py), activations are traced (trace.py), and the sequence of both is
replayed through the rules of CUDA's caching allocator (allocator.py).
"""

import dataclasses
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from zerotune.engine.deepspeed_checks import flag_problems
from zerotune.engine.deepspeed_config import read_deepspeed_config, resolve, section
from zerotune.engine.reduction import can_choose
from zerotune.engine.sequence_parallel import launched_size
from zerotune.errors import UserError
from zerotune.model.activations import WAYS
from zerotune.model.loading import hidden_size
from zerotune.model.prefix import train_mode
from zerotune.model.quantization import quantization_config
from zerotune.plan.allocator import replay
from zerotune.plan.empty import empty_model, fake_tensors, pretend
from zerotune.plan.machine import CONTEXT_BYTES, GIB, HOST_MEMORY, NCCL_BYTES, NVME
from zerotune.plan.network import bytes_of_step
from zerotune.plan.parameters import BUCKETS, GRADIENTS, REDUCTION, parameters_of
from zerotune.plan.shapes import largest_allowed, largest_by_tokens, largest_shapes
from zerotune.plan.states import states
from zerotune.plan.trace import GRADIENT, tensors_of, trace_step
from zerotune.rows.batches import most_micro_batches

ROOT = Path(__file__).resolve().parents[2]
# zero2_tp and zero3_sp are not among them: what they cut of activations is not modelled.
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload", "zero3_nvme")
# To a trace: the shapes say what accumulation does.
IRRELEVANT = ("save_steps", "output_dir", "gradient_accumulation_steps", "reduce", "torch_compile")
OUTSIDE, CACHE = "CUDA and NCCL", "allocator's cache"
LIBRARIES_BYTES = int(0.45 * GIB)  # of a process that has imported torch, transformers and DeepSpeed, on a CPU
UTILISATION = 0.45  # of the peak FLOP/s, by computing alone; the same for all strategies, so it weighs little in their order


def strategies_on(machine):
    """Return the names of STRATEGIES that a machine has a use for: hpZ is for several nodes of several GPUs."""
    return [name for name in STRATEGIES if name != "zero3_hpz" or 1 < machine.gpus_per_node < machine.num_gpus]


@dataclass
class Forecast:
    """Bytes of one strategy; device and nvme: one GPU's and one node's at the peak, host: one node's. problem: why it cannot be."""

    strategy: str
    problem: str | None = None
    device: dict = field(default_factory=dict)
    host: dict = field(default_factory=dict)
    nvme: dict = field(default_factory=dict)
    moment: str = ""  # backward or step: when the device's peak comes
    shape: object = None  # the micro-batch that makes it
    device_limit: int | None = None
    host_limit: int | None = None
    nvme_limit: int | None = None
    bytes_sent: int = 0  # by a GPU in an optimizer step
    seconds: float = 0.0  # of an optimizer step, to compare with others of the same machine
    rows: int = 1  # of an optimizer step, over all processes
    remark: str = ""
    reduces_once: bool = False  # gradients, a step
    gradient_checkpointing: bool | str = False  # which share of blocks

    @property
    def device_bytes(self):
        return sum(self.device.values())

    @property
    def rows_per_second(self):
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def margin(self):
        """Return the least bytes left on the GPU, the host or the disk; below 0: it does not fit; None: no limit is known."""
        rooms = [
            limit - sum(used.values())
            for used, limit in ((self.device, self.device_limit), (self.host, self.host_limit), (self.nvme, self.nvme_limit))
            if limit is not None
        ]
        return min(rooms, default=None)

    @property
    def fits(self):
        return self.problem is None and (self.margin is None or self.margin >= 0)

    def facts(self):
        """Return what JSON holds of it."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return facts | {"shape": str(self.shape), "device_bytes": self.device_bytes, "margin": self.margin, "fits": self.fits}


class Planner:
    """Forecasts for one model and its rows; a trace is made once for each precision and cut."""

    def __init__(self, args, config, forward_loss, make_trainable, tokenizer=None, data=None):
        """forward_loss, make_trainable: train.py's. data: a rows.data.Data, None if there are no rows."""
        self.args, self.config, self.tokenizer, self.data = args, config, tokenizer, data
        self.labels = data and data.labels
        self.forward_loss, self.make_trainable = forward_loss, make_trainable
        self.traced = {}

    @property
    def longest_row(self):
        """Tokens of the longest row, evaluated ones included; 1 where there are no rows."""
        return max(int(lengths.max()) for lengths in self.data.lengths.values()) if self.data else 1

    def shapes(self, args, num_processes, on_gpu):
        """Return the candidates for the largest micro-batches, as largest_shapes does."""
        if self.data is None:
            return largest_allowed(args)
        costs, multiple = self.data.costs["train"], 8 if on_gpu else 1
        rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if args.max_tokens_per_micro_batch:
            return largest_by_tokens(costs, args.max_tokens_per_micro_batch, rows * accumulation, multiple)
        size = rows * accumulation * num_processes
        steps = args.max_steps if args.max_steps > 0 else -(-int(args.num_train_epochs * len(costs)) // size)
        return largest_shapes(
            costs,
            self.data.stream(args.seed),
            rows=rows,
            accumulation=accumulation,
            num_processes=num_processes,
            max_steps=max(1, steps),
            by_length=args.group_by_length,
            window=args.length_window,
            multiple=multiple,
        )

    def trace(self, args, deepspeed, stage, candidates, on_gpu):
        """Return (Parameters, other bytes, [(shape, Trace) of each candidate]) of the model as a run under these flags has it."""
        precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
        dtype = precision if deepspeed else torch.float32
        stage = stage if args.quantize else 0  # it decides in which type four-bit codes are stored, and nothing else
        flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in IRRELEVANT}
        key = dtype, stage, str(candidates), str(flags), on_gpu
        if key not in self.traced:
            quantization = quantization_config(args, self.config.model_type, precision, stage)
            labels = None if self.labels is None else len(self.labels)
            model = empty_model(self.config, args.task, dtype, quantization, labels)
            model, _ = self.make_trainable(model, args, self.tokenizer, dtype, max(1, args.max_steps))
            train_mode(model, args.frozen_eval)
            parameters = parameters_of(model)
            others = [t for t in tensors_of(model) if not isinstance(t, torch.nn.Parameter)]
            other_bytes = sum({id(t): t.numel() * t.element_size() for t in others}.values())
            traces = []
            with fake_tensors():
                pretend(model)
                for shapes in candidates:
                    autocast = precision if precision != dtype else None
                    options = {"autocast": autocast, "chunked": args.loss_chunks > 0, "on_gpu": on_gpu}
                    traces.append((shapes, trace_step(model, self.config, args.task, shapes, self.forward_loss, **options)))
            self.traced[key] = parameters, other_bytes, traces
        return self.traced[key]

    def forecast(self, strategy, machine, args=None, config=None):
        """Return the Forecast of a strategy of accelerate_configs/ on a machine.

        args: other flags than the run's; config: a DeepSpeed JSON in place of the strategy's own.
        """
        args = args or self.args
        if args.gradient_checkpointing == "auto":
            forecasts = (
                self.forecast(strategy, machine, dataclasses.replace(args, gradient_checkpointing=way), config) for way in WAYS
            )
            found = next(f for f in forecasts if f.fits or f.problem or f.gradient_checkpointing == WAYS[-1])
            words = f"gradient_checkpointing {str(found.gradient_checkpointing).lower()}"
            found.remark = "; ".join(filter(None, (words, found.remark)))
            return found
        num_processes = 1 if strategy == "single" else machine.num_gpus
        if args.reduce == "auto" and num_processes == 1:
            args = dataclasses.replace(args, reduce="each")  # nothing is exchanged
        if args.reduce == "auto":
            once = self.forecast(strategy, machine, dataclasses.replace(args, reduce="once"), config)
            # A plan may be some percent too low, and nobody has asked for what this takes.
            if not once.reduces_once or (once.fits and (once.margin is None or 10 * once.margin > (once.device_limit or 0))):
                return once
            return self.forecast(strategy, machine, dataclasses.replace(args, reduce="each"), config)
        on_gpu = machine.gpu.name != "CPU process"
        if strategy == "zero3_nvme":
            args = dataclasses.replace(args, save_strategy="no")  # without checkpoints, as its README says
        result = Forecast(
            strategy,
            gradient_checkpointing=args.gradient_checkpointing,
            device_limit=machine.gpu_bytes,
            host_limit=machine.host_bytes,
            nvme_limit=machine.nvme_bytes,
        )
        try:
            config = self.deepspeed_config(strategy, args, num_processes, config, machine.num_nodes)
            result.reduces_once = can_choose(args, config) and args.reduce == "once"
            stage = config["zero_optimization"]["stage"] if config else 0
            candidates = self.shapes(args, num_processes, on_gpu)
            parameters, other_bytes, traces = self.trace(args, config is not None, stage, candidates, on_gpu)
            held = states(
                parameters,
                other_bytes,
                num_processes=num_processes,
                config=config,
                optim=args.optim,
                mixed_precision=args.mixed_precision,
                accumulation=most_micro_batches(args),
                reduces_once=result.reduces_once,
                device_has_cuda=on_gpu,
            )
        except UserError as error:
            result.problem = "; ".join(error.problems)
            return result
        peaks = [(*device_peak(held, trace, config, num_processes, on_gpu), shapes) for shapes, trace in traces]
        result.device, result.moment, shapes = max(peaks, key=lambda peak: sum(peak[0].values()))
        result.shape = max(shapes, key=lambda shape: shape.tokens)
        result.rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
        processes_here = min(num_processes, machine.gpus_per_node)
        libraries = {"libraries": LIBRARIES_BYTES}
        if on_gpu and (waits := max(trace.host_bytes for _, trace in traces)):
            held["host"]["activations"] = waits
        host = held["host"] | libraries if on_gpu else held["host"] | libraries | {"of the CPU as a device": result.device_bytes}
        result.host = {name: size * processes_here for name, size in host.items()}
        result.nvme = {name: size * processes_here for name, size in held["nvme"].items()}
        add_speed(
            result, machine, config, args, parameters, max(trace.flops / len(shapes) for shapes, trace in traces), num_processes
        )
        return result

    def deepspeed_config(self, strategy, args, num_processes, config, num_machines=1):
        """Return the resolved DeepSpeed JSON of a strategy, None without DeepSpeed; UserError if it cannot be with these flags."""
        name = strategy
        if config is None:
            content = yaml.safe_load((ROOT / "accelerate_configs" / f"{strategy}.yaml").read_text())
            name = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
            if name is None:
                return None
            config = read_deepspeed_config(name)
        if problems := flag_problems(config, name, args):
            raise UserError(*problems)
        if launched_size() > 1:
            raise UserError(f"the memory of sequences that are cut over ranks is not modelled ({strategy}); measure a run")
        os.environ.setdefault("NVME_PATH", tempfile.gettempdir())  # only its bytes are counted
        return resolve(config, name, args, num_processes, hidden_size(self.config), num_machines)


def device_peak(held, trace, config, num_processes, on_gpu):
    """Return ({category: bytes}, moment) of a device at its peak, the allocator's cache and what lies outside it included."""
    own_gradients = config is None and num_processes == 1  # elsewhere the engine takes them over as they come
    device, moments = held["device"], held["moments"]
    steady, in_step = ({c: device[c] for c in moments[m] if device.get(c)} for m in ("backward", "step"))
    left_out = () if own_gradients else (GRADIENT,)
    if own_gradients:
        steady.pop(GRADIENTS, None)
    early_stage = config is not None and config["zero_optimization"]["stage"] < 3

    def beside(share):
        """Return what is there once a share of the gradients has come: buckets with the first one, partitions as they fill."""
        factors = {REDUCTION: share > 0, BUCKETS: share > 0 or not early_stage, GRADIENTS: share if early_stage else 1}
        return {c: int(size * factors.get(c, 1)) for c, size in steady.items()}

    gradients = sum(size for block, size in trace.events if block > 0 and trace.categories[block] == GRADIENT)
    backward = trace.peak(left_out, beside, gradients)
    moment, peak = max(("backward", backward), ("step", in_step), key=lambda pair: sum(pair[1].values()))
    if on_gpu:
        allocated = sum(peak.values())
        if own_gradients:  # in the step they are the blocks that the trace has left
            in_step = {c: size for c, size in in_step.items() if c != GRADIENTS}
        reserved = replay(events_of_steps(steady, in_step, trace, left_out)).reserved
        peak[CACHE] = max(0, reserved - allocated)
        peak[OUTSIDE] = CONTEXT_BYTES + NCCL_BYTES * (num_processes > 1)
    return {name: size for name, size in peak.items() if size}, moment


def events_of_steps(steady, in_step, trace, left_out):
    """Yield the allocations of two steps: what stays, what forward and backward take, and what the optimizer's step takes on top.

    The second step finds the cache of the first, and can need more than it.
    """
    base = 10 * len(trace.events) + 10  # numbers of blocks that are none of the trace's
    common = {c: min(size, in_step.get(c, 0)) for c, size in steady.items()}
    for number, size in enumerate(common.values()):
        if size:
            yield base + number, size
    backward_only = [size - common[c] for c, size in steady.items()]
    step_only = [size - common.get(c, 0) for c, size in in_step.items()]
    for _ in range(2):
        for number, size in enumerate(backward_only):
            if size > 0:
                yield base + 100 + number, size
        live = set()
        for block, size in trace.events:
            if trace.categories[abs(block)] not in left_out:
                yield block, size
                (live.add if block > 0 else live.discard)(abs(block))
        for number, size in enumerate(backward_only):
            if size > 0:
                yield -(base + 100 + number), size
        for number, size in enumerate(step_only):
            if size > 0:
                yield base + 200 + number, size
        for number, size in enumerate(step_only):
            if size > 0:
                yield -(base + 200 + number), size
        for block in live:  # gradients, which zero_grad frees
            yield -block, 0


def add_speed(result, machine, config, args, parameters, flops, num_processes):
    """Fill in the bytes that a GPU sends in a step, the seconds of a step, and a remark where the network is not hidden.

    Gradients and weights travel in the training precision under DeepSpeed, gradients in float32 under DDP.
    """
    micro = -(-args.gradient_accumulation_steps * args.per_device_train_batch_size // result.shape.rows)
    size = 2 if config is not None and args.mixed_precision != "no" else 4
    trainable = sum(p.numel for p in parameters if p.learns)
    weights = sum(p.numel * p.itemsize for p in parameters)
    stage = config["zero_optimization"]["stage"] if config else 0
    optimizer_on = section(config or {}, "zero_optimization.offload_optimizer").get("device", "none")
    weights_on = section(config or {}, "zero_optimization.offload_param").get("device", "none")
    reductions = micro if stage > 1 and not result.reduces_once else 1
    result.bytes_sent, local = bytes_of_step(
        stage,
        num_processes,
        weights=weights,
        learning=sum(p.numel * p.itemsize for p in parameters if p.learns),
        gradients=size * trainable,
        micro_batches=micro,
        reductions=reductions,
        hpz=section(config or {}, "zero_optimization").get("zero_hpz_partition_size", 1),
    )
    compute = flops * micro / (UTILISATION * machine.gpu.flops)
    network = result.bytes_sent / machine.link + local / machine.gpu.link
    to_host = (size * trainable * (micro + 1) if optimizer_on != "none" else 0) + (
        2 * micro * weights if weights_on != "none" else 0
    )
    here = min(num_processes, machine.gpus_per_node)
    host = to_host / num_processes / machine.gpu.host_link
    if optimizer_on != "none":  # AdamW reads and writes master weights and two moments, and reads gradients
        host += 28 * trainable * here / num_processes / HOST_MEMORY
    disk = 2 * sum(result.nvme.values()) / NVME
    if stage and section(config, "zero_optimization").get("overlap_comm", stage == 3) or not stage:
        exposed = max(0.0, network - compute)
    else:
        exposed = network
    result.seconds = compute + exposed + host + disk
    if network > compute and num_processes > 1:
        needed = int(result.shape.tokens * network / compute)
        result.remark = f"waits for the network: {result.shape.tokens:,} tokens a micro-batch, hidden from about {needed:,}"
    elif disk > compute:
        result.remark = "waits for the disk"
    elif host > compute:
        result.remark = "waits for the host"
