"""--optim muon: the same steps under every strategy, torch's own Muon but for its rounding, and the same bits after a resume."""

import shutil

import pytest
import torch
from test_equivalence import batch_loss, load_rows
from transformers import AutoModelForCausalLM

from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import read_deepspeed_config
from zerotune.errors import UserError
from zerotune.run.arguments import Arguments, check_arguments

STEPS, RATE, MUON_RATE = 6, 1e-3, 1e-2


@pytest.fixture(scope="module")
def plain(tiny, rows16):
    """Return the losses of a plain loop with torch's Muon for the blocks' matrices and its AdamW for all else."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).train()
    rows = load_rows(tiny("llama"), rows16, causal=True)
    targets, losses = sum(label != -100 for row in rows for label in row[1]), []
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    assert len(matrices) == 4 * 7 and len(others) == 2 * 4 + 3
    optimizers = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0), torch.optim.AdamW(others, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        loss = batch_loss(model, rows, True, "sum") / targets
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def of_one_process():
    return {}


@pytest.mark.launch
@pytest.mark.parametrize("strategy", [None, "zero2", "zero3"])
def test_muon_is_the_same_everywhere(train, tiny, rows16, tmp_path, plain, of_one_process, strategy):
    processes = 2 if strategy else 1
    options = {
        "model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8 // processes, "max_steps": STEPS, "logging_steps": 1, "save_steps": STEPS // 2,
        "optim": "muon", "learning_rate": RATE, "muon_learning_rate": MUON_RATE, "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "reduce": "auto",
    }  # fmt: skip
    run = train(strategy, check=False, name="straight", **options)
    assert run.code == 0, run.output[-3000:]
    engine = run.run["engine"]
    assert engine.get("base_optimizer", engine["optimizer"]) == "MuonWithAuxAdam" and engine["num_processes"] == processes
    losses = [record["loss"] for record in run.records("loss")]
    # torch's Muon iterates in bf16, whose 8 bits are a hundredth of a step of MUON_RATE; a step moves the loss by a hundredth.
    assert losses == pytest.approx(plain, rel=1e-3) and losses[-1] < 0.98 * losses[0]
    first = of_one_process.setdefault("losses", losses)
    assert losses == pytest.approx(first, rel=1e-5)

    cut = tmp_path / "cut"
    shutil.copytree(run.folder, cut)
    for folder in (f"checkpoint-{STEPS}", "final"):
        shutil.rmtree(cut / folder)
    again = train(strategy, check=False, name="again", **options | {"output_dir": cut})
    assert again.code == 0 and again.run["resumed_from"].endswith(f"checkpoint-{STEPS // 2}"), again.output[-3000:]
    assert all(torch.equal(weight, again.weights()[name]) for name, weight in run.weights().items())


def test_what_does_not_go_with_muon():
    flags = {"optim": "muon", "muon_learning_rate": 0.02, "max_grad_norm": 0.0}

    def problems(stem, change=None, **more):
        path = f"ds_configs/{stem}.json"
        config = read_deepspeed_config(path)
        config["zero_optimization"] |= change or {}
        with pytest.raises(UserError) as error:
            check_config(config, path, Arguments(**flags | more))
        return str(error.value)

    assert "clip Muon's finished steps" in problems("zero2", max_grad_norm=1.0)
    assert "keeps optimizer states on cpu" in problems("zero2_offload")
    assert "reduce_scatter cuts the gradients" in problems("zero3", {"reduce_scatter": True})
    lines = "\n".join(check_arguments(Arguments(optim="muon", peft="lora"), ()))
    assert "--optim muon and --muon_learning_rate go together" in lines and "--peft lora has them frozen" in lines
