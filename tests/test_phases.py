"""--freeze_schedule: what a plain PyTorch loop does that freezes by the step; a resume in a phase or on a border keeps each bit."""

import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from test_equivalence import batch_loss, distance, load_rows

from zerotune.errors import UserError
from zerotune.model.freeze_schedule import read_schedule
from zerotune.model.freezing import apply_rules
from zerotune.model.phases import Phases
from zerotune.run.arguments import Arguments, check_arguments

LEARNING_RATE = 1e-3
# What learns throughout keeps its moments and its count of steps; a block is frozen again, and in the long one learns once more.
LONG = "0: decoder.layers[-1] encoder.layers[0]; 2: decoder.layers[-2:]; 50%: encoder.layers[:1] decoder.layers[-1]; 6: all"
MIDDLE = "0: decoder.layers[-1] encoder.layers[0]; 2: decoder.layers[-2:]; 4: encoder.layers[:1] decoder.layers[-1]"
SHORT = "0: decoder.layers[-1] encoder.layers[0]; 3: decoder.layers[-2:]"
FLAGS = {
    "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
    "weight_decay": 0.1, "max_grad_norm": 0.5, "logging_steps": 1, "max_source_length": 100, "max_target_length": 100,
}  # fmt: skip


def reference(folder, rows, borders, num_steps):
    """Return (losses, weights) of a plain loop with an AdamW that forgets what is frozen; borders: {step: rules}."""
    from transformers import AutoModelForSeq2SeqLM

    model, rows = AutoModelForSeq2SeqLM.from_pretrained(folder).train(), load_rows(folder, rows, causal=False)
    targets = sum(label != -100 for row in rows for label in row[1])
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0} for p in model.parameters()]
    optimizer, losses = torch.optim.AdamW(groups, lr=LEARNING_RATE), []
    for step in range(num_steps):
        if step in borders:
            apply_rules(model, ["all"], borders[step])
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
        loss = batch_loss(model, rows, False, "sum") / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.launch
@pytest.mark.parametrize(
    "strategy, schedule, num_steps, cuts",
    [
        (None, LONG, 8, (4, 5)),
        ("zero2", MIDDLE, 6, (5,)),
        ("ddp", SHORT, 5, (4,)),
        ("zero3", SHORT, 5, (3, 4)),
        ("zero3_offload", SHORT, 5, (4,)),
    ],
    ids=lambda value: value if value in (None, "ddp", "zero2", "zero3", "zero3_offload") else "",
)
def test_a_plain_loop_does_the_same(strategy, schedule, num_steps, cuts, train, tiny, rows16, tmp_path):
    """Losses within 1e-5 over the borders; cut in a phase and on a border, the run ends in the same bits."""
    entries = [part.split(":", 1) for part in schedule.replace("50%", "4").split("; ")]
    borders = {int(begin): rules.split() for begin, rules in entries}
    losses, weights = reference(tiny("t5"), rows16, borders, num_steps)
    options = FLAGS | {
        "model_name_or_path": tiny("t5"), "train_file": rows16, "per_device_train_batch_size": 4 if strategy else 8,
        "gradient_accumulation_steps": 2, "save_steps": 1, "save_total_limit": 20, "freeze_schedule": schedule,
        "max_steps": num_steps, "dataloader_num_workers": 1 if strategy is None else 0,
    }  # fmt: skip
    # Once by the launcher itself, whose store still knows the processes that were replaced.
    straight = train(strategy, name="straight", real=strategy == "zero2", **options)
    assert straight.output.count("starting again from") == len(borders) - 1
    found = [record["loss"] for record in straight.records("loss")]
    assert found == pytest.approx(losses, rel=1e-5)
    initial = load_file(tiny("t5") / "model.safetensors")
    assert distance(straight.weights(), weights, initial) < 5e-4  # as tests/test_equivalence.py has it
    for step in cuts:
        cut = tmp_path / f"cut{step}"
        shutil.copytree(straight.folder, cut)
        for later in range(step + 1, num_steps + 1):
            shutil.rmtree(cut / f"checkpoint-{later}")
        shutil.rmtree(cut / "final")
        again = train(strategy, name=f"from{step}", **options | {"output_dir": cut})
        assert all(torch.equal(weight, again.weights()[name]) for name, weight in straight.weights().items()), step


def build(family):
    model_class, config = tiny_config(family, 0.0)
    return model_class(config)


def test_methods():
    """gradual: from the top to all; lisa: as many blocks as were asked for, others each time; badam: each block once a round."""
    model = build("llama")  # four blocks
    names = {name for name, _ in model.named_parameters()}

    def blocks(learning):
        return sorted({int(name.split(".")[2]) for name in learning if name.startswith("model.layers.")})

    gradual = Phases("gradual(10)", model, 1000, 0)
    assert [begin for begin, _ in gradual.found] == [0, 10, 20, 30, 40] and gradual.learning[-1] == names
    assert [blocks(learning) for learning in gradual.learning[:4]] == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert set(gradual.births(25).values()) == {0, 10, 20} and not gradual.settled(25)
    lisa = Phases("lisa(2, every=5)", model, 100, 0)
    assert len(lisa.found) == 20 and all(len(blocks(learning)) == 2 for learning in lisa.learning)
    assert len({tuple(blocks(learning)) for learning in lisa.learning}) > 3
    outside = {name for name in names if not name.startswith("model.layers.")}
    assert all(outside <= learning for learning in lisa.learning)
    assert Phases("lisa(2, every=5)", model, 100, 0).learning == lisa.learning != Phases("lisa(2, every=5)", model, 100, 1).learning
    assert {birth for name, birth in lisa.births(99).items() if name in outside} == {0}
    badam = Phases("badam(every=5)", model, 100, 0)
    rounds = np.array([blocks(learning) for learning in badam.learning]).reshape(5, 4)
    assert (np.sort(rounds) == np.arange(4)).all() and len({tuple(r) for r in rounds}) > 1
    assert badam.settled(7) == badam.learning[0] and badam.number_at(4) == 0 and badam.number_at(5) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("5: all", "the first entry has to begin at 0"),
        ("0: all; five: head", "'five: head' does not begin with a step and a colon"),
        ("0: all; 5:", "from 5 on nothing learns"),
        ("0: all; 100%: head", "100% is not before the end"),
        ("lisa(2)", "lisa takes whole numbers above 0"),
        ("badam(every=0)", "badam takes whole numbers above 0"),
        ("gradual(x)", "gradual takes whole numbers above 0"),
    ],
)
def test_schedules_that_cannot_be_read(text, words):
    with pytest.raises(UserError) as error:
        read_schedule(text)
    assert words in str(error.value) and "allowed: 'STEP: RULES; STEP: RULES', gradual(STEPS)" in str(error.value)
    assert check_arguments(Arguments(freeze_schedule=text), required=())[0] == str(error.value)


def test_schedules_that_a_model_cannot_have():
    model = build("llama")
    for text, words in (
        ("0: layers[-1]; 50%: all; 500: head", "step 500 comes after step 500; borders have to rise"),
        ("0: layers[-1]; 9: layers[7]", "from step 9 on: rule 'layers\\[7\\]' is outside the range"),
        ("0: layers[-1]; 9: re:nothing", "from step 9 on: rule 're:nothing' matches no parameter"),
        ("lisa(9, every=5)", "the model has 4 blocks"),
    ):
        with pytest.raises(UserError, match=words):
            Phases(text, model, 1000, 0)
    problems = check_arguments(
        Arguments(freeze_schedule="gradual(5)", freeze=["head"], peft="lora", optim="adafactor"), required=()
    )
    assert sum("are both given; give one" in problem for problem in problems) == 2 and any(
        "keeps states in blocks" in p for p in problems
    )
