"""Rows laid end to end: the losses and gradients of padded batches, for every family that is allowed; and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from conftest import SPECIALS, WORDS, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zerotune.errors import UserError
from zerotune.model.attention import choose_attention, lines_of_packed
from zerotune.model.loading import decoder_inputs, load_config
from zerotune.model.loss import token_losses
from zerotune.model.packing import DECODERS, ENCODER_DECODERS, check_exact, pack_forward, places_in_rows
from zerotune.plan.empty import empty_model
from zerotune.rows import IGNORE
from zerotune.rows.batches import Stream, deal_by_tokens, rows_of_step
from zerotune.rows.collation import Collator, count_tokens, shape_terms
from zerotune.rows.packing import lines_of
from zerotune.run.arguments import Arguments
from zerotune.tools.flops import coefficients

SIZE = len(WORDS) + len(SPECIALS)


def config_of(family):
    """Return (model class, configuration) of a two-block model; windows of 8 tokens where the family has them."""
    import transformers as t

    if family in ("t5", "bart", "gpt2", "llama"):
        return tiny_config(family, 0.0)
    common = {"vocab_size": SIZE, "pad_token_id": 0, "eos_token_id": 1}
    if family == "mt5":
        config = t.MT5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, **common
        )
        return t.MT5ForConditionalGeneration, config
    if family == "mbart":
        config = t.MBartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0, bos_token_id=3, **common,
        )  # fmt: skip
        return t.MBartForConditionalGeneration, config
    name = {
        "phi": "Phi",
        "phi3": "Phi3",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "mistral": "Mistral",
    }[family]
    more = {
        "mistral": {"sliding_window": 8}, "phi3": {"sliding_window": 8},
        "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    }.get(family, {})  # fmt: skip
    if family in ("gemma", "gemma2", "qwen3"):
        more |= {"head_dim": 8}
    shared = {} if family == "phi" else {"num_key_value_heads": 2}  # queries that share keys and values
    config = getattr(t, f"{name}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **shared,
        max_position_embeddings=128, attention_dropout=0.0, bos_token_id=3, **common, **more,
    )  # fmt: skip
    return getattr(t, f"{name}ForCausalLM"), config


def columns_of(task, lengths):
    """Return rows of so many tokens as a Dataset's slice."""
    ids = [[4 + (7 * n + place * (n + 3)) % len(WORDS) for place in range(length)] for n, length in enumerate(lengths)]
    if task == "causal":
        return {"input_ids": ids, "labels": [row[1:] + [IGNORE] for row in ids]}
    return {"input_ids": ids, "labels": [[*row[: 1 + len(row) // 3], 1] for row in ids[::-1]]}


def gradients(model, batch):
    model.zero_grad()
    batch = dict(batch)
    labels = batch.pop("labels")
    losses = token_losses(model(**batch).logits, labels)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kernels_of(family):
    """Return the attentions that a family packs under: dense masks, and row by row where it has SDPA."""
    return ["eager"] if family == "gemma2" else ["sdpa", "sdpa_by_row"]


@pytest.mark.parametrize("family, kernel", [(f, k) for f in sorted(DECODERS | ENCODER_DECODERS) for k in kernels_of(f)])
def test_packed_is_padded(family, kernel):
    """Losses within 1e-6 and gradients within 1e-5, in float32; where rows see each other nothing is alike."""
    torch.manual_seed(1)
    model_class, config = config_of(family)
    choose_attention(config, kernel, model_class)
    model = model_class(config).train()
    assert model.config._attn_implementation == kernel
    assert model.config.model_type == family
    if family in DECODERS:  # as they are drawn, what another row says would hardly be heard
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim == 2 else 1)
    pack_forward(model)
    seq2seq = family in ENCODER_DECODERS
    # Of a multiple of 16 tokens, so that there is padding at the end of a single line too, as on a GPU.
    inputs, lines = decoder_inputs(model, config) if seq2seq else None, lines_of_packed(config)
    collator = Collator("seq2seq" if seq2seq else "causal", 0, None, 16 if lines else 1, inputs, 32, lines)
    columns = columns_of(collator.task, [34, 3, 17, 29, 5, 11, 2, 23])
    padded, packed = collator(columns), collator.training(columns)
    assert packed["input_ids"].shape[0] < 8 and count_tokens(packed)[0] == count_tokens(padded)[0]
    assert count_tokens(packed)[1] < 0.75 * count_tokens(padded)[1]
    (losses, expected), (packed_losses, found) = gradients(model, padded), gradients(model, packed)
    loss, packed_loss = losses.sum().item(), packed_losses.sum().item()
    assert abs(packed_loss / loss - 1) < 1e-6
    assert expected.keys() == found.keys()
    size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * max(gradient.norm(), size / 100), name
    blind = packed | {"token_rows": torch.ones_like(packed["token_rows"])}
    if seq2seq:
        blind["target_rows"] = torch.ones_like(packed["target_rows"])
    seen = gradients(model, blind)[0]
    apart = (seen - packed_losses).norm() / packed_losses.norm()
    assert apart > 1e-3, "the rows have to matter for this to show anything"


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_row_by_row_costs_what_the_rows_cost(family):
    """No token of padding, and to a thousandth the products of the rows one by one, as torch and the records count them."""
    task, counted = "causal" if family == "llama" else "seq2seq", {}
    columns = columns_of(task, [40, 3, 17, 29, 5, 11])
    one_by_one = [{name: rows[place : place + 1] for name, rows in columns.items()} for place in range(6)]
    for kernel in ("sdpa", "sdpa_by_row"):
        model_class, config = tiny_config(family, 0.0)
        choose_attention(config, kernel, model_class)
        model = model_class(config).train()
        pack_forward(model)
        collator = Collator(task, 0, None, 1, decoder_inputs(model, config) if task == "seq2seq" else None, 32, lines=1)
        for parts in ([columns], one_by_one):
            # The kernel that is written in matrix products: torch's counter does not know the CPU's fused one.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                batches = [collator.training(part) for part in parts]
                for batch in batches:
                    gradients(model, batch)
            counted[kernel, len(parts)] = counter.get_total_flops()
            real, laid = (sum(count) for count in zip(*map(count_tokens, batches), strict=True))
            assert real == laid
    terms = shape_terms(collator.training(columns), apart=True)  # of one line
    assert np.dot(coefficients(config, task), terms) == pytest.approx(counted["sdpa_by_row", 1], rel=1e-3)
    assert counted["sdpa_by_row", 1] == pytest.approx(counted["sdpa_by_row", 6], rel=1e-3)
    assert counted["sdpa", 1] > 1.1 * counted["sdpa_by_row", 1]


def test_what_a_cpu_packs_by_itself(fails_on_rank_1, tiny):
    """Row by row where transformers' own class runs; a model's own code may know no other attention than it names."""
    common = {"task": "causal", "trust_remote_code": True}
    for folder, flags, kernel in (
        (tiny("llama"), {"packing": True}, None if torch.cuda.is_available() else "sdpa_by_row"),
        (tiny("llama"), {"packing": True, "torch_compile": True}, None),
        (tiny("llama"), {}, None),
        (fails_on_rank_1, {"packing": True}, None),
    ):
        config = load_config(Arguments(model_name_or_path=str(folder), **common, **flags))
        assert config._attn_implementation == kernel, (folder, flags)


def test_wider_models_waste_less():
    """Under dense masks: padding and products beyond the rows' own, of rows with the lengths of conversations: docs/rows.md."""
    generator, found = np.random.default_rng(0), {}
    lengths = sum(np.exp(generator.uniform(np.log(8), np.log(most), 2000)).astype(int) for most in (400, 128))
    costs, stream = np.stack([lengths, 0 * lengths], axis=1), Stream(0, [2000])
    for width in (512, 1024, 2048, 4096):
        real = laid = done = needed = 0
        for step in range(8):
            rows = rows_of_step(step, stream, 32)
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
            for (mine,) in deal_by_tokens(rows, costs[rows], 1024, 1, packed=True):
                sizes = lengths[mine]
                lines = lines_of(sizes, 0 * sizes, width)
                longest = max(sizes[line].sum() for line in lines)
                real, laid = real + sizes.sum(), laid + len(lines) * longest
                needed += (sizes * (6 * width + sizes)).sum()
                done += len(lines) * longest * (6 * width + longest)
        found[width] = round(100 * float(1 - real / laid), 1), round(100 * float(done / needed - 1), 1)
    assert found == {512: (3.3, 6.6), 1024: (2.3, 4.7), 2048: (1.3, 3.2), 4096: (0.3, 1.9)}


def test_a_model_has_to_show_it():
    """What two rows' targets lose is compared one by one: in 16 bits too, a row that sees the other is noticed."""
    torch.manual_seed(1)
    model_class, config = config_of("llama")
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    pack_forward(model)
    collator, columns = Collator("causal", 0, None, 1, None, 32), columns_of("causal", [17, 29])
    for precision in (torch.float32, torch.bfloat16):
        model.to(precision)
        batches = [collator(columns), collator.packed(columns, count=1)]
        batches.append(batches[1] | {"token_rows": torch.ones_like(batches[1]["token_rows"])})
        padded, packed, blind = (gradients(model, batch)[0][batch["labels"] != IGNORE] for batch in batches)
        check_exact(padded, packed, precision)
        with pytest.raises(UserError, match="other losses packed than padded"):
            check_exact(padded, blind, precision)


def test_every_token_once():
    """Random rows: each line holds whole rows, each row is there once, and places begin anew with every row."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        number, multiple = int(generator.integers(1, 40)), int(generator.choice([1, 8]))
        sources = generator.integers(1, 200, number)
        targets = generator.integers(1, 60, number) * int(generator.integers(0, 2))
        lines = lines_of(sources, targets, int(generator.choice([32, 512, 4096])), multiple)
        assert sorted(row for line in lines for row in line) == list(range(number)) and all(lines)
        columns = {"input_ids": [[5] * n for n in sources], "labels": [[6] * n for n in targets]}
        seq2seq = targets.any()
        if not seq2seq:
            columns["labels"] = columns["input_ids"]
        collator = Collator(
            "seq2seq" if seq2seq else "causal", 0, None, multiple, (lambda labels: labels) if seq2seq else None, 512
        )
        batch = collator.packed(columns)
        assert count_tokens(batch)[0] == sources.sum() + (targets.sum() if seq2seq else 0)
        rows, counts = batch["token_rows"][batch["token_rows"] > 0].unique(return_counts=True)
        assert rows.tolist() == list(range(1, number + 1)) and counts.tolist() == sources.tolist()
        assert batch["input_ids"].shape[1] % multiple == 0
        places = places_in_rows(batch["token_rows"])
        for row in rows.tolist():
            assert places[batch["token_rows"] == row].tolist() == list(range(sources[row - 1]))
        assert not places[batch["token_rows"] == 0].any(), "padding takes no positions that a model may not have"
        assert len(lines_of(sources, targets, 64, multiple, count=1)) == 1


def test_attention_that_skips_between_rows():
    """They take the packed rows of a decoder as one line, whose losses are the padded ones."""  # flex: no backward on a CPU
    torch.manual_seed(1)
    model_class, config = config_of("llama")
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    state = model.state_dict()
    columns, losses = columns_of("causal", [17, 5, 29]), {}
    for kind in ("sdpa", "sdpa_by_row", "flex_attention"):
        choose_attention(config, kind, model_class)
        model = model_class(config).eval()
        assert model.config._attn_implementation == kind
        model.load_state_dict(state)
        pack_forward(model)
        collator = Collator("causal", 0, None, 1, None, 1, lines_of_packed(config))
        batch = collator.training(columns)
        assert len(batch["input_ids"]) == {"sdpa": 2}.get(kind, 1), "of a width of 1 attention costs most"
        padded = collator(columns)
        blind = batch | {"token_rows": torch.ones_like(batch["token_rows"])}
        for name, given in (("packed", batch), ("padded", padded), ("blind", blind)):
            labels = given.pop("labels")
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # what a compiler would fuse
                losses[kind, name] = token_losses(model(**given).logits, labels)[labels != IGNORE].sort().values
    reference = losses["sdpa", "padded"]
    assert len(reference) == 48
    for name, found in losses.items():
        apart = (found - reference).norm() / reference.norm()
        assert apart > 1e-3 if name[1] == "blind" else apart < 1e-5, name


def test_attention_that_a_model_lacks():
    model_class, config = tiny_config("t5", 0.0)
    with pytest.raises(
        UserError, match="flash_attention_2: a t5 model does not have it; it has eager, sdpa, sdpa_by_row, flex_attention"
    ):
        choose_attention(config, "flash_attention_2", model_class)
    model_class, config = tiny_config("llama", 0.0)
    choose_attention(config, "flash_attention_2", model_class)
    assert lines_of_packed(config) == 1
    planned = empty_model(config, "causal", torch.float32)
    assert planned.config._attn_implementation == "sdpa" and config._attn_implementation == "flash_attention_2"


def test_what_is_refused():
    model_class, config = tiny_config("t5", 0.0)
    with pytest.raises(UserError, match="eager attention would not keep the rows of this model apart; it needs sdpa"):
        pack_forward(model_class._from_config(config, attn_implementation="eager"))
    model_class, config = tiny_config("bert", 0.0)
    with pytest.raises(UserError, match="not known to be exact for a bert model; it is for bart, "):
        pack_forward(model_class(config))


CELLS = {
    "t5-ddp": ("t5", "ddp", {"peft": "lora"}),
    "t5-zero3": ("t5", "zero3", {"freeze": "encoder", "gradient_checkpointing": True, "loss_chunks": 2}),
    "bart-zero1": ("bart", "zero1", {"freeze": "encoder", "unfreeze": "encoder.layers[-1]"}),
    "llama-zero2": ("llama", "zero2", {"peft": "lora", "loss_chunks": 3, "gradient_checkpointing": True}),
    "gpt2-zero3": ("gpt2", "zero3", {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}),
}
KERNELS = {"bart": "sdpa", "llama": "eager"}  # dense masks


@pytest.mark.launch
@pytest.mark.parametrize("cell", CELLS)
def test_a_packed_run_is_a_padded_run(cell, train, tiny, rows16):
    """The same losses, tokens and evaluation as one process that pads, from fewer tokens that are padding."""
    family, strategy, more = CELLS[cell]
    options = {
        "model_name_or_path": tiny(family), "train_file": rows16, "validation_file": rows16, "predict_with_generate": "false",
        "task": "seq2seq" if family in ENCODER_DECODERS else "causal", "learning_rate": 1e-4, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1, "save_steps": 0,
    }  # fmt: skip
    options |= more
    padded = train(None, name="padded", **options | {"gradient_accumulation_steps": 2 * options["gradient_accumulation_steps"]})
    kernel = KERNELS.get(family, "sdpa" if torch.cuda.is_available() else "sdpa_by_row")  # that one without a word
    kernels = {"attn_implementation": kernel} if family in KERNELS else {}
    packed = train(strategy, name="packed", packing=True, **kernels, **options)
    assert [run.run["engine"]["attention"] for run in (padded, packed)] == ["sdpa", kernel]
    for one, other in zip(padded.records("loss"), packed.records("loss"), strict=True):
        assert abs(other["loss"] / one["loss"] - 1) < 1e-5 and abs(other["grad_norm"] / one["grad_norm"] - 1) < 1e-4
        assert [one[name] for name in ("target_tokens", "real_tokens")] == [
            other[name] for name in ("target_tokens", "real_tokens")
        ]
    assert abs(packed.records("eval_loss")[0]["eval_loss"] / padded.records("eval_loss")[0]["eval_loss"] - 1) < 1e-5
    share = [sum(record["padding_fraction"] for record in run.records("loss")) for run in (padded, packed)]
    # Dense masks have several lines: of a width of 32, for which attention over a long line is dear.
    assert share[1] < 0.75 * share[0] if kernel != "sdpa_by_row" else share[1] == 0 < share[0], share
    assert packed.run["arguments"]["packing"] is True
    assert "by_row" not in (packed.folder / "final" / ("config.json" if "peft" not in more else "adapter_config.json")).read_text()


@pytest.mark.launch
def test_a_packed_run_goes_on_to_the_bit(train, tiny, rows16, tmp_path):
    """With dropout, from the middle of an epoch; and padded in place of packed is another layout, gone on with and said."""
    options = {
        "model_name_or_path": tiny("t5", 0.1), "train_file": rows16, "per_device_train_batch_size": 3, "packing": True,
        "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    straight = train("ddp", name="straight", **options)
    cut = tmp_path / "cut"
    shutil.copytree(straight.folder, cut)
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(cut / name)
    resumed = train("ddp", name="again", **options | {"output_dir": cut})
    assert resumed.run["resumed_from"].endswith("checkpoint-3")
    for name, weight in straight.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    shutil.rmtree(cut / "checkpoint-6")
    padded = train("ddp", name="padded", **options | {"output_dir": cut, "packing": None})
    assert "packing True -> False" in padded.output
    for name in ("target_tokens", "real_tokens"):
        assert [r[name] for r in straight.records("loss")] == [r[name] for r in padded.records("loss")]
