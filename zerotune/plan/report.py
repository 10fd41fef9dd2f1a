"""A plan for people: a table of strategies, the launch line of the fastest that fits, or what would have to change."""

import shlex

from zerotune.plan.changes import fastest, smallest_changes
from zerotune.plan.forecast import CACHE, OUTSIDE, strategies_on
from zerotune.plan.machine import GIB
from zerotune.plan.parameters import BUCKETS, FROZEN, GATHERED, GRADIENTS, LOCAL, OPTIMIZER, REDUCTION, STEP, WEIGHTS
from zerotune.plan.trace import ACTIVATION, COPY, LOGITS

COLUMNS = {  # of the table: which categories of the GPU's memory they add up
    "weights": (WEIGHTS, FROZEN, COPY),
    "gradients": (GRADIENTS, LOCAL),
    "optimizer": (OPTIMIZER,),
    "activations": (ACTIVATION,),
    "logits": (LOGITS,),
    "gathered": (GATHERED,),
    "engine": (BUCKETS, REDUCTION, STEP),
    "CUDA, NCCL": (OUTSIDE,),
    "cache": (CACHE,),
}


def gib(size):
    """Return bytes in GiB as a word, '-' for none; small models need the third digit."""
    if not size:
        return "-"
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.3f}"


def table(forecasts):
    """Return the lines of a table: GiB by category on a GPU, its total, what is left, GiB on a host, sent in a step, and speed."""
    best = fastest(forecasts)
    shown = {name: kinds for name, kinds in COLUMNS.items() if any(f.device.get(kind) for f in forecasts for kind in kinds)}
    head = ["GiB on a GPU", *shown, "total", "left", "host", "NVMe", "sent", "speed", ""]
    rows = []
    for f in forecasts:
        if f.problem:
            continue
        cells = [gib(sum(f.device.get(kind, 0) for kind in kinds)) for kinds in shown.values()]
        left = "" if f.device_limit is None else f"{(f.device_limit - f.device_bytes) / GIB:+.2f}"
        speed = f"{f.rows_per_second / best.rows_per_second:.2f}" if best else ""
        words = "fits" if f.fits else "does not fit" + where_short(f)
        rows.append(
            [f.strategy, *cells, gib(f.device_bytes), left, gib(sum(f.host.values())), gib(sum(f.nvme.values())), gib(f.bytes_sent)]
            + [speed, words + f"; {f.remark}" * bool(f.remark)]
        )
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if n in (0, len(head) - 1) else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return [line.rstrip() for line in lines] + [f"{f.strategy}: {f.problem}" for f in forecasts if f.problem]


def where_short(forecast):
    """Return ' (host)', ' (NVMe)' or '' for a GPU: where a strategy needs more than there is."""
    if forecast.host_limit is not None and sum(forecast.host.values()) > forecast.host_limit:
        return " (host)"
    if forecast.nvme_limit is not None and sum(forecast.nvme.values()) > forecast.nvme_limit:
        return " (NVMe)"
    return ""


def launch_line(strategy, machine, words, changes=None):
    """Return the command that starts train.py under a strategy; words: the user's flags, changes: {flag: value} after them."""
    words = [*words]
    for name, value in (changes or {}).items():
        words += [f"--{name}"] + ([] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)])
    if strategy == "zero3_nvme":
        words += ["--save_steps", "0"]
    processes = "" if strategy == "single" else f" NUM_PROCESSES={machine.num_gpus}"
    nodes = ""
    if machine.num_nodes > 1 and strategy != "single":
        nodes = f" NUM_MACHINES={machine.num_nodes} MACHINE_RANK=0..{machine.num_nodes - 1} MAIN_PROCESS_IP=ADDRESS_OF_MACHINE_0"
    return f"STRATEGY={strategy}{processes}{nodes} bash scripts/launch.sh {shlex.join(words)}"


def answer(planner, machine, forecasts, words):
    """Return (JSON-like facts, lines): what to launch, or what to change where nothing fits."""
    best = fastest(forecasts)
    if best is not None:
        line = launch_line(best.strategy, machine, words)
        return {"fastest": best.strategy, "launch": line, "changes": []}, [f"fastest that fits: {best.strategy}", f"    {line}"]
    lines, changes = ["nothing fits; the smallest changes that would:"], []
    for text, flags, forecast in smallest_changes(planner, machine):
        line = launch_line(forecast.strategy, machine, words, flags)
        changes.append({"what": text, "flags": flags, "forecast": forecast.facts(), "launch": line})
        lines += [f"  {text}, {forecast.strategy}: {gib(forecast.device_bytes)} GiB on a GPU", f"    {line}"]
    if not changes:
        lines = ["nothing fits, and none of the changes that the planner knows is enough: more GPUs, or a smaller model"]
    return {"fastest": None, "launch": None, "changes": changes}, lines


def heading(planner, machine, forecasts):
    """Return the line that says what was planned."""
    parameters = next(iter(planner.traced.values()))[0]
    total, learn = sum(p.numel for p in parameters), sum(p.numel for p in parameters if p.learns)
    shape = next(f.shape for f in forecasts if not f.problem)
    where = "the largest that the flags allow" if shape.step is None else f"step {shape.step + 1}, rank {shape.rank}"
    if shape.row is not None:
        where = f"rows as long as that of line {planner.data.lines('train', [shape.row])[0]}"
    return (
        f"plan: {planner.config.model_type}, {total:,} parameters, {learn:,} learn; {machine}; micro-batch of {shape} ({where}); "
        f"precision {planner.args.mixed_precision}"
    )


def host_lines(forecasts):
    """Return a line for each strategy that needs more than its host has, and for one that is alone: GiB of a host by category."""
    shown = [f for f in forecasts if not f.problem and (len(forecasts) == 1 or where_short(f) == " (host)")]
    return [
        f"host of {f.strategy}, GiB of {gib(f.host_limit)}: " + ", ".join(f"{kind} {gib(size)}" for kind, size in f.host.items())
        for f in shown
    ]


def plan_lines(planner, machine, words, strategies=()):
    """Return (JSON-like facts, lines) of a whole plan; strategies: () for all that the machine has a use for."""
    forecasts = [planner.forecast(strategy, machine) for strategy in strategies or strategies_on(machine)]
    if all(f.problem for f in forecasts):
        return {"forecasts": [f.facts() for f in forecasts]}, [f"{f.strategy}: {f.problem}" for f in forecasts]
    facts, lines = answer(planner, machine, forecasts, words)
    facts = {"machine": str(machine), "forecasts": [f.facts() for f in forecasts], **facts}
    return facts, [heading(planner, machine, forecasts), *table(forecasts), *host_lines(forecasts), *lines]
