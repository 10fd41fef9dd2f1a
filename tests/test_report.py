"""report.html and `python -m zerotune compare`: what they say of made runs and a real one, and that a browser shows it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT, flags_of

from zerotune.__main__ import main
from zerotune.run.arguments import Arguments
from zerotune.run.report import charts, markup, page
from zerotune.run.report.history import read_history, results

SCRIPT = "<script>throw Error('ran')</script>"
LEGS = [
    {"from_step": 0, "started": "2026-01-01T10:00:00", "strategy": "zero2", "num_processes": 4, "machine": "one", "changes": []},
    {"from_step": 40, "started": "2026-01-01T11:00:00", "strategy": "zero3", "num_processes": 8, "machine": "two",
     "changes": ["num_processes: 4 -> 8"]},
]  # fmt: skip


def make_run(folder, steps=100, max_steps=100, more=(), test=False, run=None, **flags):
    """Write what train.py leaves of a run of `steps` steps, a record each; `more`: further records, last; return the folder."""
    folder.mkdir(parents=True)
    args = vars(Arguments(model_name_or_path="models/t5-small", train_file="rows.jsonl", output_dir=str(folder), **flags))
    content = {
        "arguments": args,
        "engine": {"class": "DeepSpeedEngine", "num_processes": 4, "device": "cuda", "zero_stage": 2, "offload_optimizer": "cpu"},
        "max_steps": max_steps,
        "parameters": {"total": 1000, "trainable": 400},
        "freezing": [{"action": "freeze", "rule": "encoder", "num_tensors": 5, "num_parameters": 600}],
        "tied": [["shared.weight", "lm_head.weight"]],
        "versions": {"torch": "2.13.0", "peft": None},
        "device": "a GPU",
    }
    records = [{"step": 0, "start_seconds": 9.5}]
    for step in range(1, steps + 1):
        progress = step / steps
        records.append(
            {
                "step": step,
                "epoch": 3 * progress,
                "loss": 1 + 3 * math.exp(-5 * progress),
                "learning_rate": 1e-3 * (1 - progress),
                "grad_norm": 1 + 0.3 * math.sin(step),
                "target_tokens": 50,
                "real_tokens": 300,
                "tokens_per_second": 4000.0 + step % 7,
                "padding_fraction": 0.25,
                "step_seconds": 0.5,
                "peak_device_memory_gib": 3.5,
                "peak_host_memory_gib": 1.25,
            }
        )
        if step % 20 == 0:
            scores = {"rougeL": 0.3 * progress, "sacrebleu": 20 * progress, "perplexity": 4.0}
            records.append(
                {"step": step, "eval_loss": 1.5 + abs(progress - 0.6), "eval_target_tokens": 9, **scores, "eval_seconds": 1}
            )
            records.append({"step": step, "checkpoint_bytes": 7_000_000, "save_seconds": 2.5, "save_stall_seconds": 0.5})
    if test:
        records.append({"step": steps, "test_loss": 1.75, "test_target_tokens": 9, "test_rougeL": 0.5, "test_seconds": 1})
        row = {"line": 1, "source": "a source", "reference": "a reference", "prediction": SCRIPT}
        (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "run.json").write_text(json.dumps(content | (run or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, *more]))
    return folder


def eventful(folder, **options):
    """Return a run with everything that can be marked."""
    more = [
        {"step": 30, "bad_step": "non-finite loss or gradient; weights unchanged", "train_file_lines": [7, 8]},
        {"step": 40, "start_seconds": 8, "cut_off_at_step": 55},
        {"step": 60, "save_failed": "OSError: [Errno 28] No space left on device"},
    ]
    sizes = {"weights": 2**30, "total": 3 * 2**30}
    run = {"legs": LEGS, "ended": "all steps", "memory": {"planned_bytes": sizes, "measured_bytes": sizes}}
    return make_run(folder, more=more, test=True, run=run, freeze=["encoder"], source_prefix=SCRIPT, **options)


def written(folder, **options):
    """Return report.html of a folder, freshly written and without a complaint."""
    said = []
    page.write_report(folder, said.append, **options)
    assert said == [] and not list(folder.rglob("*.tmp"))
    return (folder / "report.html").read_text()


class Tags(HTMLParser):
    """Asserts that the tags of a page close each other, and collects its text and the names of the tags."""

    VOID = {"meta", "rect", "path", "circle"}

    def __init__(self, content):
        super().__init__()
        self.open, self.words, self.names = [], [], set()
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_what_happened(tmp_path):
    content = written(eventful(tmp_path / "<b>run"))
    tags = Tags(content)
    said = " ".join(tags.words)
    for words in (
        "<b>run", "t5-small · seq2seq · zero3 · 4 processes · float32 · a GPU", "finished", "all 100 steps are taken",
        "at step 60", "3.5 GiB", "25 %", "--freeze", "encoder", "400 of 1,000 parameters learn (40.00 %)",
        "shared.weight = lm_head.weight", SCRIPT, "lines 7, 8 of the training rows", "No space left on device",
        "num_processes: 4 -> 8", "the steps after 40 were taken again", "mean of 5 records", "training stood still for it",
        "torch 2.13.0",
    ):  # fmt: skip
        assert words in said, words
    keys = set(re.findall(r'<figure id="(\w+)"', content))
    assert keys == set(
        "loss scores scores_beyond_1 learning_rate grad_norm tokens_per_second memory padding saves memory_by_category".split()
    )
    drawings = [xml.fromstring(svg) for svg in re.findall(r"<svg viewBox=.*?</svg>", content, re.DOTALL)]
    assert len(drawings) == len(keys) and all(drawing.get("aria-label") for drawing in drawings)
    for kind in charts.KINDS:
        assert f'class="mark {kind}"' in content
    assert "resumed from step 40\nstarted: 2026-01-01T11:00:00\nstrategy: zero3" in content


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    """Nothing is loaded and nothing runs: no script, image, font, frame or address, and a policy that would forbid them."""
    content = written(eventful(tmp_path / "run"))
    assert not Tags(content).names & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=|\bon\w+=", content)
    assert "default-src 'none'" in content


def test_pictures_are_made_at_the_end_alone(tmp_path):
    folder = eventful(tmp_path / "run")
    written(folder)
    assert not (folder / "report").exists()
    content = written(folder, pictures=True)
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {f"{key}.png" for key in re.findall(r'<figure id="(\w+)"', content)}
    for path in (folder / "report").iterdir():
        assert ink_of(path) > 0.01, path


def test_a_run_without_records_has_a_page(tmp_path):
    folder = make_run(tmp_path / "run", steps=0)
    (folder / "metrics.jsonl").unlink()
    content = written(folder, pictures=True)
    assert content.count("no record of it yet") == 6 and "step 0 of 100" in content
    assert not list((folder / "report").iterdir())
    (folder / "run.json").write_text("{}")
    Tags(written(folder))


def test_gaps_torn_lines_and_old_predictions(tmp_path):
    """A window of skipped steps has no loss; a kill tears the last line; predictions.jsonl may be of a run before."""
    nothing = {"step": 101, "loss": None, "grad_norm": None, "learning_rate": 1e-3, "padding_fraction": 0.1, "real_tokens": 5}
    folder = make_run(tmp_path / "run", max_steps=200, more=[nothing])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 102, "lo')
    (folder / "predictions.jsonl").write_text(json.dumps({"source": "an old one"}) + "\n")
    history = read_history(folder)
    assert history.last_step == 101 and history.points("loss")[-1] == (101, None) and len(history.points("loss")) == 101
    assert "an old one" not in written(folder) and "running, or cut off, at step 101 of 200" in written(folder)


def test_a_failure_is_a_line(tmp_path, monkeypatch):
    folder, said = make_run(tmp_path / "run"), []
    page.write_report(tmp_path / "none", said.append)
    old = written(folder)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(markup.os, "replace", full)
    page.write_report(folder, said.append)
    assert len(said) == 2 and "no such folder" in said[0] and "No space left on device" in said[1]
    assert all("\n" not in line and line.startswith("warning: ") for line in said)
    assert (folder / "report.html").read_text() == old and not list(folder.glob("*.tmp"))


def test_half_a_character_does_not_end_a_page(tmp_path):
    folder = make_run(tmp_path / "run", source_prefix="\ud800")
    assert "--source_prefix" in written(folder)


def test_a_long_run_stays_a_small_page(tmp_path):
    """10,000 records: no curve has more than 800 points, and the process that draws has imported neither torch nor matplotlib."""
    folder = make_run(tmp_path / "run", steps=10_000, max_steps=10_000)
    code = "import sys; from zerotune.run.report.page import write_report; write_report(sys.argv[1])"
    code += "; sys.exit(bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    content = (folder / "report.html").read_text()
    curves = re.findall(r'<path class="curve[^>]* d="([^"]*)"', content)
    assert len(curves) > 8 and 700 < max(len(re.findall("[ML]", curve)) for curve in curves) <= 2 * charts.BUCKETS
    assert len(content) < 500_000 and content.count("<title>") < 1500


def test_thinning_keeps_what_stands_out():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321], points[777] = (4321.0, 9.0), (777.0, -3.0)
    points[5000:5100] = [(float(x), None) for x in range(5000, 5100)]
    thin = charts.thinned(points)
    assert len(thin) <= 2 * charts.BUCKETS and {(4321.0, 9.0), (777.0, -3.0)} <= set(thin)
    assert any(y is None for _, y in thin) and thin == sorted(thin, key=lambda point: point[0])
    means, width = charts.smoothed([(0, 1.0), (1, None), (2, 4.0), (3, 4.0)])
    assert width == 5 and means == [(0, 2.5), (1, None), (2, 3.0), (3, 4.0)]


@pytest.mark.parametrize("low, high", [(0, 1), (-3e-5, 2e-4), (0, 12_345), (0.9991, 0.9992), (-5, -4), (1e8, 3e9)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 8 and found[0] >= low - 1e-9 * abs(low) and found[-1] <= high * (1 + 1e-9 * (high > 0))
    assert len({charts.tick(value) for value in found}) == len(found)


def test_an_axis_of_one_value_and_of_many_sizes():
    for value in (0.0, 2.0, -2.0, 1e-7):
        axis = charts.Axis([value], 0, 100, may_be_log=True)
        assert 0 <= axis(value) <= 100 and len(axis.ticks) >= 2
    assert charts.Axis([0.0], 0, 100, from_zero=True).low == 0
    axis = charts.Axis([1.0, 1.1, 1.2, 5000.0], 0, 100, may_be_log=True)
    assert axis.log and axis(1.0) == 0 and axis(10_000.0) == 100
    assert not charts.Axis([0.0, 1.0, 1.1, 5000.0], 0, 100, may_be_log=True).log


@pytest.mark.parametrize("value, words", [(None, "-"), (3, "3"), (1234567, "1,234,567"), (5e-5, "5e-5"), (0.123456, "0.1235")])
def test_numbers_for_people(value, words):
    assert charts.number(value) == words


def bad_steps(*steps):
    return [{"step": step, "bad_step": "non-finite", "train_file_lines": []} for step in steps]


@pytest.mark.parametrize(
    "options, status",
    [
        ({"steps": 40}, "unfinished"),
        ({"steps": 100}, "unfinished"),
        ({"steps": 100, "run": {"ended": "all steps"}}, "finished"),
        ({"steps": 40, "run": {"ended": "early stopping"}}, "stopped"),
        ({"steps": 40, "more": bad_steps(38, 39, 40), "max_bad_steps": 3}, "failed"),
        ({"steps": 40, "more": bad_steps(37, 39, 40), "max_bad_steps": 3}, "unfinished"),
    ],
)
def test_status(tmp_path, options, status):
    assert read_history(make_run(tmp_path / "run", **options)).status[0] == status


@pytest.mark.parametrize(
    "more, run, steps",
    [
        ([], {}, [0]),
        ([], {"resumed_from": "/x/checkpoint-20"}, [0, 20]),
        ([{"step": 20, "start_seconds": 1}], {"resumed_from": "/x/checkpoint-20"}, [0, 20]),
        ([{"step": 20, "start_seconds": 1}], {"resumed_from": "/x/checkpoint-100"}, [0, 20, 100]),
        ([{"step": 20, "start_seconds": 1}], {"legs": LEGS}, [0, 40]),
    ],
)
def test_legs(tmp_path, more, run, steps):
    """run.json's own list, or what the records and `resumed_from` tell."""
    history = read_history(make_run(tmp_path / "run", more=more, run=run))
    assert [leg["from_step"] for leg in history.legs] == steps
    assert history.strategy == ("zero3" if "legs" in run else "zero2_offload")


def test_results(tmp_path):
    found = results(read_history(eventful(tmp_path / "run")))
    expected = {"steps": 100, "best_eval_loss": 1.5, "best_eval_step": 60, "test_loss": 1.75, "test_rougeL": 0.5, "sacrebleu": 20}
    expected |= {"tokens_per_second": 4003, "training_seconds": 50, "save_seconds": 12.5, "resumes": 1, "bad_steps": 1}
    expected |= {"failed_saves": 1, "peak_device_memory_gib": 3.5}
    assert {name: found[name] for name in expected} == expected
    assert found["padding_fraction"] == pytest.approx(0.25)


# ---- python -m zerotune compare --------------------------------------------------------------------------------------


def test_compare(tmp_path, capsys):
    """The table has the flags and circumstances that differ and all results; the page a curve for each run, a name for each."""
    first = make_run(tmp_path / "x" / "run", learning_rate=1e-3)
    other = eventful(tmp_path / "y" / "run", learning_rate=2e-3, metric=["accuracy"])
    out = tmp_path / "both.html"
    assert main(["compare", str(first), str(other), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: re.split(r"\s{2,}", line)[1:] for line in said.splitlines()}
    assert rows["FLAGS THAT DIFFER"] == ["x/run", "y/run"]
    assert rows["--learning_rate"] == ["0.001", "0.002"] and rows["--metric"] == ["-", "accuracy"]
    assert "--output_dir" not in rows and "--seed" not in rows
    assert rows["strategy"] == ["zero2_offload", "zero3"] and rows["test_loss"] == ["-", "1.75"] and rows["resumes"] == ["0", "1"]
    assert str(out) in said and f"{tmp_path}/both/" in said
    content = out.read_text()
    assert "&lt;script&gt;" in content and "script" not in Tags(content).names
    keys = set(re.findall(r'<figure id="(\w+)"', content))
    assert {"loss", "loss_over_time", "eval_loss", "rougeL", "sacrebleu", "grad_norm", "tokens_per_second"} <= keys
    assert {path.stem for path in (tmp_path / "both").iterdir()} == keys

    assert main(["compare", "--json", str(first), str(other), "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == ["x/run", "y/run"] and facts["flags"]["learning_rate"] == [1e-3, 2e-3]
    assert facts["results"]["best_eval_loss"] == [1.5, 1.5] and len(facts["pictures"]) == len(keys)


def test_compare_shows_by_how_much(tmp_path, capsys):
    slow = [{"step": 101, "learning_rate": 0.0, "loss": 2.0}]
    first, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", more=slow)
    assert main(["compare", str(first), str(other), "--out", str(tmp_path / "c.html")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("last_loss"))
    assert line.split() == ["last_loss", "1.02", "2", "(+96.0", "%)"]


def test_mistakes_in_compare_are_a_line_each(tmp_path, capsys):
    good, torn, other = (make_run(tmp_path / name) for name in ("good", "torn", "other"))
    with open(torn / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')
    (tmp_path / "bare").mkdir()
    broken = make_run(tmp_path / "broken")
    (broken / "run.json").write_text("[1]")
    out = tmp_path / "out.html"
    cases = [
        ([], ["no run: needs two runs or more"]),
        ([good], ["good: needs two runs or more"]),
        ([good, torn], ["torn/metrics.jsonl:112: no whole record"]),
        ([good, tmp_path / "bare"], ["bare: holds no run.json; give the --output_dir"]),
        ([good, tmp_path / "none"], ["none: no such folder"]),
        ([good, f"{good}/../good"], ["good: given 2 times; give each run once"]),
        ([good, broken], ["broken/run.json: not an object"]),
        ([good, other, "--out", tmp_path / "x.txt"], ["must end in .html"]),
        ([good, other, "--out", tmp_path / "no" / "x.html"], ["No such file or directory; give a file that can be written"]),
        ([good, other, "--jsn"], ["unrecognized arguments: --jsn"]),
        ([torn, tmp_path / "none"], ["no whole record", "no such folder"]),
    ]
    for words, messages in cases:
        words = words if "--out" in words else [*words, "--out", out]
        assert main(["compare", *map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and not out.exists()
        lines = said.err.splitlines()
        assert len(lines) == len(messages), said.err
        assert all(line.startswith("compare: error: ") and words in line for line, words in zip(lines, messages, strict=True)), (
            lines
        )


# ---- the real script -------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_killed_and_resumed_run_shows_it(train, tiny, rows16, tmp_path):
    """The page is there after the first save, and after a kill and a resume it has both, at the steps that metrics.jsonl tells."""
    options = {
        "model_name_or_path": tiny("t5"), "train_file": rows16, "validation_file": rows16, "test_file": rows16, "max_steps": 120,
        "save_steps": 40, "eval_steps": 40, "logging_steps": 1, "max_target_length": 8, "freeze": ["encoder"],
    }  # fmt: skip
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *flags_of(options | {"output_dir": folder})]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    run = subprocess.Popen(command, cwd=ROOT, **quiet)
    try:
        while '"step": 50,' not in (records := read_if_there(folder / "metrics.jsonl")) or not (folder / "report.html").exists():
            assert run.poll() is None, records
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    content = (folder / "report.html").read_text()
    drawn = re.search(r"running, or cut off, at step (\d+) of 120", content)  # once the save behind the training was there
    assert 40 <= int(drawn[1]) < 120 and not (folder / "report").exists()

    result = train(None, end_report="true", **options)
    assert "warning: the report" not in result.output
    (start,) = (record for record in result.records("start_seconds") if record["step"] > 0)
    assert start["step"] >= 40 and start["cut_off_at_step"] >= 50
    content = (folder / "report.html").read_text()
    said = " ".join(Tags(content).words)
    for words in (
        "all 120 steps are taken",
        f"from step {start['step']}",
        "cut off",
        "--freeze",
        "parameters learn",
        "Predictions",
    ):
        assert words in said, words
    assert 'class="mark resume"' in content and 'class="mark cut"' in content and "Memory by category" in said
    assert {"loss.png", "scores.png", "memory_by_category.png"} <= {path.name for path in (folder / "report").iterdir()}
    assert not list(folder.rglob("*.tmp"))


def read_if_there(path):
    return path.read_text() if path.exists() else ""


# ---- a real browser --------------------------------------------------------------------------------------------------


def look(file, width=1300, height=1600, *options):
    """Open a page in headless Chromium; return (its console's lines, the path of a screenshot)."""
    shot = file.with_name(f"{file.stem}_{width}{'_'.join(options)}.png")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={file.parent}/profile", "--enable-logging=stderr", "--v=0", f"--screenshot={shot}"]
    command += [f"--window-size={width},{height}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shot.exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], shot


def ink_of(path):
    """Return the share of a picture's pixels that are not of its most frequent colour."""
    return 1 - max(colours_of(path)[1]) / sum(colours_of(path)[1])


def colours_of(path):
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).round().astype(np.uint32)
    return np.unique(pixels @ np.array([65536, 256, 1], dtype=np.uint32), return_counts=True)


def lightness_of(path):
    """Return how light a picture's most frequent colour is, 0 to 255."""
    colours, counts = colours_of(path)
    return int(colours[np.argmax(counts)]) & 255


@pytest.mark.launch
@pytest.mark.browser
def test_a_browser_shows_it(tmp_path):
    """Pages of a run and of two, wide, narrow and dark: drawn, and without a word on the console."""
    run, other = eventful(tmp_path / "run"), make_run(tmp_path / "other", steps=3000, max_steps=3000)
    for folder in (run, other):
        written(folder)
    assert main(["compare", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    dark = "--blink-settings=preferredColorScheme=0"
    for file in (run / "report.html", other / "report.html", tmp_path / "both.html"):
        for width, options in ((1300, ()), (500, ()), (1300, (dark,))):
            console, shot = look(file, width, 1600, *options)
            assert console == []
            assert len(colours_of(shot)[0]) > 100 and 0.03 < ink_of(shot) < 0.9, (shot, ink_of(shot))
            assert (lightness_of(shot) < 60) == bool(options)


@pytest.mark.launch
@pytest.mark.browser
def test_the_browser_test_sees_errors_and_blanks(tmp_path):
    """The control: a script that throws is on the console, an empty page has no ink, and the pages' policy stops such a script."""
    bad, blank, locked = (tmp_path / f"{name}.html" for name in ("bad", "blank", "locked"))
    bad.write_text(f"<!DOCTYPE html><p>text</p>{SCRIPT}")
    blank.write_text("<!DOCTYPE html><title>nothing</title>")
    locked.write_text(markup.page("locked", [SCRIPT]))
    console, _ = look(bad)
    assert len(console) == 1 and "ran" in console[0]
    console, shot = look(blank)
    assert console == [] and ink_of(shot) == 0 and len(colours_of(shot)[0]) == 1
    console, _ = look(locked)
    assert console and "Content Security Policy" in console[0] and not any("Uncaught" in line for line in console)
