"""Which kernels compute attention (--attn_implementation), which of them a model has, and attention row by row of a packed line."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from zerotune.errors import UserError

BY_ROW = "sdpa_by_row"
SUPPORTED_BY = {  # transformers' name: the mark of a model class that has it
    "sdpa": "_supports_sdpa",
    BY_ROW: "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
# These skip what one row of a packed line would ask of another, so that a single long line costs no more than its rows.
VARIABLE_LENGTH = BY_ROW, "flash_attention_2", "flash_attention_3", "flex_attention"


def choose_attention(config, name, model_class, by_row=False):
    """Have models of this configuration compute attention by `name`, None: as transformers chooses; UserError if they cannot.

    model_class: None where it is only known once its own code runs, which then says what is wrong. by_row: without a name, and
    where the model can, each row of a packed line attends by itself. On a CPU a call for each costs nothing beside its products.
    """
    if name is None:
        if by_row and getattr(model_class, "_supports_sdpa", False):
            config._attn_implementation = BY_ROW
        return
    if name != "eager" and model_class is not None and not getattr(model_class, SUPPORTED_BY[name]):
        has = ", ".join(["eager", *(other for other, mark in SUPPORTED_BY.items() if getattr(model_class, mark))])
        raise UserError(f"--attn_implementation {name}: a {config.model_type} model does not have it; it has {has}")
    config._attn_implementation = name


def lines_of_packed(config):
    """Return into how many lines packed rows go: 1 where attention skips between rows; None: as many as cost least."""
    return 1 if config._attn_implementation in VARIABLE_LENGTH else None


def row_lengths(query_rows, key_rows):
    """Return what stands for a mask under `sdpa_by_row`: each row's tokens, int64 of shape (1, 1, rows, 2), queries and keys.

    query_rows, key_rows: which row a token is of, from 1, and 0 for padding at the end, int64 of shape (1, length).
    Four dimensions, because transformers hands such a mask on as it is.
    """
    (queries,), (keys,) = query_rows, key_rows
    order = queries.unique_consecutive()
    counts = [torch.bincount(rows, minlength=int(order.max()) + 1)[order[order > 0]] for rows in (queries, keys)]
    return torch.stack(counts, dim=1)[None, None].cpu()


def is_lengths(mask):
    """Tell whether a mask is the row lengths of a packed line; others are booleans or numbers that are added."""
    return mask is not None and mask.dtype == torch.int64


def sdpa_by_row(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, sliding_window=None, **kwargs
):
    """Attend row by row of a packed line, and as `sdpa` does to all others; transformers' interface of an attention function.

    query, key, value: (1, heads, length, head size); attention_mask: of `row_lengths`; position_bias: of `biases_of_rows`.
    """
    if not is_lengths(attention_mask):
        kwargs |= {"position_bias": position_bias, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    queries, keys = attention_mask[0, 0].T.tolist()
    masks = [window_of(length, sliding_window, query.device) for length in queries]
    if position_bias is not None and len(position_bias):
        heads = query.shape[1]
        biases = position_bias.split([heads * length * length for length in queries])
        masks = [bias.view(1, heads, length, length) for bias, length in zip(biases, queries, strict=True)]
    padding = query.shape[2] - sum(queries)
    parts = [
        part.split([*lengths, part.shape[2] - sum(lengths)], 2) for part, lengths in ((query, queries), (key, keys), (value, keys))
    ]
    rows = zip(*parts, masks, strict=False)  # what is left of the line is padding, which nobody reads
    output = torch.cat([sdpa_attention_forward(module, *row, dropout, scaling, **kwargs)[0] for row in rows], dim=1)
    return F.pad(output, (0, 0, 0, 0, 0, padding)) if padding else output, None


def window_of(length, size, device):
    """Return a row's causal mask of a sliding window of so many tokens, (1, 1, length, length); None: the row is within it."""
    if size is None or length <= size:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - size)[None, None]


def biases_of_rows(attention, lengths):
    """Return the relative biases of T5's attention for rows of so many tokens, end to end: (heads x sum of squared lengths,).

    Without such biases (cross-attention) they are empty. What a decoder's tokens may not see is the least number there is.
    """
    if not attention.has_relative_attention_bias:
        return torch.zeros(0)
    biases = attention.compute_bias(max(lengths), max(lengths))
    if attention.is_causal:
        unseen = torch.ones(biases.shape[2:], dtype=torch.bool, device=biases.device).triu(1)
        biases = biases.masked_fill(unseen, torch.finfo(biases.dtype).min)
    return torch.cat([biases[:, :, :length, :length].flatten() for length in lengths])


def bias_by_row(attention):
    """Give a T5 attention a forward that makes its biases row by row of a packed line, not for each pair of the line's tokens."""
    attention_forward = attention.forward

    def forward(hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        if position_bias is None and is_lengths(mask):
            position_bias = biases_of_rows(attention, mask[0, 0, :, 0].tolist())
        return attention_forward(hidden_states, mask=mask, key_value_states=key_value_states, position_bias=position_bias, **kwargs)

    attention.forward = forward


AttentionInterface.register(BY_ROW, sdpa_by_row)
AttentionMaskInterface.register(BY_ROW, sdpa_mask)
