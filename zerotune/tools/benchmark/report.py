"""A benchmark's results for people: a Markdown table and plots, each with the hardware, versions and commit that they are from."""

import statistics
from collections import defaultdict

RATIO_REPEATS = 5  # a ratio of fewer repeats is not quoted
COLOURS = {  # of what memory is filled with
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer states": "#55a868",
    "activations, buffers": "#c9b458",
    "interpreter, libraries": "#bab0ac",
}
SHORT = {
    "per_device_train_batch_size": "b",
    "gradient_accumulation_steps": "x",
    "max_source_length": "S",
    "max_target_length": "T",
}


def batch_label(batch):
    """Return a short name of a batch's flags: {"per_device_train_batch_size": 8, "max_source_length": 64} is 'b8 S64'."""
    return " ".join(f"{SHORT.get(name, name + '=')}{value}" for name, value in batch.items())


def memory_of(cell):
    """Return (kind, GiB) of the memory that a cell is short of first: the device's, or the host's where there is no GPU."""
    kind = "device" if cell["peak_device_memory_gib"] else "host"
    return kind, cell[f"peak_{kind}_memory_gib"]


def one_line(facts):
    """Return a finished cell in a few words, for the console."""
    name = " ".join(part for part in (facts["strategy"], facts["set"], facts["batch"], facts["engine"]) if part)
    if facts["status"] != "ok":
        return f"{name}: {facts['status']}: {facts['reason'][:120]}"
    kind, memory = memory_of(facts)
    return f"{name}: {facts['tokens_per_second']['median']:,.0f} tokens/s, {memory:.2f} GiB ({kind})"


def ratio_of(pairs):
    """Return {"median", "min", "max", "repeats"} of a / b over interleaved repeats, or None if there are too few to quote one."""
    ratios = [a / b for a, b in pairs]
    if len(ratios) < RATIO_REPEATS:
        return None
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "repeats": len(ratios)}


def aggregate(cells, matrix):
    """Return a row for each set, batch and strategy over its repeats.

    Ratios are to the baseline strategy in the same repeat, or, in a matrix of one strategy, to the first set.
    """
    groups, baseline = defaultdict(list), matrix["baseline"] or matrix["strategies"][0]
    batches = [batch_label(batch) for batch in matrix["batches"]]
    for cell in cells:
        groups[cell["set"], cell["batch"], cell["strategy"]].append(cell)
    rows = []

    def place(key):
        return list(matrix["sets"]).index(key[0]), batches.index(key[1]), matrix["strategies"].index(key[2])

    for name, batch, strategy in sorted(groups, key=place):
        group = groups[name, batch, strategy]
        row = {"strategy": strategy, "set": name, "batch": batch, "repeats": len(group)}
        good = [cell for cell in group if cell["status"] == "ok"]
        if len(good) < len(group):
            bad = next(cell for cell in group if cell["status"] != "ok")
            rows.append(row | {"status": bad["status"], "reason": bad["reason"]})
            continue
        speeds = [cell["tokens_per_second"] for cell in good]
        row |= {key: good[0][key] for key in ("num_processes", "trainable_parameters", "parameters", "mixed_precision", "device")}
        row |= {
            "status": "ok",
            "tokens_per_second": {
                "median": statistics.median(speed["median"] for speed in speeds),
                "min": min(speed["min"] for speed in speeds),
                "max": max(speed["max"] for speed in speeds),
            },
            "peak_device_memory_gib": max(cell["peak_device_memory_gib"] for cell in good),
            "peak_host_memory_gib": max(cell["peak_host_memory_gib"] for cell in good),
            "memory_gib": good[0].get("memory_gib"),
            "final_loss": good[0]["final_loss"],
            "host_memory_before_model_gib": good[0]["host_memory_before_model_gib"],
        }
        keys = "step_seconds data_seconds forward_seconds backward_seconds optimizer_seconds wait_seconds mfu flops_per_real_token "
        keys += "padding_fraction checkpoint_bytes save_seconds"
        for key in keys.split():
            values = [value["median"] if isinstance(value := cell.get(key), dict) else value for cell in good]
            row[key] = None if None in values else statistics.median(values)
        against = (name, batch, baseline) if len(matrix["strategies"]) > 1 else (next(iter(matrix["sets"])), batch, strategy)
        base = {cell["repeat"]: cell for cell in groups.get(against, []) if cell["status"] == "ok"}
        pairs = [(c["mean_tokens_per_second"], base[c["repeat"]]["mean_tokens_per_second"]) for c in good if c["repeat"] in base]
        row["speed_ratio"] = ratio_of(pairs) if against != (name, batch, strategy) else None
        rows.append(row)
    return rows


def source_line(results):
    """Return the hardware, versions and commit of the numbers, in a line."""
    facts = results["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "deepspeed", "transformers", "accelerate"))
    return f"{facts['device']}; {versions}; commit {short(facts['git_commit'])}"


def short(commits):
    """Shorten commits, which are separated by commas."""
    return ", ".join(c[:12] + " with changes" * c.endswith("-dirty") for c in str(commits).split(", "))


def number(value, form, scale=1):
    return "-" if value is None else format(value * scale, form)


def markdown(results):
    """Return the Markdown table of a benchmark's rows with its title, its source and what the columns are."""
    title, lines = results["matrix"]["title"], []
    if title:
        lines += [f"### {title}", ""]
    lines += table_of_peer(results["rows"]) if results["matrix"]["peer"] else table(results["rows"])
    lines += ["", f"{source_line(results)}."]
    for precision, peak in results["peaks"].items():
        name = {"no": "float32"}.get(precision, precision)
        lines.append(f"Peak of MFU, {name}: {peak['flops_per_second'] / 1e12:,.2f} TFLOP/s ({peak['source']}).")
    if "control_drift" in results:
        lines.append(f"The control cell, run first and last, differed by {100 * results['control_drift']:+.0f} % in speed.")
    return "\n".join(lines) + "\n"


def table(rows):
    kind = "device" if any(row.get("peak_device_memory_gib") for row in rows) else "host"
    kinds = ["device", "host"] if kind == "device" else ["host"]  # what offload takes from the one it puts on the other
    head = [
        "flags",
        "batch",
        "strategy",
        "tokens/s (min-max)",
        "vs",
        *(f"{kind} GiB" for kind in kinds),
        "data",
        "forward",
        "backward",
        "optimizer",
    ]
    head += ["wait", "MFU", "MFLOP/token", "padding", "loss", "checkpoint"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["set"], row["batch"], f"`{row['strategy']}`"]
        if row["status"] != "ok":
            lines.append("| " + " | ".join([*cells, f"{row['status']}: {row['reason'][:80]}", *[""] * (len(head) - 4)]) + " |")
            continue
        speed, ratio = row["tokens_per_second"], row["speed_ratio"]
        cells.append(f"{speed['median']:,.0f} ({speed['min']:,.0f}-{speed['max']:,.0f})")
        cells.append(f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "")
        cells += [f"{row[f'peak_{kind}_memory_gib']:.2f}" for kind in kinds]
        cells += [number(row[f"{phase}_seconds"], ".1f", 1e3) for phase in ("data", "forward", "backward", "optimizer", "wait")]
        cells += [
            number(row["mfu"], ".1%"),
            number(row["flops_per_real_token"], ".1f", 1e-6),
            number(row["padding_fraction"], ".0%"),
        ]
        cells += [number(row["final_loss"], ".3f"), number(row["checkpoint_bytes"], ".1f MB".replace(" MB", ""), 1e-6)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "tokens/s: real tokens of all processes, median over steps and repeats. data to wait: milliseconds of a step; wait is",
    ]
    lines += ["communication, or copies between host and device, while nothing was computed, and lies within the phases. vs: speed"]
    lines += [
        f"against the baseline strategy (if there is one alone: the first flags), from {RATIO_REPEATS} repeats on. checkpoint: MB."
    ]
    return lines


def table_of_peer(rows):
    head = ["row", "settings", "tokens/s, ours / Trainer", "speed ratio", "FLOPs per real token, ratio", "peak memory, ratio"]
    head += ["padding, ours / Trainer", "loss first to last, ours", "Trainer"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["set"], row["batch"]]
        if row["status"] != "ok":
            lines.append("| " + " | ".join([*cells, f"{row['status']}: {row['reason'][:80]}", *[""] * (len(head) - 3)]) + " |")
            continue
        for_ratio = [row["speed_ratio"], row["flops_ratio"], row["memory_ratio"]]
        cells.append(" / ".join(f"{row[engine]['tokens_per_second']:,.0f}" for engine in ("zerotune", "trainer")))
        cells += [f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" if r else "-" for r in for_ratio]
        cells.append(" / ".join(f"{row[engine]['padding_fraction']:.0%}" for engine in ("zerotune", "trainer")))
        cells += [f"{row[engine]['first_loss']:.3f} to {row[engine]['last_loss']:.3f}" for engine in ("zerotune", "trainer")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Ratios are ours / Trainer in the same repeat: median (min-max). Speed above 1 and the others below 1 are in our favour.",
    ]
    lines += [
        "Where the Trainer's loss is a multiple of ours: its forward took the number of tokens and ignored it, so that it logs"
    ]
    lines += [
        "the sum over the accumulated micro-batches (T5 and BART in transformers 5.23); divide by gradient_accumulation_steps."
    ]
    return lines


def draw(results, out):
    """Write memory.png, speed.png and pareto.png into `out`; cells without numbers are named beside the axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return
    kind = "device" if any(row["peak_device_memory_gib"] for row in good) else "host"
    several = [key for key in ("strategy", "set", "batch") if len({row[key] for row in rows}) > 1] or ["strategy"]
    names = {id(row): " ".join(row[key] for key in several) for row in rows}
    title = results["matrix"]["title"]

    def start(height):
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        figure.text(0.01, 0.05 / height, source_line(results), fontsize=7, color="#555555")
        figure.get_layout_engine().set(rect=(0, 0.22 / height, 1, 1 - 0.22 / height))
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def bars(axes):
        places = range(len(rows))
        axes.set_yticks(places, [names[id(row)] for row in rows])
        axes.invert_yaxis()
        for place, row in zip(places, rows, strict=True):
            if row["status"] != "ok":
                axes.text(0, place, f" {row['status']}", va="center", color="#b03030")
        return places

    figure, axes = start(1.6 + 0.34 * len(rows))
    places, left = bars(axes), [0.0] * len(rows)
    filled = [categories(row, kind) if row["status"] == "ok" else {} for row in rows]
    for category, colour in COLOURS.items():
        widths = [sizes.get(category, 0.0) for sizes in filled]
        if any(widths):
            axes.barh(places, widths, left=left, color=colour, label=category)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(f"peak {kind} memory of a process, GiB")
    axes.set_title(f"{title}: memory" if title else "memory")
    figure.legend(loc="outside upper right", ncols=5, fontsize=8, frameon=False)
    figure.savefig(out / "memory.png", dpi=110)

    figure, axes = start(1.4 + 0.34 * len(rows))
    places = bars(axes)
    speeds = [row["tokens_per_second"] if row["status"] == "ok" else {"median": 0, "min": 0, "max": 0} for row in rows]
    medians = [speed["median"] for speed in speeds]
    errors = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    axes.barh(places, medians, xerr=errors, color="#4c72b0", error_kw={"elinewidth": 1, "ecolor": "#333333"})
    axes.set_xlabel("real tokens/s of all processes: median, least and most of a step")
    axes.set_title(f"{title}: speed" if title else "speed")
    figure.savefig(out / "speed.png", dpi=110)

    figure, axes = start(5.5)
    points = sorted((memory_of(row)[1], row["tokens_per_second"]["median"], names[id(row)]) for row in good)
    front, best = [(points[0][0], 0)], 0
    for memory, speed, _ in points:
        if speed > best:
            front, best = [*front, (memory, speed)], speed
    front.append((points[-1][0], best))
    axes.step(*zip(*front, strict=True), where="post", color="#bbbbbb", zorder=1)
    colours = dict(zip(sorted({row["set"] for row in good}), plt.cm.tab10.colors * 4, strict=False))
    for row in good:
        axes.scatter(memory_of(row)[1], row["tokens_per_second"]["median"], color=colours[row["set"]], zorder=2)
    axes.set_xlabel(f"peak {kind} memory of a process, GiB")
    axes.set_ylabel("real tokens/s of all processes, median")
    axes.set_ylim(0, 1.08 * best)
    axes.margins(x=0.18)
    label_points(axes, points)
    axes.set_title(f"{title}: nothing above and left of the line" if title else "nothing above and left of the line")
    figure.savefig(out / "pareto.png", dpi=110)
    plt.close("all")


def categories(row, kind):
    """Return {what: GiB} of a row's peak memory; what is not counted at its tensors is taken for activations and buffers."""
    counted = (row.get("memory_gib") or {}).get(kind) or {}
    sizes = {name if name != "optimizer" else "optimizer states": size for name, size in counted.items()}
    if kind == "host":
        sizes["interpreter, libraries"] = row["host_memory_before_model_gib"]
    return sizes | {"activations, buffers": max(0.0, row[f"peak_{kind}_memory_gib"] - sum(sizes.values()))}


def label_points(axes, points):
    """Name the points, a label lower or higher where it would cover another."""
    tallest, (left, right) = max(speed for _, speed, _ in points), axes.get_xlim()
    letter, line = 0.008 * (right - left), 0.035 * tallest
    taken = [(memory - letter, memory + letter / 2, speed) for memory, speed, _ in points]  # begin, end and height of what is drawn
    for memory, speed, name in sorted(points, key=lambda point: -point[1]):
        begin, end = memory + letter, memory + letter * (1 + len(name))
        heights = (speed + 0.7 * line + sign * number * line / 2 for number in range(40) for sign in (1, -1))
        free = (h for h in heights if not any(begin < e and b < end and abs(h - other) < 0.9 * line for b, e, other in taken))
        height = next(free, speed)
        taken.append((begin, end, height))
        axes.annotate(name, (memory, speed), (begin, height), fontsize=8, va="center")
