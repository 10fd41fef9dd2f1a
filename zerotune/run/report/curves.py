"""Which charts a run has: what of its History is drawn, in which units, and what is marked on the axis."""

from zerotune.run.report.charts import Bars, Chart, Mark, Series, number, smoothed
from zerotune.run.report.history import scores

GIB = 2**30
FEW = 30  # records, of which each is shown as it is


def charts_of_run(history):
    """Return the Charts and Bars of a run, those first that are looked at first; what was not measured has none."""
    marks, points = marks_of(history), history.points
    loss = Chart("loss", "Loss", "nats per target token", learned("training", points("loss")), marks)
    evaluated = [(record["step"], record["eval_loss"]) for record in history.evaluations]
    loss.series += [Series("evaluation", evaluated, 1, dots=True)] if evaluated else []
    rate = [Series("learning rate", points("learning_rate"))]
    norm = Chart("grad_norm", "Gradient norm", "L2, before clipping", learned("norm", points("grad_norm")), marks)
    if limit := history.arguments.get("max_grad_norm"):
        norm.level = (limit, f"clipped to {number(limit)}")
    speed = learned("tokens/s", points("tokens_per_second"))
    padding = [(step, None if share is None else 100 * share) for step, share in points("padding_fraction")]
    charts = [
        loss,
        *source_charts(history, marks),
        *evaluation_charts(history.evaluations, marks),
        Chart("learning_rate", "Learning rate", "of each step", rate, marks, from_zero=True),
        norm,
        Chart("tokens_per_second", "Speed", "real tokens/s, all processes", speed, marks, from_zero=True),
        Chart("memory", "Memory, peak so far", "GiB, process with most", memory_series(history), marks, from_zero=True),
        Chart("padding", "Padding", "% of all tokens", learned("padding", padding), marks, from_zero=True),
    ]
    if any(history.values("overflowed_steps")):
        lost = [Series("overflowed", points("overflowed_steps"))]
        charts.append(Chart("overflows", "fp16 overflows", "steps so far", lost, marks, from_zero=True))
    return [*charts, *save_charts(history, marks), *bars_of_run(history)]


def marks_of(history):
    """Return the Marks of a run: resumes, what was cut off, bad steps, saves and those that failed."""
    found = []
    for leg in history.legs[1:]:
        words = [f"resumed from step {leg['from_step']:,}"]
        words += [
            f"{name.replace('_', ' ')}: {leg[name]}"
            for name in ("started", "strategy", "num_processes", "machine")
            if leg.get(name)
        ]
        found.append(Mark("resume", leg["from_step"], "\n".join([*words, *map(str, leg.get("changes") or [])])))
    for start in history.starts:
        if (cut := start.get("cut_off_at_step")) is not None:
            words = f"cut off after step {cut:,}; the steps after {start['step']:,} were taken again"
            found.append(Mark("cut", cut, words, until=start["step"]))
    found += [Mark("bad", bad["step"], f"step {bad['step']:,}: {bad['bad_step']}") for bad in history.bad_steps]
    for save in history.saves:
        if "save_failed" in save:
            found.append(Mark("failed", save["step"], f"step {save['step']:,}: not saved: {save['save_failed']}"))
        else:
            found.append(Mark("save", save["step"], f"step {save['step']:,}: saved in {number(save['save_seconds'])} s"))
    return found


def learned(name, points, colour=0):
    """Return the Series of a noisy curve: as it is, and, where there are many records, its running mean before it."""
    if len(points) < FEW:
        return [Series(name, points, colour)]
    means, width = smoothed(points)
    return [Series("each record", points, colour, faint=True), Series(f"{name}, mean of {width} records", means, colour)]


def source_charts(history, marks):
    """Return [the chart of the losses of each source of rows, trained on or evaluated], [] where there is one source."""
    series = []
    for name, curve in history.of_sources.items():
        points = [(step, None if loss != loss else loss) for step, loss in zip(*curve, strict=True)]
        series.append(Series(name, smoothed(points)[0] if len(points) >= FEW else points, len(series)))
    evaluated = dict.fromkeys(
        name for record in history.evaluations for name in record if name.startswith("eval_") and name.endswith("_loss")
    )
    for name in [name for name in evaluated if name != "eval_loss"]:
        points = [(record["step"], record.get(name)) for record in history.evaluations]
        words = f"{name.removeprefix('eval_').removesuffix('_loss')}, evaluation"
        series.append(Series(words, points, len(series), dots=True))
    return [Chart("loss_by_source", "Loss by source", "nats per target token", series, marks)] if series else []


def evaluation_charts(records, marks):
    """Return a chart of the scores from 0 to 1 and one of those beyond, such as BLEU. Perplexity is the loss again."""
    names = dict.fromkeys(name for record in records for name in scores(record, "eval") if name != "perplexity")
    curves = {name: [(record["step"], record.get(name)) for record in records] for name in names}
    shares = {name for name, points in curves.items() if all(y is None or 0 <= y <= 1 for _, y in points)}
    charts = []
    for key, unit, chosen in (
        ("scores", "0 to 1", [name for name in names if name in shares]),
        ("scores_beyond_1", "as the metric has it", [name for name in names if name not in shares]),
    ):
        series = [Series(name, curves[name], colour, dots=True) for colour, name in enumerate(chosen)]
        title = "Evaluation scores" if len(chosen) > 1 else f"Evaluation: {''.join(chosen)}"
        charts += [Chart(key, title, unit, series, marks, from_zero=key == "scores")] if series else []
    return charts


def memory_series(history):
    kinds = ("device", "peak_device_memory_gib"), ("host, resident", "peak_host_memory_gib")
    return [Series(name, history.points(key), colour) for colour, (name, key) in enumerate(kinds) if any(history.values(key))]


def save_charts(history, marks):
    """Return [the chart of how long saves took], [] without saves."""
    saves = [record for record in history.saves if "save_seconds" in record]
    if not saves:
        return []
    series = [Series("the whole save", [(record["step"], record["save_seconds"]) for record in saves], 0, dots=True)]
    stalls = [(record["step"], record["save_stall_seconds"]) for record in saves if record.get("save_stall_seconds") is not None]
    series += [Series("training stood still for it", stalls, 1, dots=True)] if stalls else []
    note = f"the last checkpoint: {saves[-1]['checkpoint_bytes'] / 1e6:,.1f} MB"
    return [Chart("saves", "Saves", "seconds", series, marks, from_zero=True, note=note)]


def bars_of_run(history):
    """Return memory by category, planned beside measured, and where the time of a profiled step went."""
    charts, memory = [], history.run.get("memory") or {}
    planned, measured = memory.get("planned_bytes") or {}, memory.get("measured_bytes") or {}
    if measured:
        on_cpu = history.engine.get("device") == "cpu"
        where = "the process's growth since before its model was loaded" if on_cpu else "what CUDA's allocator had reserved"
        rows = [(kind, [planned[kind] / GIB if kind in planned else None, size / GIB]) for kind, size in measured.items()]
        note = f"of the process with most, at most; the measured total is {where}"
        charts.append(Bars("memory_by_category", "Memory by category", "GiB", ["planned", "measured"], rows, note))
    for record in history.profiles[-1:]:
        kinds = ("data", "forward", "backward", "optimizer", "wait")
        rows = [(kind, [record[f"{kind}_seconds"]]) for kind in kinds if record.get(f"{kind}_seconds") is not None]
        note = "of the profiled steps; wait: communication or copies while nothing was computed, in the traced one"
        charts.append(Bars("phases", "Time of a step", "seconds", ["seconds"], rows, note))
    return charts
