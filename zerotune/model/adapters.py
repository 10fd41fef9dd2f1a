"""Adapters by peft: what is added to a frozen model, what final/ then holds, and the merge of both.

    --peft lora --lora_r 16 --lora_alpha 32 --target_modules all-linear
    --peft lora --unfreeze head         the head learns as a whole beside the adapters, and is saved with them

The base is frozen; --freeze and --unfreeze rules decide which modules of it learn as a whole (peft's modules_to_save).
"""

import copy
import dataclasses
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from zerotune.errors import UserError, nearest
from zerotune.model.freezing import HEAD_NAMES, apply_rules, names_of

TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
LORA_KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def add_tokens(tokenizer, tokens):
    """Add the trainable tokens that the tokenizer does not have; return the ids of all of them."""
    blank = [token for token in tokens if not token.strip()]
    if blank:
        raise UserError(f"--trainable_tokens {blank[0]!r}: is no token")
    tokenizer.add_tokens([token for token in tokens if token not in tokenizer.get_vocab()])
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def check_targets(flag, model, targets):
    """Raise UserError for names, given by the flag, that are no module of the model, with the nearest ones."""
    names = [name for name, _ in model.named_modules()]
    last = {name.rpartition(".")[2] for name in names}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"{flag} {target}: no module of {type(model).__name__}{nearest(target, last)}")


def whole_modules(model, freeze, unfreeze):
    """Apply the rules to a frozen base; return (the modules that learn as a whole, the report of the rules)."""
    model.requires_grad_(False)
    report = apply_rules(model, freeze, unfreeze, all_may_be_frozen=True)
    modules = set()
    for parameter, names in names_of(model):
        if not parameter.requires_grad:
            continue
        if len(names) > 1:
            raise UserError(
                f"--unfreeze: {names[0]} is also {', '.join(names[1:])}; beside an adapter a tied weight cannot learn, since peft "
                "would train a copy of one of them"
            )
        modules.add(names[0].rpartition(".")[0])
    for path in sorted(modules):
        frozen = [name for name, p in model.get_submodule(path).named_parameters() if not p.requires_grad]
        if frozen:
            raise UserError(f"--unfreeze: of {path} {', '.join(frozen)} stays frozen; beside an adapter a module learns as a whole")
    return sorted(modules), report


def adapter_config(args, token_ids, modules_to_save, max_steps):
    """Return peft's configuration for the flags."""
    import peft

    common = {"task_type": TASK_TYPES[args.task], "modules_to_save": modules_to_save or None}
    targets = args.target_modules or None
    if targets == ["all-linear"]:
        targets = "all-linear"
    if args.peft in LORA_KINDS:
        size = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        return peft.LoraConfig(**size, target_modules=targets, **LORA_KINDS[args.peft], **common)
    if args.peft == "adalora":
        size = {"target_r": args.lora_r, "init_r": -(-3 * args.lora_r // 2), "lora_alpha": args.lora_alpha}
        schedule = {"total_step": max_steps, "tinit": max_steps // 10, "tfinal": 0}
        return peft.AdaLoraConfig(**size, **schedule, lora_dropout=args.lora_dropout, target_modules=targets, **common)
    if args.peft == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=None if targets is None else [], **common)
    if args.peft == "trainable_tokens":
        return peft.TrainableTokensConfig(token_indices=token_ids, task_type=common["task_type"])
    kinds = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    return kinds[args.peft](num_virtual_tokens=args.num_virtual_tokens, **common)


def add_adapter(model, args, tokenizer, dtype, max_steps):
    """Return (peft's model around `model`, the FreezeReport).

    dtype: of the adapter's weights; float32, or the training precision under DeepSpeed, which keeps float32 masters itself.
    """
    import peft

    if args.target_modules != ["all-linear"]:
        check_targets("--target_modules", model, args.target_modules)
    check_targets("--modules_to_save", model, args.modules_to_save)
    token_ids = add_tokens(tokenizer, args.trainable_tokens)
    if token_ids and max(token_ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(token_ids) + 1)
    modules, report = whole_modules(model, args.freeze, args.unfreeze)
    if args.task == "classification":  # a new head learns; peft knows those of some families alone
        modules = sorted({*modules, *(name for name, _ in model.named_children() if name in HEAD_NAMES)})
    config = adapter_config(args, token_ids, [*args.modules_to_save, *modules], max_steps)
    config.base_model_name_or_path = args.model_name_or_path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice is for its own commands
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        kind = model.config.model_type
        if "target_modules" in str(error) and not args.target_modules:
            raise UserError(
                f"--target_modules: peft has no choice of its own for a {kind} model; give names, or all-linear"
            ) from None
        raise UserError(f"--peft {args.peft}: {' '.join(str(error).split())[:300]}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    trainable, total = model.get_nb_trainable_parameters()
    return model, dataclasses.replace(report, num_trainable=trainable, num_total=total)


def allocate_ranks(model, optimizer):
    """Have an AdaLoRA (Zhang et al. 2023) move its rank budget after each step of the optimizer, a torch one.

    The optimizer's state carries the running importances, so that checkpoints hold them. The gradient of the orthogonality term
    joins just before the step, after clipping: the loss itself stays a sum over tokens.
    """
    tuner = model.base_model
    allocator, weight = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
    named = {name: p for name, p in tuner.model.named_parameters() if "lora_" in name and p.requires_grad}
    singular = [p for name, p in named.items() if "lora_A" in name or "lora_B" in name]
    averages = (allocator.exp_avg_ipt, allocator.exp_avg_unc)

    def orthogonality(*_):
        with torch.enable_grad():
            products = [p @ p.T if p.shape[0] <= p.shape[1] else p.T @ p for p in singular]
            distances = [torch.norm(product - torch.eye(len(product), device=product.device)) for product in products]
            gradients = torch.autograd.grad(weight * torch.stack(distances).mean(), singular)
        for parameter, gradient in zip(singular, gradients, strict=True):
            parameter.grad += gradient

    def allocate(optimizer, *_):
        states = {name: optimizer.state[parameter] for name, parameter in named.items()}
        for name, state in states.items():
            allocator.ipt[name] = torch.zeros_like(named[name])  # only where it is missing does peft start the averages anew
            for number, average in enumerate(averages):
                average[name] = state.get(f"importance_{number}", torch.zeros_like(named[name]))
        tuner.update_and_allocate(int(next(iter(states.values()))["step"]))
        for name, state in states.items():
            state |= {f"importance_{number}": average[name] for number, average in enumerate(averages)}

    optimizer.register_step_pre_hook(orthogonality)
    optimizer.register_step_post_hook(allocate)


def adapter_state(model):
    """Return {peft's name: whole tensor on the host} of the adapter; a collective under ZeRO-3, where the base stays sharded."""
    from peft import get_peft_model_state_dict

    config, gathered = model.active_peft_config, nullcontext()
    sharded = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    inference_mode, config.inference_mode = config.inference_mode, True  # a prompt is then read, not computed
    try:
        with gathered:
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    finally:
        config.inference_mode = inference_mode


def save_adapter(model, folder, state):
    """Write what PeftModel.from_pretrained loads, the tensors of `adapter_state`, and compare the file with them."""
    from safetensors.torch import load_file, save_file

    config = copy.deepcopy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(folder)
    path = Path(folder) / "adapter_model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    written = load_file(path)
    wrong = [name for name, tensor in state.items() if name not in written or not torch.equal(tensor, written[name])]
    if wrong or not written:
        raise RuntimeError(f"{folder} does not hold the adapter as it was trained: {', '.join(wrong[:10]) or 'it is empty'}")


def merge(folder, target, auto, trained, args, tokenizer):
    """Write the base with the adapter in `folder` merged into its weights to `target`; trained: the model, for its configuration.

    Raises RuntimeError unless the merged model's logits are the unmerged one's, for some random tokens.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    config = copy.deepcopy(trained.config)  # with the labels and the language of this run
    original = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    config.dtype, config.get_text_config().vocab_size = original.dtype, original.get_text_config().vocab_size  # as it is loaded
    if args.quantize:
        del config.quantization_config
    plain = auto.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype="auto",
        trust_remote_code=args.trust_remote_code,
        ignore_mismatched_sizes=args.task == "classification",  # the adapter brings its own head
    )
    if len(tokenizer) > plain.get_input_embeddings().num_embeddings:
        plain.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(plain, folder).eval()
    ids = torch.randint(0, plain.config.get_text_config().vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    if tokenizer.eos_token_id is not None:  # classifiers with a decoder look for the one end token of each row
        ids[ids == tokenizer.eos_token_id] = 0
        ids[:, -1] = tokenizer.eos_token_id
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if args.task == "seq2seq" else {})}
    with torch.no_grad():
        before = model(**batch).logits.float()
        merged = model.merge_and_unload()
        after = merged(**batch).logits.float()
    off = ((after - before).norm() / before.norm()).item()
    if not off <= (1e-4 if plain.dtype == torch.float32 else 3e-2):
        raise RuntimeError(f"{target}: merged logits differ from the unmerged ones by {off:.1e} (relative)")
    if plain.can_generate():
        merged.generation_config = trained.generation_config
    merged.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)
