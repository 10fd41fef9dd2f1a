"""Where the time of a step goes, what fills memory and what is sent, for the last --profile_steps steps of a run.

At each border between phases the device is waited for, so these steps are a little slower than the others. The very last one runs
under torch's profiler, which tells how long communication or copies between host and device went on while nothing was computed, and
how much memory the step took. In the step before them each collective's bytes are counted, which slows every operator.
"""

import re
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zerotune.run.records import GIB

TRANSFER = re.compile(r"nccl|memcpy (HtoD|DtoH)", re.IGNORECASE)
PHASES = ("data", "forward", "backward", "optimizer")


class Profile:
    """Call an instance with the name of the phase that begins; outside the profiled steps that does nothing."""

    def __init__(self, accelerator, model, optimizer, first_step, last_step):
        """Steps first_step to last_step - 1 are timed and last_step is traced; first_step > last_step: none."""
        self.first_step, self.last_step = first_step, last_step if first_step <= last_step else None
        self.model, self.optimizer = model, optimizer
        self.seconds, self.phase, self.trace, self.report = Counter(), None, None, None
        self.traffic = Traffic()
        if self.last_step:
            self._announce(accelerator, "backward", "backward")
            self._announce(accelerator, "clip_grad_norm_", "optimizer")
            if hasattr(model, "zero_optimization_stage"):  # DeepSpeed's own step runs inside the last backward
                self._announce(model, "step", "optimizer")

    def _announce(self, owner, name, phase):
        """Have a call of owner.name begin a phase."""
        inner = getattr(owner, name)

        def call(*arguments, **options):
            self(phase)
            return inner(*arguments, **options)

        setattr(owner, name, call)

    def step_begins(self, step):
        """step: the number of the step that comes, from 1."""
        self.phase = None
        if self.last_step and step == self.first_step - 1:
            self.traffic.__enter__()
        elif self.last_step and self.first_step <= step < self.last_step:
            self("data")
        elif step == self.last_step:
            self.before = memory_gib(self.model, self.optimizer)
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.trace = torch.profiler.profile(activities=activities, profile_memory=True)
            self.trace.start()

    def __call__(self, phase):
        if self.phase is not None or phase == "data":
            now = self._switch()
            self.phase, self.since = phase, now
        elif self.trace is not None and phase == "optimizer" and self.report is None:
            self.report = memory_gib(self.model, self.optimizer)  # all gradients are there, and the states of earlier steps

    def _switch(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self.since
        return now

    def step_ends(self, step):
        """Return {} or, after the last step, the record: mean seconds of each phase, of waiting, and memory by category."""
        if self.phase is not None:
            self._switch()
            self.phase = None
        if self.last_step and step == self.first_step - 1:
            self.traffic.__exit__(None, None, None)
        if self.trace is None:
            return {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.trace.stop()
        wait, peak = exposed_seconds(self.trace.events()), allocated_peak(self.trace)
        self.trace = None
        timed = self.last_step - self.first_step
        times = {f"{phase}_seconds": round(self.seconds[phase] / timed, 6) for phase in PHASES if timed}
        return {
            "step": step,
            **times,
            "wait_seconds": round(wait, 6),
            "before_step_gib": self.before,
            "step_peak_gib": peak,
            "memory_gib": self.report,
            "collective_bytes": dict(self.traffic.bytes),
        }


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that this rank hands to each kind of collective, by NCCL's and gloo's name.

    An all-gather counts by what it makes, all others by what they take: a tensor of n bytes for each. What a ring of N ranks sends
    for it is (N - 1) / N of that, for an all-reduce twice as much.
    """

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
            # The tensors come first; a base collective writes into the first of two.
            given = list(tensors_in(arguments[:1])) or list(tensors_in(arguments[1:2]))
            if name == "reduce_scatter":
                given = list(tensors_in(arguments[1:2]))
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in given)
        return function(*arguments, **(options or {}))


def exposed_seconds(events):
    """Return for how long collectives or host-device copies went on while no kernel (CPU: no operator) computed."""
    # Annotated ranges (an optimizer's step) span idle gaps; copies within the device compute as far as waiting goes.
    on_device = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    if on_device:
        transfers, compute = [], []
        for event in on_device:
            (transfers if TRANSFER.search(event.name) else compute).append(event)
    else:
        transfers = [event for event in events if event.name.startswith(("gloo:", "nccl:"))]
        compute = [event for event in events if event.name.startswith("aten::")]
    busy = union((event.time_range.start, event.time_range.end) for event in compute)
    moving = union((event.time_range.start, event.time_range.end) for event in transfers)
    both = union([*busy, *moving])
    return (length(both) - length(busy)) / 1e6  # microseconds


def allocated_peak(trace):
    """Return the GiB that a traced step took at most, above what was there when it began, by the events of torch's allocator."""
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    now = peak = 0
    for event in sorted((e for e in events if e.device_type().name == device), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return round(peak / GIB, 6)


def union(intervals):
    """Return sorted, disjoint (begin, end) pairs that cover the same."""
    merged = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def length(intervals):
    return sum(end - begin for begin, end in intervals)


def tensors_in(value, depth=4):
    """Yield the tensors in a nest of dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, depth - 1)


def quantisation_state(parameter):
    """Return what bitsandbytes keeps beside four-bit codes: scales, doubly quantised ones with their own."""
    state = getattr(parameter, "quant_state", None)
    return [vars(s) for s in (state, getattr(state, "state2", None)) if s is not None]


def eight_bit_state(module):
    """Return the codes and scales that bitsandbytes moves from an eight-bit weight to its layer in the first forward pass."""
    state = getattr(module, "state", None)
    return [getattr(state, "CB", None), getattr(state, "SCB", None)]


def memory_gib(model, optimizer):
    """Return {"device": ..., "host": ...} with GiB of weights, gradients and optimizer states on this rank, each storage once.

    Counted from the tensors themselves: a ZeRO optimizer's are those of its attributes, gradients where the name says so.
    """
    parameters = [*model.parameters(), *model.buffers()]
    shards = [shard for p in parameters if (shard := getattr(p, "ds_tensor", None)) is not None]
    scales = tensors_in([quantisation_state(p) for p in parameters] + [eight_bit_state(m) for m in model.modules()])
    groups = {
        "weights": [*parameters, *shards, *scales],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [],
    }
    outer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for owner in {id(o): o for o in (outer, getattr(outer, "optimizer", outer))}.values():
        for name, value in vars(owner).items():
            groups["gradients" if "grad" in name or "ipg" in name else "optimizer"] += tensors_in(value)
    seen, report = set(), {place: dict.fromkeys(groups, 0) for place in ("device", "host")}
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):  # gradients are views of its buckets, which stay
        groups["gradients"] = []
        place = "host" if model.device.type == "cpu" else "device"
        report[place]["gradients"] = sum(map(int, model._get_ddp_logging_data()["bucket_sizes"].split(", ")))
    for name, tensors in groups.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                report["host" if storage.device.type == "cpu" else "device"][name] += storage.nbytes()
    return {place: {name: round(size / GIB, 6) for name, size in sizes.items()} for place, sizes in report.items()}
