"""Charts as data, and as SVG that stands in a page: no script, colours from the page's style sheet, numbers as tooltips.

SVG is written here by hand because it is written at every save of a training run: matplotlib would cost half a second and 50 MB of
the training process. The same Chart becomes a PNG in pictures.py, after the run.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 236  # of the drawing, in SVG units: close to pixels in a column of a page, and on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 444, 24, 190  # of the plane inside it
NUM_COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # a second sign beside the colour, for those who see fewer of these
BUCKETS = 400  # a curve of more than 2 x BUCKETS points keeps the lowest and the highest of each: no spike is lost
NUM_TOOLTIPS = 60
KINDS = {  # what is marked on the axis: (words, the sign, drawn around 0 0)
    "resume": ("resumed", "M-4-5L4 0L-4 5Z"),
    "cut": ("cut off; the steps in the tinted part were taken twice", "M-3.5-5H3.5V5H-3.5Z"),
    "bad": ("bad step, skipped", "M-4-4L4 4M-4 4L4-4"),
    "failed": ("save failed", "M-4 4L0-4L4 4Z"),
    "save": ("save", "M0-2V4"),
}


@dataclass
class Series:
    """A curve: points are (x, y) in the order of x, y None where there is no number."""

    name: str
    points: list
    colour: int = 0  # of the page's palette; beyond it the colours come again with other dashes
    faint: bool = False  # behind another one, which is the same smoothed
    dots: bool = False  # each point is a measurement of its own


@dataclass
class Mark:
    """Something that happened: at x, or from x on until `until`."""

    kind: str  # of KINDS
    x: float
    text: str
    until: float | None = None


@dataclass
class Chart:
    """Curves over a common axis. `key` is its name in links and files."""

    key: str
    title: str
    unit: str
    series: list
    marks: list = field(default_factory=list)
    x_name: str = "optimizer step"
    level: tuple | None = None  # (y, words) of a line to compare with
    from_zero: bool = False
    note: str = ""


@dataclass
class Bars:
    """Horizontal bars: rows are (label, [a value for each of `names`, None for no bar])."""

    key: str
    title: str
    unit: str
    names: list
    rows: list
    note: str = ""


def number(value, digits=4):
    """Return a number for people: 12,345 and 0.01234, not 12345.0 and 1.234e-02."""
    if value is None:
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa + (e and f"e{int(exponent)}")


def tick(value):
    """Return a short number for an axis: 20k, 1.5M, 5e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):.4g}{letter}"
    return number(float(f"{value:.6g}"), 6) if value else "0"


def ticks(low, high, count=5):
    """Return round values between low and high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(size for size in (power, 2 * power, 5 * power, 10 * power) if size >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [place * size for place in range(first, math.floor(high / size + 1e-9) + 1)]


class Axis:
    """A map from values to places in the drawing; log: if the values are positive and a few would flatten all others."""

    def __init__(self, values, start, end, from_zero=False, may_be_log=False):
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        middle = sorted(values)[len(values) // 2] if values else 1.0
        self.log = may_be_log and low > 0 and high > 20 * middle
        if self.log:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
            every = max(1, (high - low) // 4)
            self.ticks = [10.0**power for power in range(low, high + 1, every)]
        else:
            if from_zero:
                low = min(0.0, low)
            if high - low < 1e-9 * max(abs(high), abs(low), 1e-12):  # one value: room around it
                room = abs(high) or 1
                low, high = low - (0 if from_zero else room), high + room
            elif may_be_log:
                high, low = high + 0.04 * (high - low), low if from_zero else low - 0.04 * (high - low)
            self.ticks = ticks(low, high)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value):
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def thinned(points, buckets=BUCKETS):
    """Return at most 2 x buckets points of a curve: the lowest and the highest of each bucket, in their order."""
    if len(points) <= 2 * buckets:
        return points
    kept = []
    for number in range(buckets):
        bucket = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        real = [point for point in bucket if point[1] is not None]
        ends = {min(real, key=lambda p: p[1]), max(real, key=lambda p: p[1])} if real else {bucket[0]}
        kept += sorted(ends, key=lambda p: p[0])
    return kept


def smoothed(points):
    """Return (points as running means, over how many records each): a fiftieth of the curve, at least 5 records."""
    width = max(5, len(points) // 50)
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    means = []
    for place, (x, y) in enumerate(points):
        begin, end = max(0, place - width // 2), min(len(points), place + width // 2 + 1)
        count = counts[end] - counts[begin]
        means.append((x, (sums[end] - sums[begin]) / count if count and y is not None else None))
    return means, width


def looks(series):
    """Return (the CSS colour, the dashes) of a series."""
    return f"var(--c{series.colour % NUM_COLOURS})", DASHES[series.colour // NUM_COLOURS % len(DASHES)]


def curve(series, across, up):
    """Return a series as a path, and a circle for each point where they are few or it wants them."""
    colour, dash = looks(series)
    words, pen = [], False
    points = thinned(series.points)
    for place, (x, y) in enumerate(points):
        if y is None:
            pen = False
            continue
        alone = not pen and (place + 1 == len(points) or points[place + 1][1] is None)
        words.append(f"{'L' if pen else 'M'}{across(x):.1f} {up(y):.1f}{'h0' if alone else ''}")
        pen = True
    drawn = f'<path class="curve{" faint" * series.faint}" style="stroke:{colour}" stroke-dasharray="{dash}" d="{"".join(words)}"/>'
    real = [(x, y) for x, y in points if y is not None]
    if (series.dots and len(real) <= 60) or len(real) <= 12:
        drawn += "".join(f'<circle r="2.6" style="fill:{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}"/>' for x, y in real)
    return drawn


def tooltips(chart, across):
    """Return invisible columns over the plane, each with the newest numbers at its middle as a tooltip."""
    named = [series for series in chart.series if not series.faint or all(s.faint for s in chart.series)]
    xs = sorted({x for series in named for x, y in series.points if y is not None})
    xs = xs if len(xs) <= NUM_TOOLTIPS else [xs[place * (len(xs) - 1) // (NUM_TOOLTIPS - 1)] for place in range(NUM_TOOLTIPS)]
    known = [(series.name, [point for point in series.points if point[1] is not None]) for series in named]
    columns = []
    for place, x in enumerate(xs):
        begin = across((xs[place - 1] + x) / 2) if place else LEFT
        end = across((x + xs[place + 1]) / 2) if place + 1 < len(xs) else RIGHT
        lines = []
        for name, points in known:
            if before := bisect_right(points, x, key=lambda point: point[0]):
                at, y = points[before - 1]
                lines.append(f"{name}: {number(y)}" + (f" (of {number(at)})" if at != x else ""))
        words = escape("\n".join([f"{chart.x_name} {number(x)}", *lines]))
        columns.append(
            f'<g class="tip"><rect x="{begin:.1f}" y="{TOP}" width="{max(end - begin, 0.5):.1f}" height="{BOTTOM - TOP}"/>'
            f'<path d="M{across(x):.1f} {TOP}V{BOTTOM}"/><title>{words}</title></g>'
        )
    return "".join(columns)


def marks(chart, across):
    """Return the chart's marks as signs on the axis; those of a kind that would lie on each other become one."""
    drawn = []
    for kind in reversed(KINDS):
        groups = []
        for mark in sorted((mark for mark in chart.marks if mark.kind == kind), key=lambda mark: mark.x):
            if groups and across(mark.x) - across(groups[-1][0].x) < 5:
                groups[-1].append(mark)
            else:
                groups.append([mark])
        for group in groups:
            place, lines = across(group[0].x), [mark.text for mark in group]
            words = escape("\n".join([*lines[:6], *([f"and {len(lines) - 6} more"] if len(lines) > 6 else [])]))
            until = max((mark.until for mark in group if mark.until is not None), default=None)
            tint = ""
            if until is not None:
                begin = min(place, across(until))
                tint = f'<rect x="{begin:.1f}" y="{TOP}" width="{abs(across(until) - place):.1f}" height="{BOTTOM - TOP}"/>'
            line = f'<path class="line" d="M{place:.1f} {TOP}V{BOTTOM}"/>' if kind == "resume" else ""
            sign = f'<path class="sign" transform="translate({place:.1f} {BOTTOM})" d="{KINDS[kind][1]}"/>'
            drawn.append(f'<g class="mark {kind}">{tint}{line}{sign}<title>{words}</title></g>')
    return "".join(drawn)


def in_words(chart):
    """Return what the chart shows in a sentence, for those who do not see it."""
    said = []
    for series in chart.series:
        real = [point for point in series.points if point[1] is not None]
        if real and not series.faint:
            (first_x, first), (last_x, last) = real[0], real[-1]
            low, high = min(y for _, y in real), max(y for _, y in real)
            said.append(
                f"{series.name} from {number(first)} at {number(first_x)} to {number(last)} at {number(last_x)}, "
                f"between {number(low)} and {number(high)}"
            )
    return f"{chart.title} in {chart.unit} over {chart.x_name}: {'; '.join(said)}"


def svg(chart):
    """Return a Chart as an <svg>, or a line that says that there is nothing to draw yet."""
    ys = [y for series in chart.series for _, y in series.points if y is not None]
    xs = [x for series in chart.series for x, y in series.points if y is not None]
    if not ys:
        return '<p class="none">no record of it yet</p>'
    ys += [chart.level[0]] if chart.level and chart.level[0] <= 3 * max(ys) else []
    ends = [*xs, *(mark.x for mark in chart.marks), *(mark.until for mark in chart.marks if mark.until is not None)]
    across = Axis([0.0, min(ends), max(ends)] if min(ends) >= 0 else ends, LEFT, RIGHT)
    up = Axis(ys, BOTTOM, TOP, chart.from_zero, may_be_log=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(in_words(chart))}">']
    for value in up.ticks:
        place = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="up" x="{LEFT - 6}" y="{place + 4:.1f}">{tick(value)}</text>')
    whole = [value for value in across.ticks if chart.x_name != "optimizer step" or value == int(value)]
    for value in whole:
        parts.append(f'<text class="across" x="{across(value):.1f}" y="{BOTTOM + 19}">{tick(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    log = " (logarithmic)" * up.log
    parts.append(f'<text class="unit" x="{LEFT - 42}" y="12">{escape(chart.unit)}{log}</text>')
    parts.append(f'<text class="unit across" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}">{escape(chart.x_name)}</text>')
    if chart.level and chart.level[0] <= 3 * max(ys):
        parts.append(f'<path class="level" d="M{LEFT} {up(chart.level[0]):.1f}H{RIGHT}"/>')
    parts += [curve(series, across, up) for series in chart.series]
    return "".join([*parts, tooltips(chart, across), marks(chart, across), "</svg>"])


def bars_svg(bars):
    """Return Bars as an <svg>."""
    top, each = 24, 15 * len(bars.names) + 9
    height = top + each * len(bars.rows) + 26
    values = [value for _, row in bars.rows for value in row if value is not None]
    across = Axis([0.0, *values], 132, RIGHT - 38, from_zero=True)
    label = "; ".join(
        f"{label}: {', '.join(f'{name} {number(value)}' for name, value in zip(bars.names, row, strict=True))}"
        for label, row in bars.rows
    )
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{bars.title} in {bars.unit}: {label}")}">']
    for value in across.ticks:
        parts.append(f'<path class="grid" d="M{across(value):.1f} {top}V{height - 26}"/>')
        parts.append(f'<text class="across" x="{across(value):.1f}" y="{height - 10}">{tick(value)}</text>')
    parts.append(f'<text class="unit" x="8" y="12">{escape(bars.unit)}</text>')
    for place, (label, row) in enumerate(bars.rows):
        y = top + place * each + 5
        parts.append(f'<text class="up" x="124" y="{y + (each - 9) / 2 + 4:.1f}">{escape(label)}</text>')
        for which, (name, value) in enumerate(zip(bars.names, row, strict=True)):
            if value is None:
                continue
            end = max(across(value), 133)
            parts.append(
                f'<g><rect style="fill:var(--c{which})" x="132" y="{y + 15 * which}" width="{end - 132:.1f}" height="13" rx="2"/>'
                f'<text x="{end + 5:.1f}" y="{y + 15 * which + 11}">{number(value, 3)}</text>'
                f"<title>{escape(f'{label}, {name}: {number(value)} {bars.unit}')}</title></g>"
            )
    return "".join([*parts, "</svg>"])


def figure(chart):
    """Return a Chart or Bars as a <figure> with title, legend and note."""
    if isinstance(chart, Bars):
        bar = '<rect y="1" width="12" height="10" rx="2" style="fill:var(--c{})"/>'
        signs = [(name, bar.format(place)) for place, name in enumerate(chart.names)]
        drawing = bars_svg(chart)
    else:
        signs, drawing = [], svg(chart)
        for series in chart.series:
            colour, dash = looks(series)
            style = f'class="curve{" faint" * series.faint}" style="stroke:{colour}" stroke-dasharray="{dash}"'
            signs.append((series.name, f'<path {style} d="M0 6H20"/>'))
        signs += [(chart.level[1], '<path class="level" d="M0 6H20"/>')] if chart.level else []
    legend = "".join(f'<li><svg width="20" height="12" aria-hidden="true">{sign}</svg>{escape(name)}</li>' for name, sign in signs)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    legend = f'<ul class="legend">{legend}</ul>' if len(signs) > 1 and "<svg" in drawing else ""
    return f'<figure id="{chart.key}"><figcaption>{escape(chart.title)}</figcaption>{legend}{drawing}{note}</figure>'


def legend_of_marks(kinds):
    """Return the meaning of the signs on the axes, of those kinds that occur."""
    shown = [kind for kind in KINDS if kind in kinds]
    items = (
        f'<li><svg class="mark {kind}" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="sign" d="{KINDS[kind][1]}"/></svg>{KINDS[kind][0]}</li>'
        for kind in shown
    )
    return f'<ul class="legend">{"".join(items)}</ul>' if shown else ""
