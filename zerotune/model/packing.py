"""Several rows in one line of a batch, each seeing itself alone: masks and positions that begin anew with every row.

token_rows and target_rows say which row each token of a line belongs to: 1, 2, ... and 0 for padding, which is a row of its own.
"""

import inspect

import torch
from torch import nn

from zerotune.errors import UserError
from zerotune.model.attention import BY_ROW, VARIABLE_LENGTH, bias_by_row, row_lengths

# For these it is tested against padded batches, losses and gradients (tests/test_packing.py).
DECODERS = set("gpt2 llama mistral phi phi3 qwen2 qwen3 gemma gemma2".split())
ENCODER_DECODERS = set("t5 mt5 bart mbart".split())


def check_packable(config):
    """Raise UserError for a family for which packing is not known to be exact."""
    known = DECODERS | ENCODER_DECODERS
    if config.get_text_config().model_type not in known:
        raise UserError(f"--packing: not known to be exact for a {config.model_type} model; it is for {', '.join(sorted(known))}")


def places_in_rows(rows):
    """Return each token's place in its row, from 0, and 0 for padding; rows: which row a token is of, int64 (lines, length)."""
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    places = places - torch.where(begins, places, 0).cummax(1).values
    return torch.where(rows == 0, 0, places)  # padding may be longer than a model has positions


def same_row(queries, keys):
    """Return a boolean mask (lines, 1, queries, keys): True where both are of one row. Padding sees all: it must see something."""
    return ((queries[:, :, None] == keys[:, None, :]) | (queries == 0)[:, :, None])[:, None]


def pack_forward(model):
    """Give a model, before it is wrapped for training, a forward that takes token_rows (encoder-decoders: and target_rows).

    Without them the model is as it was. Decoders need positions that begin anew and no mask: from these transformers makes the mask
    itself, sliding windows included (masking_utils.py, find_packed_sequence_indices). Encoder-decoders need three masks, and their
    encoder is called first, because one attention_mask would have to be the encoder's and the cross-attention's. Attention row by
    row takes the rows' lengths in place of each mask.

    Raises UserError for a family that is not known, and for attention that would not see these masks for what they are: an
    encoder-decoder's eager attention adds booleans, its flash attention takes none. A decoder's flash attention knows packed rows
    in batches of one line (modeling_flash_attention_utils.py, _is_packed_sequence), which attention.lines_of_packed sees to.
    """
    check_packable(model.config)
    attention = model.config._attn_implementation
    known = ("sdpa", BY_ROW) if model.config.is_encoder_decoder else ("sdpa", "eager", *VARIABLE_LENGTH)
    if attention not in known:
        raise UserError(
            f"--packing: {attention} attention would not keep the rows of this model apart; it needs {' or '.join(known)}"
        )
    model_forward, positions = model.forward, None
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    by_row = attention == BY_ROW
    mask_of = row_lengths if by_row else same_row
    for module in model.modules() if by_row else ():
        if hasattr(module, "compute_bias"):  # T5's
            bias_by_row(module)

    def learned_positions(embedding):
        embedding_forward = embedding.forward

        def forward(*args, **kwargs):
            if positions is None:
                return embedding_forward(*args, **kwargs)
            return nn.Embedding.forward(embedding, positions + embedding.offset)

        embedding.forward = forward

    if encoder is not None:
        for part in (encoder, model.get_decoder()):
            if hasattr(part, "embed_positions"):  # BART's; T5's are relative, and the same wherever a row begins
                learned_positions(part.embed_positions)

    def forward(*args, token_rows=None, target_rows=None, **kwargs):
        nonlocal positions
        if token_rows is None:
            return model_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # peft names every input, most of them None
        if encoder is None:
            mask = {"attention_mask": mask_of(token_rows, token_rows)} if by_row else {}
            return model_forward(*args, **kwargs, **mask, position_ids=places_in_rows(token_rows))
        pairs = (token_rows, token_rows), (target_rows, target_rows), (target_rows, token_rows)
        masks = [mask_of(*rows) for rows in pairs]
        if not by_row:
            masks[1] &= torch.ones_like(masks[1]).tril()
        try:
            positions = places_in_rows(token_rows)
            hidden = encoder(input_ids=kwargs.pop("input_ids"), attention_mask=masks[0])
            positions = places_in_rows(target_rows)
            given = {"decoder_attention_mask": masks[1], "attention_mask": masks[2], "encoder_outputs": hidden}
            return model_forward(*args, **kwargs, **given)
        finally:
            positions = None

    forward.__signature__ = inspect.signature(model_forward)  # generate() reads which inputs there are
    model.forward = forward


def check_exact(padded, packed, precision, flag="--packing", what="packed than padded"):
    """Raise UserError unless the targets of the same rows have the same losses both ways, by this very model.

    padded, packed: the losses, float32 (targets,), in one order; their L2 distance counts, beside the padded ones' norm.
    """
    # Rounding alone is 1e-6 in float32. In 16 bits a logit of 20 is rounded by 0.05, and a target's loss of 1 with it.
    allowed = 1e-4 if precision == torch.float32 else 2**-4
    apart = float((packed - padded).norm() / padded.norm())
    if not apart <= allowed:
        raise UserError(
            f"{flag}: this model gives the targets of two rows other losses {what}, {apart:.2g} of their size apart "
            f"(allowed: {allowed:.2g}); train it without"
        )
