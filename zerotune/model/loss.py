"""Token-exact loss: sums over target tokens, divided once by the number of target tokens of the whole step.

A mean of per-batch means weighs a token by the company it keeps: cut the same rows into other micro-batches and the update
changes. A sum divided by one global count does not depend on the cut.
"""

import inspect

import torch
import torch.nn.functional as F

from zerotune.errors import UserError
from zerotune.rows import IGNORE

# What happens to the head's output is known and tested for these; others may scale or cap it in ways of their own.
CHUNKABLE = set("t5 mt5 umt5 bart mbart gpt2 llama mistral phi phi3 qwen2 qwen3 gemma gemma2".split())


def count_targets(batch):
    """Return the number of target positions in a collated batch, a Python int, from its CPU labels."""
    return int((batch["labels"] != IGNORE).sum())


def token_losses(logits, labels):
    """Return the cross-entropy of each label, float32 of labels' shape on the logits' device, 0 where there is no target.

    logits: (batch, length, vocabulary) or (batch, classes); labels: (batch, length) or (batch,), -100 where there is no
    target. The collator has already shifted the labels of causal models, so that position i predicts labels[i].
    """
    losses = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(labels.shape)


def by_source(losses, labels, sources, count):
    """Return the summed losses and the number of targets of each source, float64 (2, count); a device's work, nothing is read.

    losses, labels, sources (the number of the source of each label): of one shape. Summed in one order, unlike index_add_ on GPUs.
    """
    sources = sources.to(losses.device, non_blocking=True).flatten()
    values = torch.stack([losses.flatten().double(), (labels != IGNORE).flatten().double()])
    return torch.stack([torch.where(sources == number, values, 0).sum(1) for number in range(count)], dim=1)


def chunk_loss(model, num_chunks):
    """Give a language model, before it is wrapped for training, a forward that gives {"loss_sum", "losses"} for loss_labels.

    Its head and the cross-entropy then run over num_chunks pieces of the positions: the largest tensor is (positions / num_chunks,
    vocabulary), and nothing is computed twice. Without loss_labels the model is as it was. However few targets a rank has, the
    head is called once: under ZeRO-3 the call gathers its weights, a collective.

    Raises UserError for a head that is no plain linear layer, and for a family whose logits may be more than the head's output.
    """
    config = model.config.get_text_config()
    if config.model_type not in CHUNKABLE:
        raise UserError(
            f"--loss_chunks: not known to be exact for a {config.model_type} model; it is for {', '.join(sorted(CHUNKABLE))}"
        )
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft's copy of it, which learns as a whole
        head = head.modules_to_save["default"]
    if type(head) is not torch.nn.Linear:
        raise UserError(
            f"--loss_chunks: the head is a {type(head).__name__}, and it is for a plain linear layer; leave the head out of the "
            "adapter's targets, or leave out --loss_chunks"
        )
    cap = getattr(config, "final_logit_softcapping", None)
    model_forward, head_forward = model.forward, head.forward
    hidden_states = None  # a list while the model runs for its hidden states alone

    def losses_of(logits, labels):
        # BART's bias, looked up each time: moving the model to a GPU makes another tensor of a buffer.
        if (bias := getattr(model, "final_logits_bias", None)) is not None:
            logits = logits + bias
        if cap is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return token_losses(logits, labels)

    def headless(hidden, labels=None):
        if labels is not None:
            return LossInPieces.apply(losses_of, num_chunks, torch.is_grad_enabled(), labels, hidden, head.weight, head.bias)
        if hidden_states is None:
            return head_forward(hidden)
        hidden_states.append(hidden)  # exactly what the head would get: T5 has scaled it by now
        return hidden.new_empty(0, 1)

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
        loss_sum, losses = head(hidden, loss_labels.flatten())
        return {"loss_sum": loss_sum, "losses": losses.view(loss_labels.shape)}

    forward.__signature__ = inspect.signature(model_forward)  # generate() reads which inputs there are
    model.forward, head.forward = forward, headless


class LossInPieces(torch.autograd.Function):
    """The summed loss of a linear head, whose gradients are taken piece by piece while the logits of the piece are there.

    The loss is the end of the graph, so its gradient is a mere factor, which backward multiplies in (as in Hsu et al. 2024,
    Liger Kernel): the head's products are done once, where checkpointing would repeat them. In fp16 this means that a loss scale
    reaches everything but these products.
    """

    @staticmethod
    def forward(ctx, losses_of, num_chunks, learning, labels, hidden, weight, bias):
        """losses_of: (logits, labels) -> losses; labels: (positions,); hidden: (positions, width); weight, bias: the head's."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.dtypes = [t if t is None else t.dtype for t in (hidden, weight, bias)]
        need_hidden, need_weight, need_bias = needs = [learning and need for need in ctx.needs_input_grad[4:]]
        product = weight.to(dtype)  # once, where autocast would convert it for each piece
        grad_rows, losses = [], []
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for rows, targets in zip(hidden.tensor_split(num_chunks), labels.tensor_split(num_chunks), strict=True):
            rows = rows.to(dtype)
            logits = F.linear(rows, product, bias if bias is None else bias.to(dtype))
            if not any(needs):
                losses.append(losses_of(logits, targets))
                continue
            with torch.enable_grad():
                piece = losses_of(logits.requires_grad_(), targets)
                (grad,) = torch.autograd.grad(piece.sum(), logits)
            losses.append(piece.detach())
            if need_hidden:
                grad_rows.append(grad @ product)
            if need_weight and weight.dtype == dtype:
                torch.addmm(grad_weight, grad.t(), rows, out=grad_weight)
            elif need_weight:
                grad_weight += grad.t() @ rows  # summed in the precision that the weight's gradient has
            if need_bias:
                grad_bias += grad.sum(0)
        ctx.gradients = [torch.cat(grad_rows) if need_hidden else None, grad_weight, grad_bias]
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, factor, _):
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.to(dtype).mul_(factor) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, None, *scaled
