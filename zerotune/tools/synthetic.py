"""Models and rows of any size without a download: random weights of a given configuration, texts of an exact number of tokens."""

import json
import random
from pathlib import Path

import torch
import transformers

from zerotune.errors import UserError, nearest
from zerotune.model.loading import AUTO_CLASSES

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>", "<s>"]  # numbers 0 to 3


def save_tokenizer(folder, num_words):
    """Write a tokenizer that knows the words w0, w1, ... and gives each one token, with </s> at the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(num_words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)


def build_model(folder, task, settings, dtype=torch.float32, seed=0):
    """Write a model with random weights; settings: {"model_type": "llama", "hidden_size": ...} as in a config.json.

    Raises UserError for a model type or a setting that transformers does not know.
    """
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(f"model_type {kind!r}: transformers has none of this name{nearest(str(kind), transformers.CONFIG_MAPPING)}")
    config_class = transformers.CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {})}
    if unknown := [f"{key!r}: no setting of a {kind} model{nearest(key, known)}" for key in settings if key not in known]:
        raise UserError(*unknown)
    common = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    if task == "seq2seq":
        common["decoder_start_token_id"] = 0
    torch.manual_seed(seed)
    config = config_class(**(common | settings))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        AUTO_CLASSES[task].from_config(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(previous)
    save_tokenizer(folder, min(config.vocab_size - len(SPECIAL_TOKENS), 1000))


def build_rows(path, num_rows, source_tokens, target_tokens, seed=0):
    """Write {source, target} rows; each length is a number, or [least, most]: many short ones and a few long, as texts are."""
    generator = random.Random(seed)

    def text(length):
        if not isinstance(length, int):
            least, most = length
            length = least + int((most - least) * generator.random() ** 2)
        return " ".join(f"w{generator.randrange(1000)}" for _ in range(max(1, length - 1)))  # and the end token

    with open(Path(path), "w") as file:
        for _ in range(num_rows):
            file.write(json.dumps({"source": text(source_tokens), "target": text(target_tokens)}) + "\n")
