"""Which kernels compute attention (--attn_implementation), and which of them a model has."""

from zerotune.errors import UserError

SUPPORTED_BY = {  # transformers' name: the mark of a model class that has it
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
# These skip what one row of a packed line would ask of another, so that a single long line costs no more than its rows.
VARIABLE_LENGTH = "flash_attention_2", "flash_attention_3", "flex_attention"


def choose_attention(config, name, model_class):
    """Have models of this configuration compute attention by `name`, None: as transformers chooses; UserError if they cannot.

    model_class: None where it is only known once its own code runs, which then says what is wrong.
    """
    if name is None:
        return
    if name != "eager" and model_class is not None and not getattr(model_class, SUPPORTED_BY[name]):
        has = ", ".join(["eager", *(other for other, mark in SUPPORTED_BY.items() if getattr(model_class, mark))])
        raise UserError(f"--attn_implementation {name}: a {config.model_type} model does not have it; it has {has}")
    config._attn_implementation = name


def lines_of_packed(config):
    """Return into how many lines packed rows go: 1 where attention skips between rows; None: as many as cost least."""
    return 1 if config._attn_implementation in VARIABLE_LENGTH else None
