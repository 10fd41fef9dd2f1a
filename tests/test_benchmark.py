"""The benchmark: FLOPs against torch's counter, a matrix that is killed and goes on, cells that fail, the peer, wrong input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from torture import ranks_of

from zerotune.__main__ import main as tools
from zerotune.model.freezing import apply_rules
from zerotune.model.loss import token_losses
from zerotune.rows.collation import shape_terms
from zerotune.run.profiling import exposed_seconds
from zerotune.tools.benchmark.cells import status_of
from zerotune.tools.benchmark.report import aggregate, ratio_of
from zerotune.tools.flops import coefficients
from zerotune.tools.hardware import known_peak


def main(words):
    return tools(["benchmark", *words])


@pytest.mark.parametrize("family, freeze, unfreeze", [
    *[(family, freeze, unfreeze) for family in ("t5", "bart") for freeze, unfreeze in (
        ([], []), (["encoder"], []), (["all"], ["decoder.layers[-1]"]),
    )],
    ("llama", [], []), ("llama", ["embeddings", "layers[:3]"], []), ("llama", ["all"], ["layers[1]"]),
])  # fmt: skip
@pytest.mark.launch
def test_flops_are_torchs(family, freeze, unfreeze):
    """The polynomial gives what torch counts in a real forward and backward of a batch of another shape."""
    model_class, config = tiny_config(family, 0.1)
    task = "causal" if family == "llama" else "seq2seq"
    found = coefficients(config, task, freeze, unfreeze)
    model = model_class(config)
    model.set_attn_implementation("eager")
    apply_rules(model, freeze, unfreeze)
    batch = {"input_ids": torch.full((5, 19), 7), "attention_mask": torch.ones(5, 19, dtype=torch.int64)}
    labels = torch.full((5, 19), 8)
    if task == "seq2seq":
        labels = torch.full((5, 13), 8)
        batch["decoder_input_ids"] = labels.clone()
    with FlopCounterMode(display=False) as counter:
        token_losses(model(**batch, use_cache=False).logits, labels).sum().backward()
    assert np.dot(found, shape_terms(batch)) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    full = np.dot(coefficients(config, task), shape_terms(batch))
    assert (counter.get_total_flops() < 0.9 * full) == bool(freeze)


def test_a_decoders_flops_are_six_a_weight():
    """6 FLOPs a token for each weight of a matrix product, and 12 x layers x width x length for attention (PaLM, appendix B)."""
    _, config = tiny_config("llama", 0.0)
    width, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 3 * width * ffn) + width * config.vocab_size
    assert coefficients(config, "causal")[[1, 3]].tolist() == pytest.approx([6 * weights, 12 * layers * width])


class Event:
    def __init__(self, name, begin, end, device="CPU"):
        self.name, self.device_type = name, type("Device", (), {"name": device})
        self.time_range = type("Range", (), {"start": begin, "end": end})


def test_waiting_is_communication_without_computing():
    on_cpu = [Event("gloo:all_reduce", 0, 50), Event("aten::mm", 10, 30), Event("aten::add", 25, 40), Event("c10d::wait", 0, 60)]
    assert exposed_seconds(on_cpu) == pytest.approx(20e-6)
    step = Event("Optimizer.step#AdamW.step", 0, 90, "CUDA")
    step.is_user_annotation = True
    on_gpu = [step, Event("Memcpy DtoD", 80, 90, "CUDA")]
    on_gpu += [Event("ncclDevKernel_AllReduce", 0, 50, "CUDA"), Event("gemm", 10, 30, "CUDA"), Event("Memcpy HtoD", 60, 70, "CUDA")]
    assert exposed_seconds([*on_gpu, *on_cpu]) == pytest.approx(40e-6)


def test_ends_of_cells_and_ratios():
    assert status_of(0, "")[0] == "ok"
    assert status_of(2, "x\ntrain.py: error: --optim\n") == ("refused", "train.py: error: --optim")
    assert status_of(2, "x\ntrain.py: out of memory: rank 0, in a step\n") == ("out of memory", "rank 0, in a step")
    assert status_of(1, "y\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n")[0] == "out of memory"
    assert status_of(1, "z\n[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n")[1].endswith("CUDA out of memory.")
    assert status_of(1, "ValueError: no\nmore") == ("failed", "ValueError: no")
    assert ratio_of([(2, 1)] * 4) is None and ratio_of([(2, 1), (3, 1), (1, 1), (4, 1), (5, 1)])["median"] == 3
    assert known_peak("NVIDIA H200", "bf16") == 989e12 and known_peak("NVIDIA H200", "no") is None
    cell = {"set": "full", "batch": "", "strategy": "zero2", "status": "refused", "reason": "why", "repeat": 0}
    matrix = {"baseline": None, "strategies": ["ddp", "zero2"], "sets": {"full": {}}, "batches": [{}]}
    assert aggregate([cell], matrix)[0]["status"] == "refused"


MATRIX = {
    "title": "tiny",
    "data": {
        "model": {"model_type": "t5", "vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "rows": {"num_rows": 64, "source_tokens": [2, 2000], "target_tokens": [2, 20]},
    },
    "flags": {"max_source_length": 40},
    "strategies": ["zero2"],
    "sets": {
        "full": {"per_device_train_batch_size": 2},
        "frozen encoder": {"per_device_train_batch_size": 2, "freeze": ["encoder"]},
        "too large": {"max_source_length": 2000, "per_device_train_batch_size": 1024},
    },
    "batches": [{"per_device_eval_batch_size": 2}],
    "baseline": "zero2",
    "warmup_steps": 1,
    "measured_steps": 2,
    "profile_steps": 2,
    "memory_limit_gib": 16,
}


def write_matrix(path, **changes):
    path.write_text(yaml.safe_dump(MATRIX | changes))
    return ["--matrix", str(path)]


@pytest.mark.launch
def test_a_killed_benchmark_goes_on(tmp_path, monkeypatch):
    """SIGKILL in the middle: the same command measures what is missing alone; out of memory is a row; plots and table are there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, matrix = tmp_path / "out", write_matrix(tmp_path / "matrix.yaml")
    command = [sys.executable, "-m", "zerotune", "benchmark", *matrix, "--out", str(out)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(list(out.glob("cells/*.json"))) < 2:
        assert first.poll() is None, first.stdout.read().decode()
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    time.sleep(2)  # into the third cell
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    folders, end = [path / "run" for path in out.glob("runs/*")], time.time() + 60
    while any(ranks_of(folder) for folder in folders):  # nothing is left that would disturb the next measurement
        assert time.time() < end
        time.sleep(0.1)

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and "min left" in again.stdout
    results = json.loads((out / "results.json").read_text())
    assert [cell["repeat"] for cell in results["cells"]] == ["control_first", *[0] * 3, "control_last"]
    assert "control_drift" in results and results["environment"]["versions"]["torch"] == torch.__version__
    rows = {(row["strategy"], row["set"]): row for row in results["rows"]}
    assert rows["zero2", "too large"]["status"] == "out of memory"
    full, frozen = rows["zero2", "full"], rows["zero2", "frozen encoder"]
    assert full["status"] == frozen["status"] == "ok"
    assert full["trainable_parameters"] > frozen["trainable_parameters"]
    assert full["memory_gib"]["host"]["optimizer"] > frozen["memory_gib"]["host"]["optimizer"] > 0
    assert full["flops_per_real_token"] > frozen["flops_per_real_token"] > 0
    assert all(full[f"{phase}_seconds"] > 0 for phase in ("data", "forward", "backward", "optimizer", "wait"))
    assert 0 < full["mfu"] < 1 and full["checkpoint_bytes"] > 0 and full["speed_ratio"] is None
    table = (out / "table.md").read_text()
    assert table.count("out of memory") == 1 and table.count("`zero2`") == 3 and again.stdout.endswith(table + "\n")
    assert all((out / name).stat().st_size > 10_000 for name in ("memory.png", "speed.png", "pareto.png"))
    assert not list(out.glob("runs/*/run/final"))

    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == table + "\n"  # nothing left to measure
    assert main([*write_matrix(tmp_path / "other.yaml", measured_steps=3), "--out", str(out)]) == 2


@pytest.mark.launch
def test_the_peer_runs_beside(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = {"task": "seq2seq", "freeze": ["encoder"], "model": MATRIX["data"]["model"] | {"vocab_size": 4096}}
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_source_length": 60, "max_target_length": 30}
    matrix = {"rows": {"T5": row}, "flags": flags, "strategies": ["single"], "warmup_steps": 1, "measured_steps": 4}
    (tmp_path / "peer.yaml").write_text(yaml.safe_dump(matrix))
    command = ["--peer", "trainer", "--matrix", str(tmp_path / "peer.yaml"), "--out", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = {(cell["batch"], cell["engine"], bool(cell["setenv"])): cell for cell in results["cells"]}
    assert len(cells) == len(results["cells"]) == 8 and {cell["status"] for cell in cells.values()} == {"ok"}
    assert len({cell["trainable_parameters"] for cell in cells.values()}) == 1
    ours, theirs = cells["defaults", "zerotune", False], cells["defaults", "trainer", False]
    assert ours["flops_per_real_token"] < 0.95 * theirs["flops_per_real_token"]  # rows of like length together
    assert ours["padding_fraction"] < theirs["padding_fraction"]
    ours, theirs = cells["equal", "zerotune", False], cells["equal", "trainer", False]
    assert ours["flops_per_real_token"] == theirs["flops_per_real_token"]  # the same rows
    ours, theirs = cells["equal", "zerotune", True], cells["equal", "trainer", True]  # resident memory that follows the tensors
    assert ours["peak_host_memory_gib"] < 1.01 * theirs["peak_host_memory_gib"]
    for row in results["rows"]:
        assert row["speed_ratio"] is None  # one repeat is no measurement
    assert "speed ratio" in (tmp_path / "out" / "table.md").read_text()


def test_mistakes_are_named(tmp_path, capsys):
    cases = [
        ({"strategies": ["zero4"]}, ["strategy 'zero4' is not known", "allowed: cpu, ddp,"]),
        ({"stratgies": ["ddp"]}, ["'stratgies' is no key of a matrix (did you mean strategies"]),
        ({"strategies": []}, ["no strategy to measure"]),
        ({"sets": {"full": {"learning_rat": 1}}}, ["--learning_rat: no flag of train.py (did you mean --learning_rate"]),
        ({"data": {"model": {"model_type": "t6"}}}, ["model_type 't6'"]),
        ({"data": {"model": {"model_type": "t5", "d_modle": 3}}}, ["'d_modle': no setting of a t5 model (did you mean d_model"]),
        ({"sets": {"full": None}, "repeats": 0}, ["sets: must be {name: {flag: value}}", "repeats 0: must be a whole number"]),
        ({"data": "gsm8k"}, ["data 'gsm8k': must be demo"]),
    ]
    for number, (changes, messages) in enumerate(cases):
        assert main([*write_matrix(tmp_path / "matrix.yaml", **changes), "--out", str(tmp_path / f"out{number}")]) == 2
        said = capsys.readouterr().err
        assert all(message in said for message in messages) and "Traceback" not in said, said
    assert main(["--matrix", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert main([*write_matrix(tmp_path / "matrix.yaml"), "--out", str(tmp_path / "mine")]) == 2
    assert "neither empty nor a benchmark's folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_shipped_matrices_are_right():
    """Every matrix in benchmarks/ has keys, strategies and flags that exist."""
    from zerotune.run.arguments import Arguments
    from zerotune.tools.benchmark.main import parse, read_matrix

    shipped = sorted((ROOT / "benchmarks").glob("*.yaml"))
    growth = yaml.safe_load((ROOT / "benchmarks" / "growth.yaml").read_text())  # of another kind: tests/overhead.py
    strategies = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert growth.keys() == {"models", "cells"} and all(model["task"] for model in growth["models"].values())
    for model, strategy, processes, *numbers in growth["cells"]:
        assert model in growth["models"] and strategy in strategies and processes >= 1 and len(numbers) in (3, 4)
    shipped = [path for path in shipped if path.stem != "growth"]
    assert len(shipped) >= 4
    for path in shipped:
        words = ["--matrix", str(path), "--out", "unused"] + (["--peer", "trainer"] if "peer" in path.stem else [])
        matrix = read_matrix(parse(words))
        flags = {*matrix["flags"], *(key for group in [*matrix["sets"].values(), *matrix["batches"]] for key in group)}
        flags |= {key for row in matrix["rows"].values() for key in row if key not in ("model", "rows")}
        assert flags <= set(Arguments.__dataclass_fields__), path
        assert not matrix["rows"] or matrix["repeats"] >= 5


@pytest.mark.launch
def test_the_ladder_in_one_process_runs(tmp_path):
    """tests/gpu_ladder.py, which is for a GPU: a run a set, one after the other; what cannot run here is a line."""
    matrix = yaml.safe_load((ROOT / "benchmarks/gpu_ladder.yaml").read_text())
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    matrix["data"]["model"] |= small
    matrix["data"]["rows"] = {"num_rows": 16, "source_tokens": [4, 40], "target_tokens": [4, 20]}
    matrix["flags"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    matrix["sets"] = {name: matrix["sets"][name] for name in ("naive", "+ packed", "flex attention")}
    matrix |= {"warmup_steps": 1, "measured_steps": 2}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix))
    words = ["--matrix", str(tmp_path / "matrix.yaml"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "tests/gpu_ladder.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    sets = json.loads((tmp_path / "out/results.json").read_text())["sets"]
    naive, packed = ([record["loss"] for record in sets[name]["records"]] for name in ("naive", "+ packed"))
    assert packed == pytest.approx(naive, rel=2e-3) and len(naive) == 3  # in bf16
    assert "trains on a GPU" in sets["flex attention"]["error"]
    table = (tmp_path / "out/table.md").read_text()
    assert done.stdout.endswith(table + "\n") and table.count("| 1.00 |") == 1 and "trains on a GPU" in table


@pytest.mark.launch
def test_the_benchmark_of_rows_runs(tmp_path):
    """Conversations, prepared by both sides in processes of their own: each kind has its times."""
    command = [sys.executable, "-m", "zerotune.tools.benchmark.rows", "--chats", "--num_rows", "1500", "--repeats", "1"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == 1500 and all(len(times) == 1 for times in results["seconds"].values())
    assert len(results["seconds"]) == 5 and "| datasets alone, 2 processes |" in (tmp_path / "out" / "table.md").read_text()
