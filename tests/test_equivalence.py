"""Every cut of the same 16 rows (micro-batch x accumulation x processes x ZeRO stage x pieces of the loss) is the same training.

The judge is a plain PyTorch loop over the whole batch, written here with nothing from zerotune/. Losses must agree within 1e-5, 40
times what rounding makes of them on four kinds of processor (2.4e-7).

Final weights are compared by their update: the distance of two updates over the length of one. UPDATE_BOUND is 30 times the largest
distance of reference runs that differ in rounding alone (1.6e-5: rows in another order, cut in 2 and 16 sums, with the vector units
of AVX512, of AVX2 and with neither), and an eightieth of that of a mean-of-means loop, the classic mistake (4e-2). Left out are the
biases of attention's keys (BART): softmax does not see them, so their true gradient is 0, and AdamW divides the rounding that is
left by its own size.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

STEPS, LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP = 6, 1e-3, 3, 0.1, 0.5
UPDATE_BOUND = 5e-4
FLAGS = {
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "warmup_steps": WARMUP,
    "lr_scheduler_type": "linear",
    "weight_decay": WEIGHT_DECAY,
    "max_grad_norm": CLIP,
    "logging_steps": 1,
    "save_steps": 0,
    "max_source_length": 100,
    "max_target_length": 100,
}


def load_rows(folder, path, causal):
    """Return [(input ids, labels, decoder ids or None)] of each row, tokenised word by word."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    rows = []
    for row in map(json.loads, path.read_text().splitlines()):
        source = [vocabulary[word] for word in row["source"].split()] + [1]
        target = [vocabulary[word] for word in row["target"].split()] + [1]
        if causal:
            ids = source + target
            rows.append((ids, ([-100] * len(source) + target)[1:] + [-100]))
        else:
            rows.append((source, target))
    return rows


def batch_loss(model, rows, causal, reduction):
    def pad(lists, value):
        width = max(map(len, lists))
        return torch.tensor([ids + [value] * (width - len(ids)) for ids in lists])

    ids, labels = pad([r[0] for r in rows], 0), pad([r[1] for r in rows], -100)
    mask = pad([[1] * len(r[0]) for r in rows], 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not causal:
        start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], dim=1)
    logits = model(**inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)


def reference(folder, path, causal, parts=1, mean_of_means=False, frozen=()):
    """Return (losses, final weights) of the plain loop; parts > 1 reverses the rows and cuts them into that many sums.

    frozen: beginnings of the names of parameters that do not learn.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(folder).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(tuple(frozen))
    rows = load_rows(folder, path, causal)
    targets = sum(label != -100 for row in rows for label in row[1])
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.ndim >= 2]
    vectors = [p for p in learning if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=LEARNING_RATE), []
    for step in range(STEPS):
        after = 1 - (step - WARMUP) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * ((step + 1) / WARMUP if step < WARMUP else after)
        total = 0.0
        cut = [rows] if parts == 1 else [rows[::-1][i::parts] for i in range(parts)]
        for part in cut:
            if mean_of_means:
                loss = batch_loss(model, part, causal, "mean") / parts
            else:
                loss = batch_loss(model, part, causal, "sum") / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()


def distance(weights, expected, initial):
    """Return |weights - expected| / |expected - initial| (L2) over all tensors but keys' biases; tied ones may be stored once."""
    names = [name for name in expected if name in weights and name in initial and not name.endswith("k_proj.bias")]
    assert len(names) > 10
    difference = sum((weights[n].double() - expected[n].double()).pow(2).sum().item() for n in names)
    return math.sqrt(difference / sum((expected[n].double() - initial[n].double()).pow(2).sum().item() for n in names))


@pytest.fixture(scope="module")
def references(tiny, rows16):
    """Return a function family -> (losses, final weights, initial weights)."""
    known = {}

    def get(family):
        if family not in known:
            folder, causal = tiny(family), family == "llama"
            initial = load_file(folder / "model.safetensors")
            losses, weights = reference(folder, rows16, causal)
            assert distance(reference(folder, rows16, causal, parts=2)[1], weights, initial) < UPDATE_BOUND
            means, wrong = reference(folder, rows16, causal, parts=4, mean_of_means=True)
            assert distance(wrong, weights, initial) > 30 * UPDATE_BOUND
            assert max(abs(mean / loss - 1) for mean, loss in zip(means, losses, strict=True)) > 1e-4
            known[family] = losses, weights, initial
        return known[family]

    return get


# (family, strategy, processes, micro-batch, accumulation, gradient checkpointing, pieces of the loss): pairs, not the full product.
CASES = [
    ("t5", None, 1, 16, 1, False, 0),
    ("t5", None, 1, 4, 4, True, 0),
    ("t5", "single", 1, 1, 16, False, 0),
    ("t5", "ddp", 2, 2, 4, False, 5),
    ("t5", "zero1", 2, 2, 4, True, 0),
    ("t5", "zero2", 2, 4, 2, False, 0),
    ("t5", "zero2_offload", 2, 8, 1, False, 0),
    ("t5", "zero3", 2, 4, 2, True, 3),
    ("t5", "zero3_offload", 2, 1, 8, False, 0),
    pytest.param("t5", "zero3_nvme", 2, 4, 2, False, 0, marks=pytest.mark.nvme),
    ("bart", None, 1, 4, 4, False, 0),
    ("bart", "cpu", 2, 4, 2, True, 0),
    ("bart", "zero2", 2, 1, 8, True, 2),
    ("bart", "zero3", 2, 8, 1, False, 0),
    ("llama", None, 1, 1, 16, True, 4),
    ("llama", "zero1", 2, 8, 1, False, 0),
    ("llama", "zero3", 2, 2, 4, True, 3),
]


@pytest.mark.launch
@pytest.mark.parametrize("family, strategy, processes, micro, accumulation, checkpointing, chunks", CASES)
def test_trajectory(train, tiny, rows16, references, family, strategy, processes, micro, accumulation, checkpointing, chunks):
    losses, weights, initial = references(family)
    result = train(
        strategy,
        processes=processes,
        real=strategy in ("single", "cpu", "zero1", "zero2_offload", "zero3_nvme"),  # the others are elsewhere
        model_name_or_path=tiny(family),
        task="causal" if family == "llama" else "seq2seq",
        source_suffix="",
        train_file=rows16,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        loss_chunks=chunks,
        **FLAGS,
    )
    records = result.records("loss")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert records[-1]["learning_rate"] == pytest.approx(LEARNING_RATE / (STEPS - WARMUP))
    assert records[0]["grad_norm"] > CLIP  # clipping was active
    assert distance(result.weights(), weights, initial) < UPDATE_BOUND
