"""Token-exact loss: sums over target tokens, divided once by the number of target tokens of the whole step.

A mean of per-batch means weighs a token by the company it keeps: cut the same rows into other micro-batches and the update
changes. A sum divided by one global count does not depend on the cut.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from zerotune.errors import UserError

# What happens to the head's output is known and tested for these; others may scale or cap it in ways of their own.
CHUNKABLE = set("t5 mt5 umt5 bart mbart gpt2 llama mistral phi phi3 qwen2 qwen3 gemma gemma2".split())
IGNORE = -100  # the label of a position that is no target; torch's cross_entropy skips it by default


def count_targets(batch):
    """Return the number of target positions in a collated batch, a Python int, from its CPU labels."""
    return int((batch["labels"] != IGNORE).sum())


def forward_loss(model, batch, labels, chunked=False):
    """Run the model, prepared or not, on a batch and return its summed loss, a float32 scalar.

    chunked: the model has been through chunk_loss, and its logits never exist as a whole.
    """
    if chunked:
        return model(**batch, loss_labels=labels)["loss_sum"]
    logits = model(**batch).logits
    if labels.ndim > 1:
        logits = logits[:, -labels.shape[1] :]  # prompt tuning puts positions of its own in front
    return token_loss_sum(logits, labels)


def token_loss_sum(logits, labels):
    """Return the summed cross-entropy of the labelled positions, a float32 scalar on the logits' device.

    logits: (batch, length, vocabulary) or (batch, classes); labels: (batch, length) or (batch,), -100 where there is no
    target. The collator has already shifted the labels of causal models, so that position i predicts labels[i].
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def chunk_loss(model, num_chunks):
    """Give a language model, before it is wrapped for training, a forward that returns {"loss_sum"} when called with loss_labels.

    Its head and the cross-entropy then run over num_chunks pieces of the positions, each recomputed in the backward pass: the
    largest tensor is (positions / num_chunks, vocabulary). The number of pieces does not depend on the rows, not even where a
    rank has no target at all: under ZeRO-3 each piece gathers the head's weights, a collective. Without loss_labels the model
    is as it was. Raises UserError for a family whose logits are more than the head's output in a way that is not known here.
    """
    config = model.config.get_text_config()
    if config.model_type not in CHUNKABLE:
        raise UserError(
            f"--loss_chunks: not known to be exact for a {config.model_type} model; it is for {', '.join(sorted(CHUNKABLE))}"
        )
    head = model.get_output_embeddings()
    model_forward, head_forward = model.forward, head.forward
    bias, cap = getattr(model, "final_logits_bias", None), getattr(config, "final_logit_softcapping", None)
    hidden_states = None  # a list while the model runs for its hidden states alone

    def head_or_nothing(hidden):
        if hidden_states is None:
            return head_forward(hidden)
        hidden_states.append(hidden)  # exactly what the head would get: T5 has scaled it by now
        return hidden.new_empty(0, 1)

    def piece(hidden, labels):
        logits = head(hidden)
        if bias is not None:  # BART
            logits = logits + bias
        if cap is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return token_loss_sum(logits, labels)

    def forward(*args, loss_labels=None, **kwargs):
        nonlocal hidden_states
        if loss_labels is None:
            return model_forward(*args, **kwargs)
        hidden_states = []
        try:
            model_forward(*args, **kwargs)
            (hidden,) = hidden_states
        finally:
            hidden_states = None
        hidden = hidden[:, -loss_labels.shape[1] :].flatten(0, 1)
        pieces = zip(hidden.tensor_split(num_chunks), loss_labels.flatten().tensor_split(num_chunks), strict=True)
        sums = [checkpoint(piece, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pieces]
        return {"loss_sum": torch.stack(sums).sum()}

    forward.__signature__ = inspect.signature(model_forward)  # generate() reads which inputs there are
    model.forward, head.forward = forward, head_or_nothing
