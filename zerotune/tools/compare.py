"""Several runs side by side: what differs in their flags and around them, what came of it, and their curves in one page.

    python -m zerotune compare runs/a runs/b [runs/c ...] [--out FILE.html] [--json]

prints the table and writes compare.html with a folder of the same charts as PNG beside it. The runs may be under way, of other
strategies and of other machines: only run.json and metrics.jsonl of each are read. Tests: tests/test_report.py.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from zerotune.errors import UserError
from zerotune.run.parsing import Parser
from zerotune.run.report.charts import Chart, Mark, Series, figure, legend_of_marks, number, smoothed
from zerotune.run.report.curves import FEW
from zerotune.run.report.history import read_history, results, scores
from zerotune.run.report.markup import page, section, table, text, write_page
from zerotune.run.report.page import in_words

CELL = 44  # characters of a cell in the terminal
CURVES = (  # of a training record: title, unit, whether it is as smooth as it should be shown
    ("learning_rate", "Learning rate", "of each step", True),
    ("grad_norm", "Gradient norm", "L2, before clipping", False),
    ("tokens_per_second", "Speed", "real tokens/s, all processes", False),
    ("peak_device_memory_gib", "Device memory, peak so far", "GiB, process with most", True),
    ("peak_host_memory_gib", "Host memory, peak so far", "GiB, process with most", True),
    ("padding_fraction", "Padding", "share of all tokens", False),
)


def main(words):
    parser = Parser(
        prog="python -m zerotune compare",
        usage="python -m zerotune compare RUN RUN... [--out FILE.html] [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's --output_dir")
    parser.add_argument("--out", default="compare.html", metavar="FILE", help="the page to write (default: compare.html)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON, in the order of the runs")
    own = parser.parse_intermixed_args(words)
    out = Path(own.out)
    histories = read_runs(own.runs, out)
    facts = comparison(histories)
    charts = charts_of_runs(facts["runs"], histories)
    try:
        write_page(out, page_of_runs(facts, charts))
        facts["page"], facts["pictures"] = str(out), draw(charts, out.with_suffix(""))
    except OSError as error:
        raise UserError(f"--out {out}: {error.filename}: {error.strerror}; give a file that can be written") from None
    print(json.dumps(facts, indent=2) if own.json else "\n".join(lines_of(facts)))
    return 0


def read_runs(folders, out):
    """Return the History of each folder; raise UserError with everything wrong with what was given."""
    problems, histories = [], []
    if len(folders) < 2:
        given = folders[0] if folders else "no run"
        problems.append(f"{given}: needs two runs or more; a single one has its page in report.html of its --output_dir")
    count = Counter(Path(folder).resolve() for folder in folders)
    problems += [f"{folder}: given {times} times; give each run once" for folder, times in count.items() if times > 1]
    if out.suffix != ".html":
        problems.append(f"--out {out}: must end in .html; its pictures go into a folder of the name before that")
    for folder in dict.fromkeys(folders):
        try:
            histories.append(read_history(folder, strict=True))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return histories


def names_of(folders):
    """Return a name for each folder: as much of the end of its path as no other has."""
    paths = [Path(folder).resolve().parts for folder in folders]
    names = []
    for path in paths:
        length = next(n for n in range(1, len(path) + 1) if sum(path[-n:] == other[-n:] for other in paths) == 1)
        names.append("/".join(path[-length:]))
    return names


def comparison(histories):
    """Return {"runs": names, "flags", "circumstances": what differs, "results": all}: {name: [a value for each run]}."""
    flags = [{name: value for name, value in history.arguments.items() if name != "output_dir"} for history in histories]
    outcomes = side_by_side([results(history) for history in histories])
    return {
        "runs": names_of([history.folder for history in histories]),
        "flags": differing(flags),
        "circumstances": differing([circumstances(history) for history in histories]),
        "results": {name: values for name, values in outcomes.items() if any(value is not None for value in values)},
    }


def circumstances(history):
    """Return what a run ran on and with, beside its flags."""
    run, train = history.run, (history.run.get("data") or {}).get("train") or {}
    facts = {"strategy": history.strategy} | {
        name: history.engine.get(name) for name in ("num_processes", "class", "base_optimizer")
    }
    facts |= {"device": run.get("device"), "commit": run.get("git_commit"), "steps in all": run.get("max_steps")}
    facts |= {"training rows": train.get("rows"), "rows' sha256": train.get("sha256")}
    facts |= {"trainable parameters": (run.get("parameters") or {}).get("trainable")}
    return facts | (run.get("versions") or {})


def side_by_side(facts):
    """Return {name: [a value for each of several dicts]}, None where one lacks it."""
    return {name: [each.get(name) for each in facts] for name in dict.fromkeys(name for each in facts for name in each)}


def differing(facts):
    return {name: values for name, values in side_by_side(facts).items() if any(value != values[0] for value in values)}


def shown(values):
    """Return a row of results for people: each number, and by how much it differs from the first run's."""
    cells = [number(value) if isinstance(value, (int, float)) else str(value or "-") for value in values]
    for place, value in enumerate(values[1:], 1):
        if isinstance(value, float) and isinstance(values[0], float) and value != values[0] > 0:
            cells[place] += f" ({100 * (value / values[0] - 1):+.1f} %)"
    return cells


def rows_of(facts):
    """Return [(title, [[name, a cell for each run]])] of the tables."""
    return [
        ("Flags that differ", [[f"--{name}", *map(in_words, values)] for name, values in facts["flags"].items()]),
        ("Around them", [[name, *map(in_words, values)] for name, values in facts["circumstances"].items()]),
        ("Results", [[name, *shown(values)] for name, values in facts["results"].items()]),
    ]


def lines_of(facts):
    """Return the comparison as lines for a terminal."""
    parts = [(title, rows or [["none"]]) for title, rows in rows_of(facts)]
    table = [["", *facts["runs"]], *(row for _, rows in parts for row in rows)]
    table = [[cell if len(cell) <= CELL else f"{cell[: CELL - 3]}..." for cell in row] for row in table]
    widths = [max(len(row[column]) for row in table if column < len(row)) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in table]
    head, lines, result = lines[0], lines[1:], []
    for title, rows in parts:
        result += [title.upper().ljust(widths[0]) + head[widths[0] :], *lines[: len(rows)], ""]
        lines = lines[len(rows) :]
    pictures = f", its charts as PNG in {Path(facts['pictures'][0]).parent}/" if facts["pictures"] else ""
    return [*result, f"the curves: {facts['page']}{pictures}"]


def charts_of_runs(names, histories):
    """Return the Charts of several runs, a curve each: smoothed where there are many records."""

    def chart(key, title, unit, curves, dots=False, smooth=False, **options):
        series = []
        for colour, (name, points) in enumerate(zip(names, curves, strict=True)):
            points = points if dots or smooth or len(points) < FEW else smoothed(points)[0]
            series += [Series(name, points, colour, dots=dots)] if any(y is not None for _, y in points) else []
        return [Chart(key, title, unit, series, **options)] if series else []

    resumes = [
        Mark("resume", leg["from_step"], f"{name}: resumed from step {leg['from_step']:,}")
        for name, history in zip(names, histories, strict=True)
        for leg in history.legs[1:]
    ]
    losses, unit = [history.points("loss") for history in histories], "nats per target token"
    minutes = [
        [(seconds / 60, y) for seconds, (_, y) in zip(history.seconds, points, strict=True)]
        for history, points in zip(histories, losses, strict=True)
    ]
    charts = chart("loss", "Training loss", unit, losses, marks=resumes)
    charts += chart("loss_over_time", "Training loss over time", unit, minutes, x_name="minutes in steps")
    keys = dict.fromkeys(["eval_loss", *(key for h in histories for record in h.evaluations for key in scores(record, "eval"))])
    for key in (key for key in keys if key != "perplexity"):  # which is the loss again
        curves = [[(record["step"], record.get(key)) for record in history.evaluations] for history in histories]
        known = {"eval_loss": ("Evaluation loss", unit)}.get(key, (f"Evaluation: {key}", "as the metric has it"))
        charts += chart(key, *known, curves, dots=True, marks=resumes)
    for key, title, unit, smooth in CURVES:
        if any(any(history.values(key)) for history in histories):
            charts += chart(
                key, title, unit, [h.points(key) for h in histories], smooth=smooth, from_zero=key != "grad_norm", marks=resumes
            )
    return charts


def page_of_runs(facts, charts):
    """Return compare.html."""
    title = " | ".join(facts["runs"])
    tables = [section(title, table(["", *facts["runs"]], rows)) for title, rows in rows_of(facts) if rows]
    kinds = {mark.kind for chart in charts for mark in chart.marks}
    drawn = f'<div class="charts">{"".join(map(figure, charts))}</div>' if charts else ""
    note = '<p class="note">In parentheses: the difference to the first run. Curves of many records are running means.</p>'
    head = f"<header><h1>{text(title)}</h1>{note}</header>"
    return page(title, [head, tables[-1], section("Curves", legend_of_marks(kinds), drawn), *tables[:-1]])


def draw(charts, folder):
    """Write the charts as PNG files and return their paths; without matplotlib, which only pictures need, say so."""
    from zerotune.run.report.pictures import write_pictures

    try:
        return [str(path) for path in write_pictures(charts, folder)]
    except ImportError as error:
        print(f"compare: no pictures: {error}; pip install -r requirements.txt", file=sys.stderr)
        return []
