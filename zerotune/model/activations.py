"""Activations that are computed again instead of kept, in such a way that frozen parts stay free."""

from zerotune.errors import UserError


def enable_gradient_checkpointing(model):
    """Recompute activations block by block in the backward pass, and nothing in a frozen prefix.

    transformers makes the embeddings' output require gradients whenever checkpointing is on, which only reentrant
    checkpointing needs; with it a frozen encoder would be recomputed and back-propagated in vain. Non-reentrant checkpointing
    follows the real graph: blocks that need no gradient are run once, and anything trainable below a block still gets its own.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(model).__name__} does not support it")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
