"""A run goes on under another strategy, another number of processes, another cut: the same state, the same losses."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from state import state_hash

from zerotune.run import manifest
from zerotune.run.checkpoint import list_checkpoints
from zerotune.run.saving import best_interval
from zerotune.run.state_files import SavedState

OPTIONS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
    "lr_scheduler_type": "constant", "save_total_limit": 1,
}  # fmt: skip
# Over the models each layout is left and entered. A step has 12 rows, which 1, 2, 3 and 4 processes cut as they have to.
LEGS = [
    ("zero2", 2), ("ddp", 3), ("zero3", 2), (None, 1), ("zero1", 4), ("zero3_offload", 2), ("zero2", 1), ("zero3", 3),
    ("zero2_offload", 2), ("ddp", 2),
]  # fmt: skip
MODELS = {  # name, which begins with the family's: (flags, legs)
    "t5": ({"freeze": "encoder"}, [leg for leg in LEGS if leg not in (("zero1", 4), ("zero2", 1))]),
    "llama": ({"task": "causal"}, [LEGS[-1], LEGS[7], LEGS[3], LEGS[4]]),
    "gpt2": ({"task": "causal", "peft": "lora", "target_modules": "all-linear", "gradient_checkpointing": "true"}, LEGS[5:]),
    "t5 in 16 bits": ({"mixed_precision": "bf16"}, [LEGS[0], LEGS[2], LEGS[-1]]),
}
# Float32 sums in another order: the losses of these runs differ by some 1e-7; smooth activations, 20 steps amplify nothing.
BOUND = 1e-5
# A number of bf16 is rounded by up to 2^-9, in other places under each engine: DDP rounds inside its operations and keeps weights
# and norms in float32, ZeRO rounds weights and activations alike. This is eight of them in one direction; some 3e-4 are seen.
BOUND_16_BITS = 2**-6


@pytest.mark.launch
@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_in_any_layout(train, tiny, rows16, name):
    """Two steps in each layout by the same flags, against one run in one go; what is loaded is what was saved, to the bit."""
    (flags, legs), family, bound = MODELS[name], name.split()[0], BOUND_16_BITS if "16" in name else BOUND
    options = OPTIONS | flags | {"model_name_or_path": tiny(family), "train_file": rows16}
    straight = train("zero2", name="straight", max_steps=2 * len(legs), **options)
    losses = [record["loss"] for record in straight.records("loss")]
    before = None
    for number, (strategy, processes) in enumerate(legs, 1):
        leg = train(strategy, processes, name="run", max_steps=2 * number, environment={"SCRIPT": "tests/reload.py"}, **options)
        ((step, folder),) = list_checkpoints(leg.folder)
        assert step == 2 * number
        if before:
            loaded = leg.folder.with_name("run_loaded")
            assert state_hash(list_checkpoints(loaded)[0][1]) == before, (strategy, processes)
            shutil.rmtree(loaded)
            assert f"checkpoint-{step - 2} goes on with a change: strategy " in leg.output
        before = state_hash(folder)
    records = leg.records("loss")
    assert len(records) == len(losses) == 2 * len(legs)
    for record, loss in zip(records, losses, strict=True):
        assert abs(record["loss"] - loss) <= bound * loss, (record["step"], record["loss"], loss)
    told = leg.run["legs"]
    assert [(one["strategy"], one["num_processes"]) for one in told] == [(name or "single", count) for name, count in legs]
    assert [one["from_step"] for one in told] == list(range(0, 2 * len(legs), 2))
    if legs[0][1] != legs[1][1]:
        assert f"processes {legs[0][1]} -> {legs[1][1]}" in told[1]["changes"]
    if name in ("t5", "gpt2"):
        check_export(leg, folder, tiny(family))


def tool(*words):
    command = [sys.executable, "-m", "zerotune", "checkpoint", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def check_export(run, folder, model):
    """What the tool makes of the last checkpoint is the run's own final/; what it shows is the state; where it can't, a line."""
    out = run.folder.with_name("exported")
    done = tool("export", folder, out, "--model_name_or_path", model)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (run.folder / "final").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    (weights,) = [name for name in names if name.endswith(".safetensors")]
    mine, final = load_file(out / weights), load_file(run.folder / "final" / weights)
    assert mine.keys() == final.keys() and all(mine[name].equal(tensor) for name, tensor in final.items())
    assert tool("export", folder, out).returncode == 2


@pytest.mark.launch
def test_a_checkpoint_is_shown_verified_and_exported(train, tiny, rows16, tmp_path):
    options = OPTIONS | {"model_name_or_path": tiny("t5"), "train_file": rows16, "mixed_precision": "bf16", "freeze": "encoder"}
    run = train("zero3", max_steps=2, **options)
    ((_, folder),) = list_checkpoints(run.folder)
    check_export(run, folder, tiny("t5"))
    shown = json.loads(tool("show", folder, "--json").stdout)
    assert shown["state_sha256"] == SavedState(folder).digest() and shown["step"] == 2 and shown["optimizer_steps"] == [2]
    assert shown["layout"]["strategy"] == "zero3" and set(shown["states"]) == {"weight", "exp_avg", "exp_avg_sq"}
    assert tool("verify", folder).returncode == 0
    other = tool("export", folder, tmp_path / "other", "--model_name_or_path", tiny("t5", 0.1))
    assert other.returncode == 0, other.stderr  # dropout is no weight
    (folder / "state-00001.safetensors").unlink()
    done = tool("verify", folder)
    assert done.returncode == 1 and "state-00001.safetensors is missing" in done.stderr
    done = tool("show", tmp_path)
    assert done.returncode == 2 and "no checkpoint, as it has no manifest.json" in done.stderr


@pytest.mark.launch
def test_changes_are_accepted_by_name(train, tiny, rows16, tmp_path):
    """Learning rate and rows of a step may change where that is said; the rows go on where they were."""
    options = OPTIONS | {"model_name_or_path": tiny("t5"), "train_file": rows16, "save_total_limit": 9, "save_steps": 1}
    train("ddp", max_steps=2, **options)  # 24 rows of epochs of 16
    more = {"learning_rate": 1e-4, "gradient_accumulation_steps": 1, "max_steps": 4}
    refused = train("ddp", check=False, **options | more)
    assert refused.code == 2 and "--learning_rate was 0.001 and is 0.0001" in refused.output
    assert "rows a step was 12 and is 4" in refused.output and "or allow it: --accept_change learning_rate" in refused.output
    accept = {"accept_change": ["learning_rate", "gradient_accumulation_steps"]}
    run = train("ddp", **options | more | accept)
    assert "goes on with a change: --learning_rate 0.001 -> 0.0001; rows a step 12 -> 4" in run.output
    assert [record["epoch"] for record in run.records("loss")] == [0.75, 1.5, 1.75, 2.0]
    assert run.records("loss")[-1]["learning_rate"] == 1e-4
    assert manifest.read(run.folder / "checkpoint-4")["row_offset"] == 24 - 8
    again = train("ddp", **options | more | accept | {"max_steps": 5})
    assert "goes on with" not in again.output and again.run["legs"][-1]["from_step"] == 4
    lines = [line for leg in again.run["legs"] for line in leg["changes"]]
    assert "rows a step 12 -> 4" in lines and len(again.run["legs"]) == 3
    frozen = options | {"freeze": "encoder", "max_steps": 2}
    train("ddp", name="frozen", **frozen)
    shutil.copytree(tiny("t5"), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][0] += 1e-6  # some ten roundings of one frozen number
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for strategy in ("ddp", "zero3"):
        refused = train(strategy, name="frozen", check=False, **frozen | {"model_name_or_path": tmp_path / "other", "max_steps": 3})
        assert refused.code == 2 and "it belongs to other frozen weights than --model_name_or_path has" in refused.output
    halved = {"mixed_precision": "bf16", "accept_change": "mixed_precision", "max_steps": 3}
    assert "--mixed_precision 'no' -> 'bf16'" in train("zero2", name="frozen", **frozen | halved).output
    for words, message in (
        ({"accept_change": "learning_rat"}, "no change that can be accepted (did you mean learning_rate, "),
        ({"accept_change": "freeze"}, "--accept_change freeze: no change that can be accepted"),
        (accept | {"freeze": "encoder"}, "--freeze was [] and is ['encoder']; go on with the same, or start over"),
    ):
        refused = train("ddp", check=False, **options | more | words)
        assert refused.code == 2 and message in refused.output, refused.output


@pytest.mark.launch
def test_saves_behind_the_training(train, tiny, rows16, tmp_path):
    """By the clock as well as by steps; where copies do not fit into the memory that is left, the training waits instead."""
    import transformers as t

    model = t.AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"))
    model.resize_token_embeddings(500_000)  # 64 MB, with its moments 192 MB to copy
    wide = tmp_path / "wide"
    model.save_pretrained(wide)
    t.AutoTokenizer.from_pretrained(tiny("t5")).save_pretrained(wide)
    (tmp_path / "short.jsonl").write_text(json.dumps({"source": "w1", "target": "w2"}) + "\n")
    options = {"model_name_or_path": wide, "train_file": tmp_path / "short.jsonl", "per_device_train_batch_size": 1}
    limits = {"LIMITED_RANK": "0", "LIMITED_BYTES": str(480 << 20), "MALLOC_MMAP_THRESHOLD_": "65536"}
    runs = {}
    for name, environment, words in (
        ("behind", {}, "behind the training"),
        ("waits", limits, "while it waits, as they do not fit"),
    ):
        runs[name] = train(None, name=name, environment=environment, max_steps=2, save_steps=1, **options)
        assert words in runs[name].output and runs[name].output.count("are copied to host memory") == 1
        saved = runs[name].records("checkpoint_bytes")
        assert [record["step"] for record in saved] == [1, 2]
        assert all(record["save_seconds"] > 0 and record["save_stall_seconds"] > 0 for record in saved)
    hashes = {state_hash(run.folder / "checkpoint-2") for run in runs.values()}
    assert len(hashes) == 1
    options |= {"model_name_or_path": tiny("t5"), "train_file": rows16, "save_total_limit": 99}
    timed = train("zero2", name="timed", max_steps=60, save_steps=0, save_every_seconds=0.05, **options)
    steps = [step for step, _ in list_checkpoints(timed.folder)]
    assert len(steps) > 2 and manifest.verify(timed.folder / f"checkpoint-{steps[0]}")[1] == []
    hours = {"save_steps": "auto", "mean_hours_between_failures": 1e-9}  # an interval that is over at once
    auto = train("ddp", name="auto", max_steps=6, **options | hours)
    steps = [step for step, _ in list_checkpoints(auto.folder)]
    assert steps[0] == 1 and steps[-1] == 6
    assert best_interval(0.2, 86400) == pytest.approx(185.9, abs=0.1)


@pytest.mark.launch
def test_what_cannot_go_on_elsewhere_is_named(train, tiny, rows16):
    """Steps that cannot be shared out, and 8-bit states, whose blocks ZeRO cuts by its ranks; DDP's go on alone."""
    options = OPTIONS | {"model_name_or_path": tiny("t5"), "train_file": rows16, "max_steps": 2}
    train("ddp", **options)
    refused = train("ddp", 5, check=False, **options | {"max_steps": 3})
    assert (
        refused.code == 2
        and "a step of this run has 12 rows; give a number of processes that divides it (given: 5)" in refused.output
    )
    options |= {"optim": "adamw_bnb_8bit"}
    import transformers as t

    model = t.AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"))
    model.resize_token_embeddings(256)  # 8192 elements: smaller tensors keep states of 32 bits
    wide = tiny("t5").with_name("t5_256")
    model.save_pretrained(wide)
    t.AutoTokenizer.from_pretrained(tiny("t5")).save_pretrained(wide)
    options |= {"model_name_or_path": wide}
    straight = train("ddp", name="straight", **options | {"max_steps": 4})
    train("ddp", name="bits", **options)
    assert list(SavedState(straight.folder / "checkpoint-4").whole)
    alone = train(None, name="bits", **options | {"max_steps": 4})
    for mine, other in zip(alone.records("loss"), straight.records("loss"), strict=True):
        assert (
            abs(mine["loss"] - other["loss"]) <= 1e-3 * other["loss"]
        )  # a rounding may move a state to the next of its 256 values
    for steps in (2, 4):
        groups = train("zero2", name="groups", check=False, **options | {"max_steps": steps})
        assert groups.code == 0 and groups.run["engine"]["base_optimizer"] == "AdamW8bit", groups.output
    assert groups.run["resumed_from"]
    refused = train(None, name="groups", check=False, **options | {"max_steps": 6})
    assert refused.code == 2 and "of its optimizer is in blocks that this layout does not have" in refused.output
