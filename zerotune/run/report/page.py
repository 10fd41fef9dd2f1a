"""report.html: a run to look at, in one file without script and network, drawn from what lies in its folder.

It is written at each save and at the end; the end also leaves the charts as pictures in report/.
Tests: tests/test_report.py, also in a real browser.
"""

import dataclasses
import time
from pathlib import Path

from zerotune.run.groups import GROUPS
from zerotune.run.report.charts import figure, legend_of_marks, number
from zerotune.run.report.curves import charts_of_run
from zerotune.run.report.history import read_history, results
from zerotune.run.report.markup import folded, page, section, table, text, write_page

NUM_EVENTS, NUM_RECORDS = 40, 20  # rows of a table: more are not read


def write_report(output_dir, say=print, pictures=False):
    """Write report.html into a run's folder; for one process alone.

    pictures: write report/<chart>.png as well. A failure is a line through `say` and no more: no run is lost for a picture of it.
    """
    try:
        history = read_history(output_dir)
        write_page(Path(output_dir) / "report.html", page_of_run(history))
        if pictures:
            # A file for each chart, as it goes into a slide or a message; the overview is the page. At the end alone: matplotlib
            # takes half a second and memory, which a process that trains does not have to give.
            from zerotune.run.report.pictures import write_pictures

            write_pictures(charts_of_run(history), Path(output_dir) / "report")
    except Exception as error:
        say(f"warning: the report in {output_dir} is not drawn: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def page_of_run(history):
    """Return report.html of a History."""
    charts, name = charts_of_run(history), history.folder.resolve().name
    kinds = {mark.kind for mark in charts[0].marks}
    parts = [
        header(history, name),
        tiles(history),
        section("Curves", legend_of_marks(kinds), f'<div class="charts">{"".join(map(figure, charts))}</div>', numbers(history)),
        section("What happened", events(history)),
        section("Flags that are not the default", flags(history.arguments)),
        section("What learns", freezing(history.run)),
        section("Predictions", samples(history)),
        section("Engine, rows, versions", circumstances(history)),
    ]
    return page(f"{name}: {history.status[0]}", parts)


def header(history, name):
    """Return what ran, and how far it is."""
    args, (word, words) = history.arguments, history.status
    processes, precision = history.engine.get("num_processes"), args.get("mixed_precision")
    facts = [
        Path(str(args.get("model_name_or_path"))).name,
        args.get("task"),
        args.get("peft"),
        history.strategy,
        processes and f"{processes} process{'es' * (processes > 1)}",
        "float32" if precision == "no" else precision,
        history.run.get("device"),
    ]
    epoch = f", epoch {number(history.epoch, 3)}" if history.epoch else ""
    total = history.max_steps
    return (
        f"<header><h1>{text(name)}</h1><p>{text(' · '.join(str(fact) for fact in facts if fact))}</p>"
        f'<p><span class="status {word}">{word}</span>{text(words + epoch)}</p>'
        + (f'<progress max="{total}" value="{history.last_step}" aria-label="steps taken"></progress>' if total else "")
        + f'<p class="note">as of {time.strftime("%Y-%m-%d %H:%M:%S %z")}</p></header>'
    )


def tiles(history):
    """Return the numbers that a run is judged by, those that there are."""
    found = results(history)
    kind = "device" if found["peak_device_memory_gib"] else "host"
    peak, padding = found[f"peak_{kind}_memory_gib"], found["padding_fraction"]
    tests = [f"{name.removeprefix('test_')} {number(value)}" for name, value in found.items() if name.startswith("test_")]
    started = f"first one {duration(history.starts[-1]['start_seconds'])} after the launch" if history.starts else ""
    resumed = ", ".join(f"{leg['from_step']:,}" for leg in history.legs[1:][-3:])
    shown = [
        ("training loss", number(found["last_loss"]), "last record"),
        ("evaluation loss", number(found["last_eval_loss"]), "last one"),
        ("best evaluation loss", number(found["best_eval_loss"]), f"at step {number(found['best_eval_step'])}"),
        ("test loss", number(found.get("test_loss")), ", ".join(tests[1:4])),
        ("tokens/s", number(found["tokens_per_second"], 3), "median, without padding"),
        ("peak memory", peak and f"{number(peak, 3)} GiB", f"{kind}, process with most"),
        ("padding", padding is not None and f"{number(100 * padding, 3)} %", "of all tokens"),
        ("time in steps", duration(found["training_seconds"]), started),
        ("bad steps", number(found["bad_steps"]), "skipped"),
        ("resumes", number(found["resumes"]), f"from step {resumed}" if resumed else ""),
        ("failed saves", found["failed_saves"] and number(found["failed_saves"]), "see below"),
    ]
    cells = [
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(words)}</small></dd></div>"
        for name, value, words in shown
        if value and value != "-"
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def duration(seconds):
    """Return seconds in the unit that suits them."""
    if seconds is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
    return f"{seconds / size:.3g} {unit}"


def numbers(history):
    """Return records spread over the run, and the last evaluations, as tables: for those who cannot hover."""
    names = "loss learning_rate grad_norm tokens_per_second step_seconds padding_fraction".split()
    count = len(history.steps)
    chosen = sorted({round(place * (count - 1) / (NUM_RECORDS - 1)) for place in range(NUM_RECORDS)}) if count else []
    columns = [history.points(name) for name in names]
    rows = [[number(history.steps[place]), *(column[place][1] for column in columns)] for place in chosen]
    evaluations = (history.evaluations + history.tests)[-NUM_RECORDS:]
    keys = list(dict.fromkeys(key for record in evaluations for key in record))
    return folded("the numbers, as a table", table(["step", *names], rows) if rows else "") + folded(
        "evaluations, as a table", table(keys, [[record.get(key) for key in keys] for record in evaluations]) if evaluations else ""
    )


def events(history):
    """Return what went otherwise than planned: resumes, bad steps with their rows, saves that failed."""
    rows = []
    for leg in history.legs[1:]:
        known = [
            f"{name.replace('_', ' ')} {leg[name]}" for name in ("started", "strategy", "num_processes", "machine") if leg.get(name)
        ]
        rows.append((leg["from_step"], "resumed", "; ".join([*known, *map(str, leg.get("changes") or [])]) or "-"))
    for start in history.starts:
        if (cut := start.get("cut_off_at_step")) is not None:
            rows.append((cut, "cut off", f"the steps after {start['step']:,} were taken again"))
    for bad in history.bad_steps:
        lines = bad.get("train_file_lines") or []
        shown = ", ".join(map(str, lines[:20])) + ", ..." * (len(lines) > 20)
        rows.append((bad["step"], "bad step", f"{bad['bad_step']}; lines {shown} of the training rows"))
    rows += [(save["step"], "save failed", save["save_failed"]) for save in history.saves if "save_failed" in save]
    rows.sort(key=lambda row: row[0])
    left_out = f"the last {NUM_EVENTS} of {len(rows)}; all are in metrics.jsonl" if len(rows) > NUM_EVENTS else ""
    rows = [(f"step {step:,}", *cells) for step, *cells in rows[-NUM_EVENTS:]]
    return table(["when", "what", "details"], rows, left_out) if rows else ""


def flags(arguments):
    """Return a table of the flags that are not as train.py has them, with the others folded."""
    defaults = {}
    for field in (field for group in GROUPS for field in dataclasses.fields(group)):
        defaults[field.name] = field.default_factory() if field.default is dataclasses.MISSING else field.default
    given = [(f"--{name}", value, defaults.get(name)) for name, value in arguments.items()]
    changed = [(name, in_words(value), in_words(default)) for name, value, default in given if value != default]
    same = [(name, in_words(value)) for name, value, default in given if value == default]
    shown = table(["flag", "value", "default"], changed) if changed else ""
    return shown + folded(f"{len(same)} flags with their defaults", table(["flag", "value"], same) if same else "")


def in_words(value):
    """Return a flag's value as it stands on a command line; '-' for none."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def freezing(run):
    """Return what each rule caught and how much learns."""
    parameters = run.get("parameters") or {}
    if not parameters.get("total"):
        return ""
    share = 100 * parameters["trainable"] / parameters["total"]
    words = f"<p>{parameters['trainable']:,} of {parameters['total']:,} parameters learn ({share:.2f} %).</p>"
    rules = [
        (f"{rule['action']} {rule['rule']}", rule["num_tensors"], rule["num_parameters"]) for rule in run.get("freezing") or []
    ]
    tied = "".join(f'<p class="note">tied: {text(" = ".join(names))}</p>' for names in run.get("tied") or [])
    return words + (table(["rule, in order", "tensors", "parameters"], rules) if rules else "") + tied


def samples(history):
    """Return the first predictions of the test rows, with their references."""
    if not history.samples:
        return ""
    shown = [
        f'<p class="note">the first {len(history.samples)} rows of predictions.jsonl, after step {history.tests[-1]["step"]:,}</p>'
    ]
    for row in history.samples:
        entries = "".join(
            f"<dt>{text(name)}</dt><dd>{text(row[name])}</dd>" for name in ("source", "reference", "prediction") if name in row
        )
        shown.append(f'<article class="sample"><dl>{entries}</dl></article>')
    return "".join(shown)


def circumstances(history):
    """Return what the run ran on and with."""
    run = history.run
    rows = [("command line", " ".join(map(str, run.get("command_line") or []))), ("batch", run.get("batch_arithmetic"))]
    rows += [("device", run.get("device")), ("commit", run.get("git_commit"))]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items() if version))]
    known = table(["what", "value"], [row for row in rows if row[1]])
    parts = [
        ("the engine", history.engine),
        ("the rows", run.get("data")),
        ("the resolved DeepSpeed JSON", run.get("deepspeed_config")),
    ]
    return known + "".join(folded(name, table(["what", "value"], facts.items())) for name, facts in parts if facts)
