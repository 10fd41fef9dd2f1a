"""What a reader is told exists: flags, paths, scripts; and the linters are clean."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, check_engine

from zerotune.run.arguments import Arguments
from zerotune.tools.benchmark import rows

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("ds_configs", "benchmarks")),
    *SCRIPTS,
]
OTHER_FLAGS = set(
    "config_file num_processes num_machines machine_rank main_process_ip main_process_port deepspeed_multinode_launcher help "
    "config disable-pip-version-check no-cache-dir quiet matrix out peer strategies repeats num_processes no-index no-deps "
    "find-links basetemp collect-only quick num_gpus gpus_per_node gpu gpu_memory_gib host_memory_gib nvme_gib strategy json plot "
    "size_mib rdzv_conf "
    "job-name output nodes gpus-per-node cpus-per-task mem time partition account signal ntasks-per-node requeue open-mode array "
    "gres label kill-on-bad-exit wait signals-to-handle pty nv".split()  # these of Slurm, torchrun and Apptainer
)


def test_ruff_and_shellcheck_are_clean():
    """The hooks of .pre-commit-config.yaml, over everything."""
    assert len(SCRIPTS) >= 6
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "shellcheck"}
    for hook in hooks:
        tool, *words = hook["entry"].split()
        files = [*SCRIPTS, ROOT / ".ci" / "run"] if hook["types"] == ["shell"] else ["."]
        command = [Path(sys.executable).parent / Path(tool).name, *words, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_flag_in_documents_exists():
    known = set(Arguments.__dataclass_fields__) | OTHER_FLAGS
    found = {(path.name, flag) for path in DOCUMENTS for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", path.read_text())}
    assert len(found) > 30
    assert not {(name, flag) for name, flag in found if flag not in known}


def test_rooms_import_from_above_alone():
    """rows, model, engine, plan, run, tools: no room imports one that comes after it, and nothing imports train.py."""
    rooms, seen = ["rows", "model", "engine", "plan", "run", "tools"], 0
    for path in sorted((ROOT / "zerotune").rglob("*.py")):
        room = path.relative_to(ROOT / "zerotune").parts[0]
        for line in re.findall(r"^\s*(?:from|import) (zerotune[\w.]*|train)\b", path.read_text(), re.MULTILINE):
            used = line.split(".")[1] if "." in line else line
            seen += 1
            assert line != "train", path
            if room in rooms and used in rooms:
                assert rooms.index(used) <= rooms.index(room), (path, line)
    assert seen > 50


def test_every_path_in_documents_exists():
    pattern = r"(?<![\w/.-])((?:zerotune|scripts|ds_configs|accelerate_configs|tests|metrics|benchmarks|docs)/[\w./-]*\w)"
    found = {(path.name, place) for path in DOCUMENTS for place in re.findall(pattern, path.read_text())}
    assert len(found) > 15
    assert not {(name, place) for name, place in found if not (ROOT / place).exists()}


def test_the_tables_of_benchmarks_are_the_committed_results():
    readme = (ROOT / "docs" / "benchmarks.md").read_text()
    quickstart = json.loads((ROOT / "benchmarks/cpu/quickstart/results.json").read_text())
    rows = {(row["set"], row["strategy"]): row for row in quickstart["rows"]}
    for strategy in quickstart["matrix"]["strategies"]:
        line = f"| `{strategy}` |"
        for name in quickstart["matrix"]["sets"]:
            speed, memory = rows[name, strategy]["tokens_per_second"], rows[name, strategy]["peak_host_memory_gib"]
            line += f" {speed['median']:,.0f} ({speed['min']:,.0f}-{speed['max']:,.0f}) | {memory:.2f} |"
        assert f"{line}\n" in readme
    peer = json.loads((ROOT / "benchmarks/cpu/peer/results.json").read_text())
    assert len(peer["rows"]) == 8
    for row in peer["rows"]:
        ratios = [row["speed_ratio"], row["memory_ratio"]]
        line = f"| {row['set']} | {row['batch']} | " + " | ".join(
            f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios
        )
        assert f"{line} |" in readme
    for name in ("cpu/rows", "cpu/chats", "cpu/frozen_cache", "cpu/growth", "gpu/llama"):
        lines = (ROOT / "benchmarks" / name / "table.md").read_text().splitlines()
        lines = [line for line in lines if line.startswith("| ")]
        assert len(lines) > 4 and all(f"{line}\n" in readme for line in lines), name


def packing_lines(results):
    """Return the lines of docs/benchmarks.md for benchmarks/packing.yaml: each model's ways to cut, the slowest first."""
    cells, lines = [cell for cell in results["cells"] if cell["engine"] == "zerotune"], []

    def speeds(name):
        return {c["repeat"]: c["mean_tokens_per_second"] for c in cells if c["set"] == name and not c["setenv"]}

    for row in sorted(results["rows"], key=lambda row: (row["set"].split()[0], row["zerotune"]["tokens_per_second"])):
        mine, default = speeds(row["set"]), speeds(row["set"].split()[0])
        ours = sorted(mine[repeat] / default[repeat] for repeat in mine)
        theirs, side = row["speed_ratio"], row["zerotune"]
        memory = max(cell["peak_host_memory_gib"] for cell in cells if cell["set"] == row["set"] and cell["setenv"])
        lines.append(
            f"| {row['set']} | {side['tokens_per_second']:,.0f} | {statistics.median(ours):.2f} ({ours[0]:.2f}-{ours[-1]:.2f}) | "
            f"{theirs['median']:.2f} ({theirs['min']:.2f}-{theirs['max']:.2f}) | {side['padding_fraction']:.1%} | {memory:.2f} |"
        )
    return lines


def test_the_table_of_packing_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks/cpu/packing/results.json").read_text())
    assert len(results["rows"]) == 8 and results["matrix"]["repeats"] == 5
    gsm8k = json.loads((ROOT / "benchmarks/cpu/packing_gsm8k/results.json").read_text())
    assert len(gsm8k["rows"]) == 6 and gsm8k["matrix"]["repeats"] == 5
    for found in (results, gsm8k):
        assert "\n".join(packing_lines(found)) in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_table_of_rows_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks/cpu/rows/results.json").read_text())
    table = rows.table(results).split("\n\n")[1].strip()
    assert len(results["seconds"]) == 5 and {len(times) for times in results["seconds"].values()} == {5}
    assert table in (ROOT / "docs" / "benchmarks.md").read_text()
    assert table in (ROOT / "benchmarks/cpu/rows/table.md").read_text()


def ladder_lines(results):
    """Return the lines of docs/benchmarks.md for benchmarks/ladder.yaml: speed, beside the step before and naive, MB, loss."""
    speeds, peaks, lines, before = {}, {}, [], None
    for cell in results["cells"]:
        if isinstance(cell["repeat"], int):
            speeds.setdefault(cell["set"], {})[cell["repeat"]] = cell["mean_tokens_per_second"]
            peaks.setdefault(cell["set"], []).append(cell["step_peak_gib"] * 2**30 / 1e6)

    def beside(mine, other):
        if other is None:
            return "-"
        ratios = sorted(speeds[mine][repeat] / speeds[other][repeat] for repeat in speeds[mine])
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"

    rows = {row["set"]: row for row in results["rows"]}
    for name in results["matrix"]["sets"]:
        row, tensors = rows[name], rows[name]["memory_gib"]["host"]
        above = before if name.startswith("+") else None
        sizes = " | ".join(f"{tensors[kind] * 2**30 / 1e6:,.1f}" for kind in ("weights", "gradients", "optimizer"))
        speed = statistics.median(speeds[name].values())
        lines.append(
            f"| {name} | {speed:,.0f} | {beside(name, above)} | {beside(name, 'naive')} | {sizes} | "
            f"{statistics.median(peaks[name]):,.0f} | {row['padding_fraction']:.0%} | {row['final_loss']:.4f} |"
        )
        before = name
    return lines


def test_the_ladder_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks/cpu/ladder/results.json").read_text())
    assert len(results["rows"]) == 12 and results["matrix"]["repeats"] == 3
    assert "\n".join(ladder_lines(results)) in (ROOT / "docs" / "benchmarks.md").read_text()


def saver_lines(results):
    """Return the lines of docs/memory_savers.md for benchmarks/savers.yaml: the fastest first, tensors in MB, peak in GiB."""
    rows = sorted(results["rows"], key=lambda row: -(row["speed_ratio"] or {"median": 1})["median"])
    lines = []
    for row in rows:
        words = [
            f"--{name}" + ("" if value is True else f" {value}") for name, value in results["matrix"]["sets"][row["set"]].items()
        ]
        ratio, tensors = row["speed_ratio"], row["memory_gib"]["host"]
        speed = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "1"
        sizes = " | ".join(f"{tensors[kind] * 2**30 / 1e6:,.1f}" for kind in ("weights", "gradients", "optimizer"))
        shown = f"`{' '.join(words)}`" if words else "none"
        lines.append(f"| {shown} | {speed} | {sizes} | {row['peak_host_memory_gib']:.2f} | {row['checkpoint_bytes'] / 1e6:,.1f} |")
    return lines


def fault_lines(campaigns):
    """Return the lines of docs/clusters.md for docs/cluster_campaign.json."""
    lines = []
    for campaign in campaigns:
        faults = campaign["faults"]
        counts = [sum(fault["kind"] == kind for fault in faults) for kind in ("preempted", "killed", "cable pulled")]
        early = sum(fault["before_the_first_step"] for fault in faults)
        worst = {
            when: max(
                (fault["seconds_until_all_had_ended"] for fault in faults if fault["before_the_first_step"] == when), default=0
            )
            for when in (False, True)
        }
        steps = ", ".join(map(str, campaign["resumed_from_steps"]))
        row = [f"{campaign['strategy']} on {campaign['hosts']}", len(faults), *counts, early, steps]
        lines.append(f"| {' | '.join(map(str, row))} | {worst[False]:.0f} | {worst[True]:.0f} |")
    return lines


def test_the_table_of_faults_is_the_committed_result():
    campaigns = json.loads((ROOT / "docs/cluster_campaign.json").read_text())["campaigns"]
    assert all(campaign["passed"] and not campaign["wrong"] for campaign in campaigns)
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert "\n".join(fault_lines(campaigns)) + "\n" in page
    assert f"{sum(len(campaign['faults']) for campaign in campaigns)} faults" in page


def test_the_tables_of_savers_are_the_committed_results():
    results = json.loads((ROOT / "benchmarks/cpu/savers/results.json").read_text())
    lines = saver_lines(results)
    assert len(lines) == len(results["matrix"]["sets"]) >= 8
    readme = (ROOT / "docs" / "memory_savers.md").read_text()
    assert "\n".join(lines) + "\n" in readme
    variants = json.loads((ROOT / "benchmarks/cpu/savers_variants/results.json").read_text())
    for row in variants["rows"]:
        if speed := row.get("speed_ratio"):
            assert f"at {speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})" in " ".join(readme.split())
    chunks = json.loads((ROOT / "benchmarks/cpu/loss_chunks/results.json").read_text())
    whole, pieces = chunks["rows"]
    peaks, speed = [row["peak_host_memory_gib"] for row in (whole, pieces)], pieces["speed_ratio"]
    assert peaks[1] < 0.7 * peaks[0] and speed["median"] > 1 / 1.03
    times = f"{speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})"
    assert f"from {peaks[0]:.2f} to {peaks[1]:.2f} GiB at {times} times the speed" in " ".join(readme.split())


EXAMPLES = {
    "t5_frozen_encoder": ("t5", "zero2", "seq2seq"),
    "bart_classifier": ("bart_classifier", "ddp", "classification"),
    "causal_pairs": ("llama", "zero3", "causal"),
    "t5_lora": ("t5", "zero3", "seq2seq"),
    "phi_qlora": ("phi3", "single", "causal"),
    "gpt2_prefix": ("gpt2", "ddp", "causal"),
}


@pytest.mark.launch
@pytest.mark.parametrize("script", EXAMPLES)
def test_worked_examples_run(script, tmp_path, tiny, rows16):
    """Each example trains as it stands, with a tiny model and tiny rows in place of its own."""
    family, strategy, task = EXAMPLES[script]
    environment = {
        "MODEL": str(tiny(family)), "OUT": str(tmp_path / "out"), "TRAIN_FILE": str(rows16), "VALIDATION_FILE": str(rows16),
        "SOURCE": "source", "TARGET": "target", "TEXT": "source", "LABEL": "label", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["bash", str(ROOT / "scripts" / f"{script}.sh"), "--max_steps", "2", "--max_source_length", "60"]
    words += ["--end_report", str(script == "t5_lora").lower()]
    if script == "phi_qlora":
        chats = tmp_path / "chats.jsonl"
        turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
        chats.write_text(f"{json.dumps({'messages': turns})}\n" * 16)
        environment["TRAIN_FILE"] = str(chats)
        words += ["--chat_template", str(ROOT / "tests" / "chat_templates" / "words.jinja")]
    done = subprocess.run(words, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    check_engine(run["engine"], strategy, run["engine"]["num_processes"])
    assert run["arguments"]["task"] == task and run["arguments"]["mixed_precision"] == "bf16"
    file = "adapter_model.safetensors" if run["arguments"]["peft"] else "model.safetensors"
    assert (tmp_path / "out" / "final" / file).exists()


def test_all_scripts_are_known():
    assert {path.stem for path in SCRIPTS} == {
        *EXAMPLES,
        "benchmark_zero",
        "gpu_check",
        "hosts",
        "launch",
        "quickstart",
        "setup",
        "slurm",
        "test",
        "wheelhouse",
    }


def test_setup_says_what_is_missing(tmp_path):
    """setup.sh in a copy without .venv: no Python, one that is too old, one without venv, no compiler, no space; a line each."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "sha256sum", "cat", "awk"):
        (tools / name).symlink_to(shutil.which(name))

    def fake(name, script):
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (tools / name).chmod(0o755)

    def setup():
        command = [shutil.which("bash"), tmp_path / "scripts" / "setup.sh"]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "no python3; install" in setup()
    fake("python3", "[[ $2 != *version_info* ]]")
    assert "older than 3.11" in setup()
    fake("python3", "[[ $2 != *ensurepip* ]]")
    assert "apt install python3-venv" in setup()
    fake("python3", "exit 0")
    assert "apt install g++" in setup()
    fake("g++", "exit 0")
    fake("df", "echo head; echo x x x 17 x x")
    assert "17 MiB are free" in setup()
