"""Memory savers: adapters, quantised bases, the loss in pieces, small optimizers; tests/savers.py is the long form."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from savers import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from train import forward_loss
from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import read_deepspeed_config
from zerotune.engine.optimizer import build_optimizer
from zerotune.engine.strategy import check_device
from zerotune.errors import UserError
from zerotune.model.adapters import add_adapter
from zerotune.model.freezing import apply_rules, is_quantised, num_elements
from zerotune.model.loading import load_model
from zerotune.model.loss import CHUNKABLE, chunk_loss
from zerotune.model.quantization import quantization_config
from zerotune.run.arguments import Arguments, check_arguments
from zerotune.run.profiling import memory_gib

VOCABULARY = 5000
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
DECODER |= {"head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {
    "t5": T5, "t5 1.1": T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, "mt5": T5, "umt5": T5,
    "bart": BART, "mbart": BART, "gpt2": GPT2, **dict.fromkeys("llama mistral phi phi3 qwen2 qwen3 gemma".split(), DECODER),
    "gemma2": DECODER | {"final_logit_softcapping": 0.05},
}  # fmt: skip


def small_model(name):
    config = AutoConfig.for_model(name.split()[0], vocab_size=VOCABULARY, **SMALL[name])
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def small_batch(model):
    ids = torch.randint(5, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(1).clone()
    labels[0, :7] = labels[2, 3:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return (batch | {"decoder_input_ids": ids.roll(2)} if model.config.is_encoder_decoder else batch), labels


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator made; views of others do not count."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def loss_and_gradients(model, batch, labels, chunked):
    model.zero_grad()
    with Largest() as largest, FlopCounterMode(display=False) as counter:
        loss_sum, losses = forward_loss(model, batch, labels, chunked)
        assert losses.shape == labels.shape and losses.sum().item() == pytest.approx(loss_sum.item(), rel=1e-6)
        loss_sum.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss_sum.item(), gradients, largest.elements, counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_in_pieces_is_the_loss(name):
    model = small_model(name)
    batch, labels = small_batch(model)
    plain, expected, whole, flops = loss_and_gradients(model, batch, labels, False)
    logits = model(**batch).logits
    chunk_loss(model, 8)
    chunked, gradients, largest, chunked_flops = loss_and_gradients(model, batch, labels, True)
    assert chunked == pytest.approx(plain, rel=1e-5) and chunked_flops == flops > 0  # nothing is computed twice
    assert len(gradients) == len(expected) > 5
    rounding = 1e-7 * torch.stack([gradient.norm() for gradient in expected]).norm()  # a key's bias has no gradient but rounding
    for mine, other in zip(gradients, expected, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + rounding
    weights = VOCABULARY * 32  # the embeddings' gradient is there either way
    assert whole >= 36 * VOCABULARY > weights and largest == weights
    assert torch.equal(model(**batch).logits, logits)  # without labels it is the model that it was
    none, gradients, *_ = loss_and_gradients(model, batch, torch.full_like(labels, -100), True)
    assert none == 0 and len(gradients) == len(expected) and not any(gradient.any() for gradient in gradients)
    with torch.no_grad(), Largest() as evaluating:
        assert forward_loss(model, batch, labels, chunked=True)[0].item() == pytest.approx(plain, rel=1e-5)
    assert evaluating.elements == math.ceil(36 / 8) * VOCABULARY
    with torch.autocast("cpu", torch.bfloat16):
        halved, gradients, *_ = loss_and_gradients(model, batch, labels, True)
    assert halved == pytest.approx(plain, rel=1e-2) and {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(
        (mine - other).norm() <= 0.1 * other.norm() + 1e5 * rounding for mine, other in zip(gradients, expected, strict=True)
    )
    ids = model.generate(input_ids=batch["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert ids.shape[1] >= 4
    assert {name.split()[0] for name in SMALL} == CHUNKABLE


def test_other_families_are_refused():
    config = AutoConfig.for_model("granite", vocab_size=100, logits_scaling=3.0, **DECODER)
    with pytest.raises(UserError, match="--loss_chunks: not known to be exact for a granite model; it is for bart, gemma"):
        chunk_loss(AutoModelForCausalLM.from_config(config), 4)
    args = Arguments(model_name_or_path="x", output_dir="y", train_file="z", loss_chunks=2, task="classification")
    assert any("--loss_chunks: a classifier" in problem for problem in check_arguments(args))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("savers"))


PLACES = [
    "lora/zero3/t5",
    "lora, head learns/zero2/llama",
    "adalora/ddp/t5",
    "ia3/ddp/bart",
    "prefix/ddp/gpt2",
    "prompt/zero3/llama",
    "trainable_tokens/single/t5",
    "lora, loss_chunks, checkpointing/zero3/llama",
    "qlora (nf4, double)/single/phi3",
    "int8, lora/zero2/gpt2",
    "adamw_bnb_8bit/zero2/bart",
    "lion_8bit/zero3/gpt2",
]
REFUSED = {"adalora/zero2/t5": "refused: --peft adalora: moves its ranks"}


@pytest.mark.launch
def test_savers_train_resume_and_load(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "savers.py"), "--out", str(tmp_path / "out.json"), "--only", *PLACES, *REFUSED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:]
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert {place for place, found in cells.items() if found == "works"} == set(PLACES)
    assert all(cells[place].startswith(reason) for place, reason in REFUSED.items())
    table = (tmp_path / "out.md").read_text()
    assert table.count("works") == len(PLACES) + 1 and "refused (1)" in table  # and in its title


def bytes_of(folder, **flags):
    """Return {weights, gradients, optimizer: bytes} after a step, and the numbers of all, trainable and quantised parameters."""
    args = Arguments(model_name_or_path=str(folder), task="causal", **flags)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, _ = load_model(args, config, tokenizer, None, torch.float32, quantization_config(args, "llama", torch.float32, 0))
    if args.peft:
        model, report = add_adapter(model, args, tokenizer, torch.float32, 10)
    else:
        report = apply_rules(model, args.freeze, args.unfreeze)
    optimizer = build_optimizer(model, optim=args.optim, learning_rate=1e-3, weight_decay=0.0, on_host=False)
    model(input_ids=torch.randint(5, 50, (2, 8))).logits.sum().backward()
    optimizer.step()
    quantised = sum(num_elements(p) for p in model.parameters() if is_quantised(p))
    sizes = {what: gib * 2**30 for what, gib in memory_gib(model, optimizer)["host"].items()}
    return sizes, report.num_total, report.num_trainable, quantised


# Bytes of a quantised weight: its code, and a scale for 64 (int8: for each row, here of 64 or more).
SMALLER = [
    ({}, 0),
    ({"optim": "adamw_bnb_8bit"}, 0),
    ({"optim": "lion_8bit"}, 0),
    ({"optim": "lion_32bit"}, 0),
    ({"freeze": ["backbone"]}, 0),
    ({"peft": "lora"}, 0),
    ({"peft": "lora", "unfreeze": ["head"]}, 0),
    ({"peft": "lora", "quantize": "nf4"}, 0.5 + 4 / 64),
    ({"quantize": "nf4", "unfreeze": ["head"]}, 0.5 + 4 / 64),
    ({"peft": "lora", "quantize": "int8"}, 1 + 4 / 64),
]


@pytest.mark.parametrize("flags, code_bytes", SMALLER, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_bytes_of_weights_gradients_and_states(inputs, flags, code_bytes):
    sizes, total, trainable, quantised = bytes_of(inputs[0]["llama"], **flags)
    assert (quantised > 0.5 * total) == bool(code_bytes) and (trainable < total / 2) == bool(flags.keys() - {"optim"})
    assert sizes["weights"] == pytest.approx(4 * (total - quantised) + code_bytes * quantised, rel=0.03)
    assert sizes["gradients"] == pytest.approx(4 * trainable, rel=0.01, abs=1024)
    # Of 8 bits: two codes, and two scales for 256; of Lion half as many.
    state_bytes = {"adamw_bnb_8bit": 2 + 2 * 4 / 256, "lion_8bit": 1 + 4 / 256, "lion_32bit": 4}.get(flags.get("optim"), 8)
    assert sizes["optimizer"] == pytest.approx(state_bytes * trainable, rel=0.03, abs=1024)


def wrap(folder, **flags):
    args = Arguments(model_name_or_path=str(folder), **flags)
    auto = AutoModelForSeq2SeqLM if args.task == "seq2seq" else AutoModelForCausalLM
    return add_adapter(auto.from_pretrained(folder), args, AutoTokenizer.from_pretrained(folder), torch.float32, 10)


def test_rules_beside_an_adapter(inputs):
    models, _ = inputs
    model, report = wrap(models["llama"], task="causal", peft="lora", unfreeze=["head"])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if "lora_" not in name} == {"base_model.model.lm_head.modules_to_save.default.weight"}
    assert len(names) == 1 + 4 * 2 * 2  # A and B of the queries and values of four blocks
    assert (report.num_trainable, report.num_total) == model.get_nb_trainable_parameters()
    for family, flags, message in [
        ("t5", {"peft": "lora", "unfreeze": ["head"]}, "is also .*; beside an adapter a tied weight cannot learn"),
        ("t5", {"peft": "lora", "target_modules": ["qq", "v"]}, r"--target_modules qq: no module of T5For.*did you mean q"),
        ("llama", {"peft": "lora", "target_modules": ["q_pro"], "task": "causal"}, "did you mean q_proj"),
        ("llama", {"peft": "lora", "unfreeze": ["layers[9]"], "task": "causal"}, "outside the range"),
        (
            "llama",
            {"peft": "lora", "modules_to_save": ["lm_hed"], "task": "causal"},
            "--modules_to_save lm_hed: .*did you mean lm_head",
        ),
        ("phi3", {"peft": "lora", "task": "causal"}, "peft has no choice of its own for a phi3 model; give names, or all-linear"),
        ("t5", {"peft": "trainable_tokens", "trainable_tokens": [" "]}, "--trainable_tokens ' ': is no token"),
    ]:
        with pytest.raises(UserError, match=message):
            wrap(models[family], **flags)


@pytest.mark.launch
def test_a_classifiers_head_learns_beside_an_adapter(train, tiny, rows16):
    """peft knows the heads of some families alone; BART's is none of them. final/ and merged/ answer alike."""
    result = train(
        None, model_name_or_path=tiny("bart"), task="classification", text_column="source", train_file=rows16, max_steps=2,
        peft="lora", merge_adapter=True, learning_rate=0.1,
    )  # fmt: skip
    head = {name: tensor for name, tensor in load_file(result.folder / "final/adapter_model.safetensors").items() if "head" in name}
    merged = AutoModelForSequenceClassification.from_pretrained(result.folder / "merged").eval()
    assert len(head) == 4 and merged.config.num_labels == 3
    base = AutoModelForSequenceClassification.from_pretrained(tiny("bart"), num_labels=3)
    adapted = PeftModel.from_pretrained(base, result.folder / "final").eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5)


def test_mistakes_are_found_before_training():
    def problems(**flags):
        return "\n".join(check_arguments(Arguments(model_name_or_path="x", output_dir="y", dataset_name="z", **flags)))

    assert "--lora_r 0: must be greater than 0" in problems(peft="lora", lora_r=0)
    assert "--lora_dropout 1.5: must be at least 0 and below 1" in problems(peft="lora", lora_dropout=1.5)
    assert "--target_modules: is for adapters; give --peft" in problems(target_modules=["q"])
    assert "--quantize: quantised weights cannot learn; give an adapter" in problems(quantize="nf4")
    assert problems(quantize="nf4", unfreeze=["head"]) == ""
    assert "--double_quant: is for --quantize nf4 and fp4 (given: int8)" in problems(
        quantize="int8", double_quant=True, peft="lora"
    )
    assert "--merge_adapter: --peft prefix cannot be merged" in problems(peft="prefix", merge_adapter=True)
    assert "does not go with --peft prefix" in problems(peft="prefix", gradient_checkpointing=True)
    assert "--trainable_tokens and --peft trainable_tokens go together" in problems(peft="trainable_tokens")
    assert "--peft trainable_tokens: nothing learns beside" in problems(peft="trainable_tokens", unfreeze=["head"])
    assert "--peft adalora: in fp16" in problems(peft="adalora", mixed_precision="fp16")
    assert problems(peft="lora") == ""
    if not torch.cuda.is_available():
        device = "\n".join(
            check_device(Arguments(optim="paged_adamw_8bit", liger=True, tf32=True, attn_implementation="flex_attention"))
        )
        assert "--tf32: is a precision of GPUs" in device and "--attn_implementation flex_attention: trains on a GPU" in device
        assert "paged_adamw_8bit: pages a GPU's memory" in device and "--liger: its kernels are written in Triton" in device
    for kind, bits in (("longt5", "nf4"), ("switch_transformers", "fp4"), ("prophetnet", "int8")):
        with pytest.raises(UserError, match=f"--quantize {bits}: not for a {kind} model: .*; use --quantize "):
            quantization_config(Arguments(quantize=bits), kind, torch.float32, 0)
    path = "ds_configs/zero2_offload.json"
    with pytest.raises(UserError, match="adamw_bnb_8bit: .*zero2_offload.json keeps optimizer states on cpu"):
        check_config(read_deepspeed_config(path), path, Arguments(optim="adamw_bnb_8bit"))
