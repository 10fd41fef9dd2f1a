"""The charts of a page as PNG files, for slides and messages. Needs matplotlib, which no run trains with (requirements.txt)."""

import os
from pathlib import Path

from zerotune.run.report.charts import DASHES, NUM_COLOURS, Axis, Bars, thinned

COLOURS = ("#0a66b0", "#c8500a", "#00836a", "#a8518a", "#8f6a00", "#6650a8", "#5a6068")  # page.css, on light paper
SIGNS = {
    "resume": (">", "#1a7f4b"),
    "cut": ("s", "#b3261e"),
    "bad": ("x", "#b3261e"),
    "failed": ("^", "#b3261e"),
    "save": ("|", "#59626b"),
}


def write_pictures(charts, folder):
    """Write folder/<key>.png of each Chart and Bars that has something to show; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    written = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for chart in charts:
        figure = Figure(figsize=(6.4, 3.6))
        left = 0.35 if isinstance(chart, Bars) else 0.14  # given, as laying out by what is drawn would draw everything twice
        axes = figure.add_axes((left, 0.14, 0.97 - left, 0.72))
        if not (draw_bars if isinstance(chart, Bars) else draw_curves)(axes, chart):
            continue
        axes.set_title(chart.title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        path = Path(folder) / f"{chart.key}.png"
        temporary = Path(f"{path}.tmp")
        figure.savefig(temporary, dpi=150, format="png")
        os.replace(temporary, path)
        written.append(path)
    return written


def draw_curves(axes, chart):
    """Draw a Chart and return whether there was anything to draw."""
    drawn = False
    for series in chart.series:
        points = [(x, float("nan") if y is None else y) for x, y in thinned(series.points)]
        drawn |= any(y == y for _, y in points)
        dashes = DASHES[series.colour // NUM_COLOURS % len(DASHES)]
        axes.plot(
            *(zip(*points, strict=True) if points else ((), ())),
            color=COLOURS[series.colour % NUM_COLOURS],
            linestyle=(0, tuple(map(float, dashes.split()))) if dashes else "-",
            alpha=0.35 if series.faint else 1,
            linewidth=1 if series.faint else 1.8,
            marker="o" if len(points) <= 12 or (series.dots and len(points) <= 60) else None,
            markersize=4,
            label=series.name,
        )
    ys = [y for series in chart.series for _, y in series.points if y is not None]
    if Axis(ys, 0, 1, may_be_log=True).log:
        axes.set_yscale("log")
    bottom = axes.get_xaxis_transform()  # x in steps, y from 0 at the axis to 1
    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        marker, colour = SIGNS[kind]
        xs = [mark.x for mark in chart.marks if mark.kind == kind]
        axes.plot(
            xs, [0] * len(xs), marker, color=colour, transform=bottom, clip_on=False, markersize=6, label=kind, linestyle="none"
        )
    for mark in chart.marks:
        if mark.until is not None:
            axes.axvspan(mark.until, mark.x, color=SIGNS[mark.kind][1], alpha=0.08, linewidth=0)
    if chart.level:
        axes.axhline(chart.level[0], color="#59626b", linestyle=":", linewidth=1, label=chart.level[1])
    if chart.from_zero and axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(chart.x_name)
    axes.set_ylabel(chart.unit)
    return drawn


def draw_bars(axes, bars):
    """Draw Bars and return whether there was anything to draw."""
    height = 0.8 / len(bars.names)
    for place, name in enumerate(bars.names):
        ends = [row[place] or 0 for _, row in bars.rows]
        axes.barh([y + place * height for y in range(len(bars.rows))], ends, 0.9 * height, color=COLOURS[place], label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(bars.rows))], [label for label, _ in bars.rows])
    axes.invert_yaxis()
    axes.set_xlabel(bars.unit)
    if len(bars.names) > 1:
        axes.legend(frameon=False, fontsize="small")
    return bool(bars.rows)
