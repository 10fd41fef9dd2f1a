"""The best model, early stopping, what is kept, loss spikes: on two ranks, in one go and interrupted at each border."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import text
from state import copy_at, state_hash

from zerotune.engine.schedule import Schedule
from zerotune.rows.batches import Stream, rows_of_step
from zerotune.run import manifest
from zerotune.run.arguments import Arguments, check_arguments
from zerotune.run.best import Best, metric_key
from zerotune.run.checkpoint import list_checkpoints
from zerotune.run.saved_model import newest_whole
from zerotune.run.saving import remove_old
from zerotune.run.spikes import FEWEST, WINDOW, LossSpikes
from zerotune.tools.checkpoint import main as checkpoint_tool

STRATEGIES = [("ddp", "no"), ("zero2", "no"), ("zero3", "bf16")]
STEPS = 30


# ---- the decisions ---------------------------------------------------------------------------------------------------


def outcome(best, values, first=1):
    return [best.update(step, value) for step, value in enumerate(values, first)]


def test_the_best_and_the_patience():
    best = Best("eval_loss", patience=2, threshold=0.1, keeps=True)
    assert outcome(best, [float("nan"), 3.0, 2.95, 2.5]) == [False, True, True, True] and not best.used_up
    assert best.kept == [2, 3, 4] and best.facts()["value"] == 2.5
    assert not best.update(4, 0.0), "an evaluation counts once, also when it is done again after a resume"
    assert outcome(best, [2.5, 2.45], 5) == [False, True] and best.used_up and best.step == 6
    assert outcome(Best("rougeL", greater=True), [0.1, 0.3, 0.2, float("inf")]) == [True, True, False, False]
    nothing = Best()
    assert outcome(nothing, [None, None]) == [False, False] and nothing.evaluated == 2 and nothing.facts() is None


@pytest.mark.parametrize("cut", range(6))
def test_the_state_is_all_that_a_resume_needs(cut):
    values = [3.0, 2.0, 2.5, 1.9, 1.95, 1.8]
    given = {"metric": "eval_loss", "patience": 3, "threshold": 0.15, "keeps": True}
    whole, first = Best(**given), Best(**given)
    outcome(whole, values)
    outcome(first, values[:cut])
    again = Best(**given, state=json.loads(json.dumps(first.state())))
    outcome(again, values)  # also those that were compared before
    assert again.state() == whole.state()
    other = Best("perplexity", state=whole.state())
    assert other.step is None and other.evaluated == 6, "values of another metric are not compared"


@pytest.mark.parametrize("offset", [0, -5, 7])
def test_an_epoch_ends_with_its_last_row(offset):
    rows, per_step = 16, 6
    schedule = Schedule(rows, per_step, 20, 0, 1.0, "constant", "", row_offset=offset)
    ends = set()
    for step in range(1, 20):  # the stream's items, as rows_of_step takes them
        items = range((step - 1) * per_step + offset, step * per_step + offset)
        ends |= {step for item in items if item % rows == rows - 1}
    assert {step for step in range(1, 20) if schedule.ends_epoch(step)} == ends and len(ends) >= 6
    assert len(rows_of_step(0, Stream(1, [rows]), per_step)) == per_step
    assert {step for step in range(1, 20) if schedule.is_due("epoch", 3, step)} == ends
    assert [step for step in range(1, 20) if schedule.is_due("steps", 7, step)] == [7, 14]
    assert not any(schedule.is_due(*never, step) for step in range(20) for never in (("no", 1), ("steps", 0), ("best", 1)))


def test_an_epoch_shorter_than_a_step_ends_in_each():
    assert all(Schedule(3, 8, 9, 0, 1.0, "constant", "").ends_epoch(step) for step in range(1, 9))


def test_spikes():
    spikes = LossSpikes(2.0)
    for loss in [9.0] * 3 + [1.0] * (FEWEST - 4):
        assert not spikes.is_spike(1e9)
        spikes.taken(loss)
    spikes.taken(1.5)
    assert [spikes.is_spike(loss) for loss in (2.0, 2.1, float("inf"), float("nan"))] == [False, True, False, False]
    assert LossSpikes(2.0, list(spikes.losses)).is_spike(2.1)
    for _ in range(WINDOW):
        spikes.taken(4.0)
    assert len(spikes.losses) == WINDOW and not spikes.is_spike(8.0) and spikes.is_spike(8.1)
    assert not LossSpikes(2.0, [-1.0] * WINDOW).is_spike(1.0), "no multiple of a negative loss is worse than it"


def test_what_is_removed(tmp_path):
    """The newest stay, each n-th, and the best that a staying checkpoint knows of, which is there."""
    for step in range(1, 13):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        kept = [1, 4, 8, 10] if step > 10 else [1, 4, 8]
        manifest.write(folder, {"step": step, "files": {}, "best": {"kept": kept}})
    shutil.rmtree(tmp_path / "checkpoint-10")  # its save failed
    remove_old(tmp_path / "checkpoint-12", 2, 5)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 8, 11, 12]
    remove_old(tmp_path / "checkpoint-12", 1, 0)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [8, 12]


def test_a_kill_within_a_removal_leaves_no_half_checkpoint(tmp_path):
    """The process ends itself when the first file of the oldest checkpoint is gone."""
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.safetensors").write_text("x")
        manifest.write(folder, {"step": step, "files": {}})
    pid = os.fork()
    if pid == 0:
        remove = os.unlink

        def remove_and_end(*arguments, **options):
            remove(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = remove_and_end
        remove_old(tmp_path / "checkpoint-6", 2, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    (half,) = tmp_path.glob("checkpoint-*.tmp")  # which the next save clears away
    assert half.name == "checkpoint-2.tmp" and len(list(half.iterdir())) == 1


def test_a_best_checkpoint_that_is_not_whole_gives_way_to_the_one_before(tmp_path):
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        manifest.write(tmp_path / f"checkpoint-{step}", {"step": step, "files": {}})
    (tmp_path / "checkpoint-8" / "more").touch()
    folder, content, problems = newest_whole(tmp_path, [2, 4, 8, 9], 12)
    assert folder.name == "checkpoint-4" and content["step"] == 4 and len(problems) == 2
    assert "checkpoint-9 is not whole (manifest.json: No such file" in problems[0] and "more is not listed" in problems[1]
    assert newest_whole(tmp_path, [2, 4, 12], 12) == (None, None, [])
    assert "final/ is of the last step, 12" in newest_whole(tmp_path, [], 12)[2][0]


def test_contradictions_are_a_line_each(tmp_path, rows16):
    def lines(**flags):
        given = {
            "model_name_or_path": "x",
            "output_dir": str(tmp_path),
            "train_file": [str(rows16)],
            "validation_file": [str(rows16)],
        }
        return check_arguments(Arguments(**given | flags))

    best = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    for flags, message in (
        ({"load_best_model_at_end": True}, "--eval_steps 0 makes one, at the end; give --eval_strategy epoch"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "--early_stopping_patience: compares evaluations, and --eval_st"),
        (best | {"validation_file": []}, "there are no rows for them; give --validation_file"),
        (
            best | {"metric_for_best_model": "rouge"},
            "(did you mean rouge",
        ),
        (best | {"metric_for_best_model": "rougeL", "predict_with_generate": False}, "allowed: eval_loss, perplexity, or one of"),
        (best | {"save_strategy": "no"}, "writes none; give --save_strategy best"),
        (best | {"save_steps": 0}, "writes none; give --save_strategy best"),
        (best | {"early_stopping_threshold": 0.1}, "is for --early_stopping_patience N"),
        ({"eval_strategy": "epoch", "eval_steps": 3}, "--eval_steps 3: is for --eval_strategy steps (given: epoch)"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "--save_strategy best: compares evaluations"),
        ({"greater_is_better": False}, "--greater_is_better: nothing compares evaluations"),
        ({"max_loss_spike": 0.9}, "--max_loss_spike 0.9: must be greater than 1"),
    ):
        (line,) = lines(**flags)
        assert message in line, line
    for metric in ("loss", "eval_rougeL", "perplexity"):
        assert not lines(**best, metric_for_best_model=metric)
    assert not lines(**best, metric_for_best_model="mine", metric=["mine.py"])
    assert metric_key("loss") == metric_key("eval_loss") == "eval_loss" and metric_key("eval_rougeL") == "rougeL"


# ---- runs ------------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tiny, tmp_path):
    """Return flags of a run that evaluates where an epoch of 16 rows ends, in a step of 6, and saves each 4 steps.

    Two rows of the six that are evaluated are others than what is learned: their loss rises more and more, when that of the rest
    has fallen as far as it can.
    """
    rows = [{"source": text(n, 2 + n), "target": "w1 w2 w3"} for n in range(16)]
    others = [row | {"target": "w1 w4 w5 w6"} if n % 3 == 0 else row for n, row in enumerate(rows[:6])]
    return {
        "model_name_or_path": tiny("t5", 0.1), "train_file": write_rows(tmp_path / "rows.jsonl", rows),
        "validation_file": write_rows(tmp_path / "others.jsonl", others), "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 3, "logging_steps": 1, "max_steps": STEPS,
        "predict_with_generate": "false", "eval_strategy": "epoch", "save_steps": 4, "save_total_limit": 1,
        "load_best_model_at_end": True, "early_stopping_patience": 2,
    }  # fmt: skip


def numbers(run, key):
    """Return a run's records that have `key`, without what is measured of the machine."""
    machine = ("seconds", "_gib", "per_second")
    return [{name: v for name, v in record.items() if not any(word in name for word in machine)} for record in run.records(key)]


def same_final(run, other):
    """Tell whether two final/ load alike; ZeRO-2's engine writes a tied weight under each of its names."""
    from transformers import AutoModelForSeq2SeqLM

    mine, others = (AutoModelForSeq2SeqLM.from_pretrained(one.folder / "final", dtype="auto").state_dict() for one in (run, other))
    return mine.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in mine.items()
    )


@pytest.mark.launch
@pytest.mark.parametrize("strategy, precision", STRATEGIES)
def test_best_and_stop_are_those_of_one_go(train, options, tmp_path, strategy, precision):
    """Killed before the best evaluation's save and after it, before the evaluation that stops and after its save."""
    options |= {"mixed_precision": precision}
    straight = train(strategy, name="straight", **options | {"save_steps": 1, "save_total_limit": STEPS})
    facts, stop = straight.run["best"], straight.records("eval_loss")[-1]["step"]
    best = straight.run["final_step"]
    assert facts["stopped_early"] and facts["step"] == best < stop < STEPS and straight.run["ended"] == "early stopping"
    values = {record["step"]: record["eval_loss"] for record in straight.records("eval_loss")}
    assert set(values) <= {3, 6, 8, 11, 14, 16, 19, 22, 24, 27} and min(values, key=values.get) == best
    assert f"of step {best} loads with from_pretrained" in straight.output and "no better in 2 evaluations" in straight.output

    assert checkpoint_tool(["export", str(straight.folder / f"checkpoint-{best}"), str(tmp_path / "exported")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (straight.folder / "final" / name).read_bytes()
    if strategy == "zero3":  # by another way: the engine of a run that ends there
        last = {"load_best_model_at_end": None, "early_stopping_patience": None, "save_steps": 0}
        short = train(strategy, name="short", **options | last | {"max_steps": best})
        assert numbers(short, "loss") == numbers(straight, "loss")[:best]
        assert same_final(short, straight) and short.run["final_step"] == best and short.run["best"] is None
        assert short.run["ended"] == "all steps"

    for step in (best - 1, best, stop - 1, stop):
        copy_at(straight.folder, tmp_path / f"at{step}", step)
        again = train(strategy, name=f"at{step}", **options)
        assert again.run["resumed_from"].endswith(f"checkpoint-{step}")
        assert same_final(again, straight) and again.run["final_step"] == best and again.run["best"] == facts
        done = {json.dumps(record): None for record in numbers(again, "eval_loss")}  # the end evaluates once more after a resume
        assert list(done) == [json.dumps(record) for record in numbers(straight, "eval_loss")]
        assert numbers(again, "loss") == numbers(straight, "loss")
        ends = [run.folder / f"checkpoint-{stop}" for run in (straight, again)]
        assert state_hash(ends[0]) == state_hash(ends[1])
        assert manifest.read(ends[0])["best"] == manifest.read(ends[1])["best"]
        if step < stop:
            assert [number for number, _ in list_checkpoints(again.folder)] == [best, stop]


@pytest.mark.launch
def test_an_evaluation_that_a_signal_cuts_off_is_made_up_for(train, options, tmp_path):
    """Also of a metric that the main process alone has, with a checkpoint of each best step and no other."""
    options |= {"max_steps": 9, "metric_for_best_model": "rouge1", "predict_with_generate": "true", "generation_max_length": 8}
    options |= {"save_strategy": "best", "early_stopping_patience": None, "keep_every": 3, "learning_rate": 1e-3}
    straight = train("ddp", name="straight", **options)
    evaluations = straight.records("eval_loss")
    assert [record["step"] for record in evaluations] == [3, 6, 8, 9] and evaluations[0]["best_step"] == 3
    saved = [record["step"] for record in straight.records("checkpoint_bytes")]
    assert set(saved) == {record["best_step"] for record in evaluations}
    cut = train("ddp", name="cut", check=False, environment={"SCRIPT": "tests/cut_evaluation.py", "CUT_AT": "6"}, **options)
    assert cut.code == 143 and cut.run["ended"] == "signal 15" and [step for step, _ in list_checkpoints(cut.folder)] == [3, 6], (
        cut.output
    )
    assert manifest.read(cut.folder / "checkpoint-6")["best"]["evaluated"] == 3
    again = train("ddp", name="cut", **options)
    assert numbers(again, "eval_loss") == numbers(straight, "eval_loss") and same_final(again, straight)
    assert again.run["best"] == straight.run["best"]

    options |= {"metric_for_best_model": "mine", "metric": "metrics/bleu.py"}
    unknown = train(None, name="unknown", check=False, **options)
    assert unknown.code == 2 and "--metric_for_best_model mine: no number of an evaluation; allowed: " in unknown.output


@pytest.mark.launch
@pytest.mark.parametrize("strategy, precision", [*STRATEGIES, ("zero2_offload", "bf16")])
def test_a_loss_spike_is_skipped_on_all_ranks(train, tiny, tmp_path, strategy, precision):
    """One row of 16 is unlike the others: when those are learned, its steps stand out. The run is resumed beside one."""
    rows = [{"source": text(1, 5), "target": "w1 w2 w3"}] * 16
    rows[5] = {"source": text(2, 9), "target": " ".join(f"w{n}" for n in range(30, 50))}
    options = {
        "model_name_or_path": tiny("t5", 0.1), "train_file": write_rows(tmp_path / "rows.jsonl", rows), "max_steps": 26,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_steps": 1, "save_total_limit": 30, "max_loss_spike": 1.3, "mixed_precision": precision,
    }  # fmt: skip
    straight = train(strategy, name="straight", **options)
    spikes = straight.records("bad_step")
    odd = [step for step in range(FEWEST + 1, 27) if 5 in rows_of_step(step - 1, Stream(42, [16]), 4)]
    assert [record["step"] for record in spikes] == odd and [record["loss_spikes"] for record in spikes] == [1, 2, 3]
    assert all("loss spike: " in spike["bad_step"] and 6 in spike["train_file_lines"] for spike in spikes)
    kept = {step: state_hash(folder) for step, folder in list_checkpoints(straight.folder)}
    assert [step for step in range(2, 27) if kept[step] == kept[step - 1]] == odd
    for step in [odd[0] - 1] if strategy == "ddp" else [odd[0]]:
        copy_at(straight.folder, tmp_path / f"at{step}", step)
        again = train(strategy, name=f"at{step}", **options)
        assert state_hash(again.folder / "checkpoint-26") == kept[26] and numbers(again, "loss") == numbers(straight, "loss")
        states = [manifest.read(run.folder / "checkpoint-26")["guard"] for run in (straight, again)]
        assert states[0] == states[1] and states[0]["loss_spikes"] == 3 and len(states[0]["losses"]) == 23
    if strategy == "ddp":
        stopped = train(strategy, name="stopped", check=False, max_bad_steps=1, **options)
        assert stopped.code == 1 and "1 bad steps in a row; the last good state is saved" in stopped.output
        assert manifest.read(stopped.folder / f"checkpoint-{odd[0] - 1}")["guard"]["loss_spikes"] == 0
        refused = train(strategy, name="straight", check=False, **options | {"max_loss_spike": None})
        assert refused.code == 2 and "or allow it: --accept_change max_loss_spike" in refused.output
