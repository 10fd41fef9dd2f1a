"""Small pieces: learning rate, loss, optimizer groups, overflow watch, metrics, checkpointing's forward passes."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config

from zerotune.__main__ import TOOLS
from zerotune.__main__ import main as tools
from zerotune.engine.optimizer import build_optimizer, parameter_groups
from zerotune.engine.precision import PATIENCE, OverflowWatch, prepare_scaler, take_step
from zerotune.engine.schedule import lr_at
from zerotune.errors import UserError
from zerotune.flags import CONTENT, HARMLESS, MATHEMATICS, ROWS, flag, names_deciding
from zerotune.model.activations import enable_gradient_checkpointing
from zerotune.model.freezing import apply_rules
from zerotune.model.loading import shift_right
from zerotune.model.loss import count_targets, token_losses
from zerotune.run.arguments import Arguments, parse_arguments
from zerotune.run.evaluation import load_metrics, metric_names, metrics_before_training
from zerotune.run.records import redact


def rates(kind, warmup_steps=4, max_steps=10):
    settings = {"learning_rate": 1.0, "lr_scheduler_type": kind, "warmup_steps": warmup_steps, "max_steps": max_steps}
    return [lr_at(step, **settings) for step in range(max_steps)]


def test_learning_rate():
    for kind in ("constant", "linear", "cosine"):
        assert rates(kind)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(rates("constant")[4:]) == {1.0}
    assert rates("linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates("cosine")[7] == pytest.approx(0.5) and 0 < rates("cosine")[9] < 0.1
    assert rates("linear", warmup_steps=0)[0] == 1.0


def test_loss_is_a_sum_over_targets():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, -100, 2], [-100, -100, -100]])
    expected = -(logits.log_softmax(-1)[0, 0, 1] + logits.log_softmax(-1)[0, 2, 2])
    assert token_losses(logits, labels).sum().item() == pytest.approx(expected.item())
    assert token_losses(logits.bfloat16(), labels).dtype == torch.float32
    assert token_losses(logits[1:], labels[1:]).sum().item() == 0.0  # a micro-batch without targets
    assert count_targets({"labels": labels}) == 2
    assert token_losses(torch.randn(4, 3), torch.tensor([0, 1, 2, -100])).shape == (4,)


def test_only_trainable_matrices_decay():
    model_class, config = tiny_config("bart", 0.0)
    model = model_class(config)
    apply_rules(model, ["encoder", "re:shared"], [])
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    held = {id(p) for group in (decayed, plain) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} and len(held) > 20
    assert all(p.ndim == 1 for p in plain["params"]) and all(p.ndim == 2 for p in decayed["params"])
    for optim, name in (("adamw_torch", "AdamW"), ("adamw_torch_fused", "AdamW"), ("adafactor", "Adafactor")):
        optimizer = build_optimizer(model, optim=optim, learning_rate=1e-3, weight_decay=0.1, on_host=False)
        assert type(optimizer).__name__ == name
    assert optimizer.defaults["relative_step"] is False


@pytest.mark.parametrize("family, freeze, frozen, trainable", [
    ("t5", ["encoder"], "encoder.block.0", "decoder.block.0"),
    ("t5", ["encoder", "embeddings", "decoder.layers[0]"], "decoder.block.0", "decoder.block.1"),
    ("llama", ["embeddings", "layers[:3]"], "model.layers.0", "model.layers.3"),
    ("llama", ["layers[1:3]"], None, "model.layers.1"),
])  # fmt: skip
def test_checkpointing_leaves_a_frozen_prefix_alone(family, freeze, frozen, trainable):
    """A block that needs gradients is run twice (forward, recompute), a frozen prefix once; gradients equal those without."""
    model_class, config = tiny_config(family, 0.0)
    torch.manual_seed(0)
    model = model_class(config).train()
    apply_rules(model, freeze, [])
    calls = {}
    for name, module in model.named_modules():
        if name in (frozen, trainable):
            target = module.self_attn if hasattr(module, "self_attn") else module.layer[0]
            target.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    ids = torch.arange(12).reshape(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})

    def gradients():
        model.zero_grad()
        calls.clear()
        token_losses(model(**inputs).logits, ids).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert set(calls.values()) == {1}
    enable_gradient_checkpointing(model)
    recomputed = gradients()
    assert calls == {name: count for name, count in ((frozen, 1), (trainable, 2)) if name}
    assert plain.keys() == recomputed.keys() and len(plain) > 5
    assert all((plain[name] - recomputed[name]).norm() <= 1e-5 * plain[name].norm() + 1e-6 for name in plain)
    if frozen is None:  # something trainable lies below the frozen blocks
        assert "model.embed_tokens.weight" in plain


def test_overflow_watch_counts_and_stops():
    """With torch's own scaler on the CPU: infinite gradients are skipped and halve the scale; at its minimum the run is stopped."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    watch = OverflowWatch(minimum=1.0)
    with pytest.raises(UserError, match=f"overflowed {PATIENCE} steps in a row at the smallest loss scale .1.*bf16"):
        for step in range(1, 100):
            scaler.scale(weight.sum() * float("inf")).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch.after_step(step, skipped=scaler.get_scale() < before, loss_scale=scaler.get_scale())
    assert torch.equal(weight, torch.ones(3)) and step == watch.overflowed_steps == 1 + PATIENCE
    watch = OverflowWatch()
    for skipped in [True, False] * 30:
        watch.after_step(1, skipped, 1.0)  # a good step in between starts the count again
    assert watch.overflowed_steps == 30


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_is_seen_with_any_optimizer(fused):
    """accelerate's own wrapper around torch's scaler: a fused optimizer is stepped in any case and skips by itself."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # the wrapper reads accelerate's state
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inner = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    seen = []
    for factor in (1.0, float("inf"), 1.0):
        before = weight.detach().clone()
        scaler.scale(weight.sum() * factor).backward()
        state = SimpleNamespace(deepspeed_plugin=None)
        seen.append(take_step(SimpleNamespace(scaler=scaler, state=state), optimizer, float("nan")))
        optimizer.zero_grad()
        assert torch.equal(weight, before) == seen[-1]
    assert seen == [False, True, False]


def test_smallest_loss_scale_is_deepspeeds():
    scaler = SimpleNamespace(raise_error_at_min_scale=True)
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    assert prepare_scaler(optimizer, None) == 1.0 and scaler.raise_error_at_min_scale
    assert prepare_scaler(optimizer, {"fp16": {"min_loss_scale": 4}}) == 4.0 and not scaler.raise_error_at_min_scale
    assert prepare_scaler(optimizer, {"fp16": {"loss_scale": 128, "min_loss_scale": 4}}) == 128.0


def test_folder_without_tokenizer_is_refused(tmp_path, tiny):
    from transformers import AutoModelForSeq2SeqLM

    from zerotune.model.loading import load_config_and_tokenizer
    from zerotune.run.arguments import Arguments

    AutoModelForSeq2SeqLM.from_pretrained(tiny("t5")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer in it; give --tokenizer_name"):
        load_config_and_tokenizer(Arguments(model_name_or_path=str(tmp_path)))
    config, tokenizer = load_config_and_tokenizer(Arguments(model_name_or_path=str(tmp_path), tokenizer_name=str(tiny("t5"))))
    assert len(tokenizer) == config.vocab_size
    with pytest.raises(UserError, match="--source_lang en_XX: the tokenizer does not know"):
        load_config_and_tokenizer(Arguments(model_name_or_path=str(tiny("t5")), source_lang="en_XX", target_lang="ro_RO"))


def test_right_shift_is_the_models_own():
    model_class, config = tiny_config("t5", 0.0)
    labels = torch.tensor([[5, 6, 1], [7, -100, -100]])
    expected = model_class(config).prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(shift_right(config)(labels), expected)


def test_metrics_are_local_modules():
    rouge, bleu = load_metrics(metric_names("seq2seq", [])).values()
    same = ["a cat sat on the mat"] * 2
    assert rouge.compute(predictions=same, references=same) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert bleu.compute(predictions=same, references=same)["sacrebleu"] == pytest.approx(100)
    half = rouge.compute(predictions=["a b"], references=["a c"])
    assert half["rouge1"] == pytest.approx(0.5) and half["rouge2"] == 0
    (classification,) = load_metrics(metric_names("classification", [])).values()
    scores = classification.compute(predictions=[0, 0, 1, 2], references=[0, 1, 1, 1])
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 * 1 / 4 + 0) / 3)}
    custom = load_metrics([str(ROOT / "metrics" / "bleu.py")])
    assert len(custom) == 1
    with pytest.raises(UserError, match="cannot be loaded"):
        load_metrics(["./missing.py"])


def test_a_missing_package_of_a_metric_is_found_before_training(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rouge_score" else find(name))
    with pytest.raises(UserError, match="metrics of --task seq2seq need rouge_score: pip install"):
        metrics_before_training("seq2seq", [], evaluated=True)
    assert metrics_before_training("seq2seq", [], evaluated=False) == metrics_before_training("causal", [], evaluated=True) == {}


def test_config_file_and_command_line(tmp_path, tiny, rows16):
    path = tmp_path / "flags.yaml"
    lines = [f"model_name_or_path: {tiny('t5')}", f"train_file: {rows16}", f"output_dir: {tmp_path}", "mixed_precision: no"]
    path.write_text("\n".join([*lines, "learning_rate: 1e-3", "gradient_checkpointing: true", "freeze: [encoder, 're:x y']"]))
    args = parse_arguments(["--config", str(path), "--learning_rate", "2e-3"])
    assert (args.learning_rate, args.mixed_precision, args.gradient_checkpointing) == (2e-3, "no", True)
    assert args.freeze == ["encoder", "re:x y"]
    path.write_text("lerning_rate: 1")
    with pytest.raises(UserError, match="'lerning_rate' is no flag of train.py .did you mean learning_rate"):
        parse_arguments(["--config", str(path)])
    for content, message in (("- a", "must hold"), ("a: [", "not YAML")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            parse_arguments(["--config", str(path)])
    with pytest.raises(UserError, match="none.yaml: No such file"):
        parse_arguments(["--config", "none.yaml"])


def test_help_has_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for group in ("model:", "data:", "freezing:", "learning:", "run:"):
        assert f"\n{group}\n" in text
    assert "(default: 5e-05)" in text and "tokens" in text


IMPORTED = """
import runpy, sys
try:
    {run}
except SystemExit as end:
    heavy = {{"torch", "transformers", "accelerate", "deepspeed", {more}}}
    print("IMPORTED", end.code, sorted({{name.partition(".")[0] for name in sys.modules}} & heavy))
"""


def test_help_and_the_check_before_a_launch_wait_for_no_library(tiny, rows16, tmp_path):
    flags = ["--model_name_or_path", tiny("llama"), "--task", "causal", "--train_file", rows16, "--output_dir", tmp_path]
    check = ["zerotune", "check", "accelerate_configs/zero3_sp.yaml", "4", *map(str, flags)]
    for words, run, said, more in (
        (["train.py", "--help"], "runpy.run_path('train.py', run_name='__main__')", "--learning_rate X", '"numpy"'),
        (check, "runpy.run_module('zerotune', run_name='__main__')", "", ""),
    ):
        code = f"import sys; sys.argv = {words}\n{IMPORTED.format(run=run, more=more)}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout and done.stdout.endswith("IMPORTED 0 []\n"), done.stdout[-300:] + done.stderr


def test_every_flag_says_what_it_decides():
    with pytest.raises(TypeError, match="a flag says what it decides"):
        flag(1, "A flag that resuming would not know about.")
    decided = [names_deciding(Arguments, what) for what in (MATHEMATICS, ROWS, CONTENT, HARMLESS)]
    assert {name for names in decided for name in names} == set(Arguments.__dataclass_fields__)
    assert "learning_rate" in decided[0] and "max_source_length" in decided[1] and "train_file" in decided[2]
    assert not set(decided[3]) & {*decided[0], *decided[1], *decided[2]}


def test_flags_in_both_spellings(tiny, rows16, tmp_path):
    words = [
        "--model-name-or-path",
        str(tiny("t5")),
        f"--train-file={rows16}",
        "--output_dir",
        str(tmp_path),
        "--no_group_by_length",
    ]
    args = parse_arguments([*words, "--predict-with-generate", "false", "--gradient_checkpointing", "--max_steps=-1"])
    assert (args.group_by_length, args.predict_with_generate, args.gradient_checkpointing, args.max_steps) == (
        False,
        False,
        True,
        -1,
    )
    with pytest.raises(UserError, match="--skip_bad_rows: 'perhaps' is none of true, false"):
        parse_arguments([*words, "--skip_bad_rows", "perhaps"])
    with pytest.raises(UserError, match="--warmup_ratio 1.5: must be between 0 and 1") as caught:
        parse_arguments([*words, "--warmup_ratio", "1.5", "--lora_r", "0"])
    assert sorted(caught.value.problems)[0] == "--lora_r 0: must be greater than 0" and len(caught.value.problems) == 2


def test_tools_are_listed_and_there(capsys):
    assert tools(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (module, _) in TOOLS.items():
        assert f"  {name} " in listed and callable(importlib.import_module(f"zerotune.tools.{module}").main)
    assert tools(["bench"]) == 2 and "'bench' is no tool (did you mean benchmark?)" in capsys.readouterr().err


def test_secrets_stay_out_of_the_command_line():
    words = ["train.py", "--hub_token", "abc", "--api_key=def", "--tokenizer_name", "t5", "--max_source_length", "3"]
    assert redact(words) == ["train.py", "--hub_token", "***", "--api_key=***", *words[4:]]


def test_untied_head_of_t5_is_told_apart(tmp_path):
    """The demo's T5 1.1 keeps a head of its own, and so does a copy that is loaded while transformers declares it tied."""
    from transformers import AutoModelForSeq2SeqLM

    from zerotune.model.loading import separate_weights
    from zerotune.tools.demo import build_model

    build_model(50, d_model=16, num_layers=1).save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    declared = dict(type(model)._tied_weights_keys)
    with separate_weights(type(model), model.config, tmp_path):
        assert set(declared) - set(type(model)._tied_weights_keys) == {"lm_head.weight"}
    assert type(model)._tied_weights_keys == declared


def test_demo_data_is_split_by_module():
    from zerotune.tools.demo import rows_by_split

    splits = rows_by_split()
    assert len(splits["train"]) > 2000 and all(len(rows) > 100 for rows in splits.values())
    modules = {split: {row["module"] for row in rows} for split, rows in splits.items()}
    texts = {split: {row[key] for row in rows for key in ("source", "target")} for split, rows in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not modules[one] & modules[other] and not texts[one] & texts[other]
    assert SimpleNamespace(**splits["train"][0]).target and sys.version_info >= (3, 11)


def test_a_flag_that_a_saved_run_did_not_know_had_its_default():
    from zerotune.run.fingerprint import compare

    saved = {"--seed": 1}
    assert compare(saved, {"--seed": 1, "--tf32": False, "--frozen_eval": False}, [], "x") == ([], [])
    refused, _ = compare(saved, {"--seed": 1, "--tf32": True}, [], "x")
    assert refused == ["x: --tf32 was False and is True; go on with the same, or start over in another --output_dir, or allow it: "
                       "--accept_change tf32"]  # fmt: skip
