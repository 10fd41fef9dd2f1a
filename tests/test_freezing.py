"""Rules on five families: what each catches, what is refused, and that frozen tensors do not move in a real run."""

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file

from zerotune.errors import UserError
from zerotune.model.freezing import GradientWatch, apply_rules, names_of


def build(family):
    model_class, config = tiny_config(family, 0.0)
    config.num_labels = 3  # as rows16 has
    return model_class(config)


def trainable(model):
    return {name for parameter, names in names_of(model) for name in names if parameter.requires_grad}


@pytest.mark.parametrize(
    "family, freeze, unfreeze, prefixes",
    [
        ("t5", ["encoder", "decoder"], ["decoder.layers[-1]"], ["decoder.block.1."]),
        ("bart_classifier", ["backbone"], [], ["classification_head."]),
        ("t5_classifier", ["backbone"], [], ["classification_head."]),
        ("llama", ["all"], ["layers[-2:]"], ["model.layers.2.", "model.layers.3."]),
        ("llama", ["decoder"], [], ["lm_head."]),
        ("gpt2", ["all"], ["decoder.layers[0]"], ["transformer.h.0."]),
        ("gpt2", ["all"], ["embeddings", "head"], ["transformer.wte.", "transformer.wpe.", "lm_head."]),
        ("bert", ["encoder", "embeddings"], [], ["bert.pooler.", "classifier."]),
        ("bert", ["all"], ["encoder.layers[:1]", "re:classifier.*bias"], ["bert.encoder.layer.0.", "classifier.bias"]),
        ("bart", ["encoder.layers[:2]", "re:embed|norm|fc|attn|shared"], ["decoder.layers[1]"], ["model.decoder.layers.1."]),
    ],
)
def test_rules_catch_what_they_say(family, freeze, unfreeze, prefixes):
    model = build(family)
    report = apply_rules(model, freeze, unfreeze)
    expected = {name for _, names in names_of(model) for name in names if name.startswith(tuple(prefixes))}
    assert expected and trainable(model) == expected
    assert report.num_total == sum(p.numel() for p in model.parameters())
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [rule.rule for rule in report.rules] == freeze + unfreeze
    assert all(rule.num_tensors > 0 and rule.num_parameters > 0 for rule in report.rules)


def test_tied_weights_are_one_parameter():
    model = build("t5")
    report = apply_rules(model, ["encoder"], [])
    assert ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"] in report.tied
    assert not model.lm_head.weight.requires_grad and model.decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad
    with pytest.raises(UserError, match="disagree about one tied weight.*encoder.embed_tokens.weight frozen by 'encoder'"):
        apply_rules(build("t5"), ["encoder"], ["head"])
    with pytest.raises(UserError, match="disagree"):
        apply_rules(build("gpt2"), ["all"], ["head"])


@pytest.mark.parametrize(
    "family, freeze, unfreeze, message",
    [
        ("t5", ["encodr"], [], r"rule 'encodr' is not known \(did you mean encoder"),
        ("t5", ["re:decoder.blok"], [], r"matches no parameter of T5ForConditionalGeneration \(did you mean decoder"),
        ("llama", ["encoder"], [], "rule 'encoder' matches no parameter"),
        ("t5", ["encoder.layers[5]"], [], "outside the range: encoder.block has 2 blocks, 0 to 1"),
        ("t5", ["encoder.layers[:3]"], [], "outside the range"),
        ("t5", ["encoder.layers[2:]"], [], "outside the range"),
        ("t5", ["layers[-1]"], [], "say encoder.layers"),
        ("t5", ["re:("], [], "is no regular expression"),
        ("gpt2", ["all"], [], "everything is frozen"),
        ("gpt2", ["backbone"], [], "everything is frozen"),
        ("t5", ["nothing", "encoder.layers[9]"], ["re:xyz"], "(?s)nothing.*layers.9.*xyz"),
    ],
)
def test_rules_that_cannot_be_meant(family, freeze, unfreeze, message):
    with pytest.raises(UserError, match=message):
        apply_rules(build(family), freeze, unfreeze)


def test_gradient_watch_names_what_had_none():
    model = build("bart_classifier")
    apply_rules(model, ["backbone"], ["re:shared|embed_tokens"])
    watch = GradientWatch(model)
    model.classification_head(torch.randn(2, 32)).sum().backward()
    assert watch.without_gradient() == ["model.shared.weight"]


@pytest.mark.launch
@pytest.mark.parametrize(
    "family, task, strategy, freeze, unfreeze",
    [
        ("t5", "seq2seq", "ddp", ["encoder", "decoder"], ["decoder.layers[-1]"]),
        ("bart_classifier", "classification", "zero3", ["backbone"], []),
        ("gpt2", "causal", "ddp", ["all"], ["layers[-1]"]),
        ("llama", "causal", "zero3", ["all"], ["layers[-2:]", "head"]),
        ("bert", "classification", "ddp", ["embeddings", "encoder.layers[0]"], []),
    ],
)
def test_frozen_tensors_stay_bit_identical(train, tiny, rows16, family, task, strategy, freeze, unfreeze):
    folder = tiny(family, 0.1)
    options = {"unfreeze": unfreeze} if unfreeze else {}
    result = train(
        strategy,
        model_name_or_path=folder,
        task=task,
        train_file=rows16,
        text_column="source" if task == "classification" else None,
        freeze=freeze,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=3,
        gradient_checkpointing=True,
        **options,
    )
    from safetensors.torch import load_file

    before, after = load_file(folder / "model.safetensors"), result.weights()
    if "lm_head.weight" not in before:  # tied weights may be stored under either name
        after.pop("lm_head.weight", None)
    model = build(family)
    report = apply_rules(model, freeze, unfreeze)
    learns = trainable(model)
    assert set(before) == set(after) and 0 < len(learns) < len(before) + 4
    for name in before:
        if before[name].shape != after[name].shape:
            assert name.startswith("classifier."), name  # BERT's head is new: three classes in place of two
        else:
            assert torch.equal(before[name], after[name]) == (name not in learns), name
    assert result.run["parameters"] == {"total": report.num_total, "trainable": report.num_trainable}
    assert [rule["rule"] for rule in result.run["freezing"]] == freeze + unfreeze


@pytest.mark.launch
@pytest.mark.parametrize("family, strategy, more", [("llama", None, {"peft": "lora", "merge_adapter": True}), ("t5", "ddp", {})])
def test_frozen_weights_of_16_bits_stay_so(train, tiny, rows16, tmp_path, family, strategy, more):
    """Of a model that is stored in bf16: half the bytes of what linear layers hold, the same bits of every loss, and of final/."""
    import transformers

    auto = transformers.AutoModelForCausalLM if family == "llama" else transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tiny(family), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    learns = {} if more else {"freeze": ["encoder", "decoder"], "unfreeze": ["decoder.layers[-1]"]}
    options = {
        "model_name_or_path": tmp_path / "model", "tokenizer_name": tiny(family), "train_file": rows16, "validation_file": rows16,
        "task": "causal" if family == "llama" else "seq2seq", "mixed_precision": "bf16", "max_steps": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "profile_steps": 1, "save_steps": 2, "eval_steps": 4,
    } | learns | more  # fmt: skip
    wide = train(strategy, name="wide", frozen_dtype="float32", **options)
    narrow = train(strategy, name="narrow", **options)
    for key in ("loss", "eval_loss"):
        records = [[record[key] for record in run.records(key)] for run in (wide, narrow)]
        assert records[0] == records[1] and records[0]
    folder = "merged" if more else "final"
    states = [load_file(run.folder / folder / "model.safetensors") for run in (wide, narrow)]
    assert all(t.dtype == states[1][name].dtype and torch.equal(t, states[1][name]) for name, t in states[0].items())
    linear = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters())
    linear -= model.lm_head.weight.numel() if family == "t5" else 0  # tied to the embedding
    learning = 0 if more else narrow.run["parameters"]["trainable"]
    held = [run.records("memory_gib")[0]["memory_gib"]["host"]["weights"] * 2**30 for run in (wide, narrow)]
    assert held[0] - held[1] == pytest.approx(2 * (linear - learning), rel=0.05)
    assert "frozen tensors of linear layers stay in torch.bfloat16" in narrow.output and "stay in" not in wide.output
