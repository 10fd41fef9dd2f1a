"""Load the tokenizer, the configuration and the model."""

import contextlib
import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from zerotune.errors import UserError
from zerotune.model.adapters import add_tokens
from zerotune.model.attention import choose_attention
from zerotune.model.quantization import prepare_quantized
from zerotune.rows.chat import load_template

logging.disable_progress_bar()  # of loading and saving: a run's log is for its own lines

AUTO_CLASSES = {
    "seq2seq": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
ROBERTA_FAMILY = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer"}
T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}


def load_config(args):
    """Return the model's configuration; raise UserError in one line if it cannot be had or does not fit the task."""
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {args.model_name_or_path}: {first_line(error)}") from None
    if type(config) not in AUTO_CLASSES[args.task]._model_mapping and not args.trust_remote_code:
        fits = [task for task, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
        raise UserError(f"--task {args.task}: a {config.model_type} model cannot do this; it fits {', '.join(fits) or 'no task'}")
    own_code = getattr(config, "auto_map", None)  # may know no attention but those it names
    by_row = args.packing and not args.torch_compile and not own_code and not torch.cuda.is_available()
    choose_attention(config, args.attn_implementation, model_class_of(config, args.task), by_row)
    return config


def model_class_of(config, task):
    """Return the class that the task's AutoModel makes of a configuration; None for one that transformers does not know."""
    found = AUTO_CLASSES[task]._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def load_config_and_tokenizer(args):
    """Return (model configuration, tokenizer); raise UserError in one line if either cannot be had or does not fit the task."""
    config = load_config(args)
    name = args.tokenizer_name or args.model_name_or_path
    try:
        languages = {"src_lang": args.source_lang, "tgt_lang": args.target_lang} if args.source_lang else {}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **languages)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer_name {name}: {first_line(error)}") from None
    check_tokenizer(tokenizer, name, args)
    if args.messages_column:
        load_template(tokenizer, args)
    add_tokens(tokenizer, args.trainable_tokens)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"--tokenizer_name {name}: the tokenizer has neither a padding nor an end token")
        # Padding is masked everywhere, so which token it is does not matter; GPT-2 and Llama come without one.
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def check_tokenizer(tokenizer, name, args):
    """Raise UserError for a tokenizer that knows no words, which transformers makes up for a folder without its files."""
    # A byte-level or word-level tokenizer knows more than the word-start mark beside its special tokens.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise UserError(f"--tokenizer_name {name}: there is no tokenizer in it; give --tokenizer_name")
    for flag in ("source_lang", "target_lang"):
        code = getattr(args, flag)
        if code is not None and tokenizer.convert_tokens_to_ids(code) in (None, tokenizer.unk_token_id):
            raise UserError(f"--{flag} {code}: the tokenizer does not know this language; mBART's are like en_XX, ro_RO")


def first_line(error):
    return str(error).strip().splitlines()[0][:300]


def hidden_size(config):
    """Return the width of the residual stream, by which DeepSpeed's "auto" sizes are chosen."""
    text = config.get_text_config()
    return getattr(text, "hidden_size", None) or text.d_model


def max_positions(config):
    """Return how many positions the model has, or None if nothing bounds them (T5's are relative)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions <= 0:  # XLNet says -1
        return None
    if config.model_type in ROBERTA_FAMILY:
        return positions - config.pad_token_id - 1  # RoBERTa numbers positions from after the padding token
    return positions


def load_model(args, config, tokenizer, labels, dtype, quantization=None, unread=None):
    """Return (the pretrained model for args.task, names of weights that the checkpoint lacks and that start new).

    labels: class names, or None. dtype: torch.float32, which mixed precision outside DeepSpeed needs as master weights, or the
    training precision under DeepSpeed, which keeps its own float32 masters. Under ZeRO-3 with zero.Init active (accelerate
    switches it on with the plugin) each rank holds its shard alone from the first moment; a quantised model (quantization: its
    configuration) is sharded only when DeepSpeed takes it over. unread: model/unread.py's, of what is not to be read; such
    parameters are on the meta device.
    """
    auto = AUTO_CLASSES[args.task]
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: number for number, name in enumerate(labels)}
        config.problem_type = "single_label_classification"
    if getattr(config.get_text_config(), "pad_token_id", None) is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id  # sequence classifiers find the last real token by it
    model_class = model_class_of(config, args.task)
    left_out = unread.left_out(model_class) if unread else contextlib.nullcontext()
    with separate_weights(model_class, config, args.model_name_or_path), left_out:
        try:
            model, info = auto.from_pretrained(
                args.model_name_or_path,
                config=config,
                dtype=dtype,
                trust_remote_code=args.trust_remote_code,
                ignore_mismatched_sizes=labels is not None,  # a head for other classes is replaced by a new one
                output_loading_info=True,
                quantization_config=quantization,
            )
        except OSError as error:
            raise UserError(f"--model_name_or_path {args.model_name_or_path}: {first_line(error)}") from None
        except RuntimeError as error:  # under zero.Init transformers cannot replace a head of another size
            if "size mismatch" not in str(error):
                raise
            mismatch = " ".join(str(error)[str(error).index("size mismatch") :].split())[:200]
            raise UserError(
                f"--model_name_or_path {args.model_name_or_path}: {mismatch}; ZeRO-3 cannot replace weights of another size on "
                "loading: use zero2, or a checkpoint without them"
            ) from None
    if unread:
        unread.put_in()
    model.checkpoint_dtype = config.dtype
    if quantization is not None:
        model = prepare_quantized(model)
    if args.liger:
        apply_liger(model)
    if args.target_lang:
        speak(model, tokenizer, args.target_lang)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return model, sorted(set(info["missing_keys"]) | mismatched)


def speak(model, tokenizer, language):
    """Have generation begin in a language, as training does; both configurations keep it, so that final/ does too."""
    token = tokenizer.convert_tokens_to_ids(language)
    # mBART-25's targets, shifted, begin with the language itself; mBART-50's and NLLB's with a fixed token and then the language.
    name = "decoder_start_token_id" if type(tokenizer).__name__.startswith("MBartTokenizer") else "forced_bos_token_id"
    for config in (model.config, model.generation_config):
        setattr(config, name, token)


def decoder_inputs(model, config):
    """Return a function from labels to decoder inputs of the same shape: the model's own, or a plain shift."""
    return getattr(model, "prepare_decoder_input_ids_from_labels", None) or shift_right(config)


def shift_right(config):
    """Return a function from labels to decoder inputs: the start token, then the labels without their last."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None:
        raise UserError(f"a {config.model_type} model has no decoder_start_token_id in its configuration; set one in config.json")

    def shift(labels):
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)
        return shifted

    return shift


@contextlib.contextmanager
def separate_weights(model_class, config, name_or_path):
    """Keep transformers from tying weights that the checkpoint stores as different ones.

    T5 1.1 (flan-t5) has an lm_head of its own. transformers' T5 declares it tied and unties it if the loaded tensors differ;
    under zero.Init all tensors are empty at that moment, so they look alike and the head would be lost without a word.
    """
    stored = stored_names(name_or_path)
    if not stored and is_deepspeed_zero3_enabled() and config.model_type in T5_FAMILY:
        raise UserError(
            f"--model_name_or_path {name_or_path}: under ZeRO-3 a T5 is loaded from safetensors alone, as nothing else tells "
            "whether its head is its own; convert it: AutoModelForSeq2SeqLM.from_pretrained(...).save_pretrained(...)"
        )
    declared = getattr(model_class, "_tied_weights_keys", None)
    if not isinstance(declared, dict) or not stored:
        yield
        return
    separate = {key for key, source in declared.items() if key in stored and source in stored and differ(stored, key, source)}
    model_class._tied_weights_keys = {key: source for key, source in declared.items() if key not in separate}
    try:
        yield
    finally:
        model_class._tied_weights_keys = declared


def stored_names(name_or_path):
    """Return {tensor name: safetensors file} of a model folder or hub repository; {} if it has no safetensors."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file):
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)

    single = find("model.safetensors")  # first, as transformers does
    index = find("model.safetensors.index.json") if single is None else None
    if index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        files = {file: find(file) for file in set(weight_map.values())}
        return {name: files[file] for name, file in weight_map.items()}
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def differ(stored, *names):
    from safetensors import safe_open

    tensors = []
    for name in names:
        with safe_open(stored[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return not torch.equal(*tensors)


def vocabulary_size(config, tokenizer, trainable_tokens):
    """Return how many embeddings the model will have: with trainable tokens those of added ones as well."""
    return max(config.get_text_config().vocab_size, len(tokenizer) if trainable_tokens else 0)


def about_new_weights(model, new_weights):
    """Return lines for the log: which weights the checkpoint did not have, a warning of those that will not learn, narrow ones."""
    lines = []
    if narrowed := getattr(model, "num_narrowed", 0):
        lines.append(f"model: {narrowed} frozen tensors of linear layers stay in {model.checkpoint_dtype}, in which they are used")
    if new_weights:
        lines.append(f"model: weights that the checkpoint does not have start new: {', '.join(new_weights)}")
    frozen = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if not p.requires_grad}
    if never := sorted(frozen & set(new_weights)):
        lines.append(f"warning: these weights start new and are frozen, so they stay random: {', '.join(never)}")
    return lines


def apply_liger(model):
    """Exchange norms, rotary positions and gated layers for liger-kernel's; UserError for a family that it does not know."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # where liger itself would do nothing
        raise UserError(f"--liger: liger-kernel has nothing for a {model.config.model_type} model; leave it out")
    # Its cross-entropies stand in for a loss that transformers computes; this one is computed outside.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def count_partitioned(model):
    """Return how many parameters already are ZeRO-3 shards: all of them if zero.Init worked while loading."""
    return sum(hasattr(parameter, "ds_id") for parameter in model.parameters())
