"""Activations that are computed again, or wait on the host, instead of being kept, in such a way that frozen parts stay free."""

import re

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from zerotune.errors import UserError
from zerotune.model.freezing import block_lists

# For --gradient_checkpointing auto, in the order of how much is computed again: one block in four, one in two, all.
WAYS = (False, "every:4", "every:2", True)


def every_nth(value):
    """Return which share of blocks a --gradient_checkpointing names, N for one in N; 0: none. 'auto' is for the planner alone."""
    if isinstance(value, bool):
        return int(value)
    return int(re.fullmatch(r"every:(\d+)", value)[1])


def enable_gradient_checkpointing(model, every=1):
    """Recompute activations block by block in the backward pass, of one block in `every`, and nothing in a frozen prefix.

    transformers makes the embeddings' output require gradients whenever checkpointing is on, which only reentrant
    checkpointing needs; with it a frozen encoder would be recomputed and back-propagated in vain. Non-reentrant checkpointing
    follows the real graph: blocks that need no gradient are run once, and anything trainable below a block still gets its own.
    Blocks are counted in each list from its first one that has something to compute again.

    T5's attention (modeling_t5.py) has a switch of its own, which makes the zeros that it adds to the cross-attention's scores
    require gradients: frozen blocks would be recomputed for them, and CUDA's attention, of whose inputs only the zeros then do,
    fails in its backward pass ("LSE is not correctly aligned"). It is put back.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(model).__name__} does not support it")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
    blocks = [module for path in block_lists(model) for module in model.get_submodule(path)]
    for part in (part for block in blocks for part in block.modules() if part is not block):
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False
    if every == 1:
        return
    if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
        raise UserError(
            f"--gradient_checkpointing every:{every}: the blocks of a {type(model).__name__} have no switch of their own; use true"
        )
    for path in block_lists(model):
        of_list = list(model.get_submodule(path))
        first = next((n for n, block in enumerate(of_list) if any(p.requires_grad for p in block.parameters())), 0)
        for number, block in enumerate(of_list):
            block.gradient_checkpointing = (number - first) % every == 0


def offload_activations(model):
    """Have what the blocks' backward passes need of their forward passes wait in host memory, pinned where there is CUDA.

    By torch.autograd.graph.save_on_cpu, and not for what is there anyway: weights, masks and what several blocks are handed alike
    (an encoder's output, rotary positions). With checkpointing it is the blocks' inputs that leave. On a CPU nothing is moved.
    """
    for path in block_lists(model):
        for block in model.get_submodule(path):
            wait_on_host(block)


def to_host(tensor):
    return save_on_cpu(pin_memory=tensor.is_cuda).pack_hook(tensor)


def from_host(packed):
    return save_on_cpu(pin_memory=packed[0].type == "cuda").unpack_hook(packed)


def is_weight(tensor):
    """Tell whether what autograd saves is a weight, a view of one, or autocast's copy of one in 16 bits, which stays as well."""
    source = tensor if tensor._base is None else tensor._base  # autograd hands over views that are detached
    if isinstance(source, nn.Parameter):
        return True
    if source.grad_fn is None or source.grad_fn.name() != "ToCopyBackward0":
        return False
    return isinstance(getattr(source.grad_fn.next_functions[0][0], "variable", None), nn.Parameter)


def wait_on_host(block):
    """Give a block a forward whose saved tensors wait in host memory."""
    block_forward = block.forward

    def forward(*args, **kwargs):
        kept = {t.untyped_storage()._cdata for t in tree_leaves((args[1:], kwargs)) if isinstance(t, torch.Tensor)}

        def pack(tensor):
            stays = is_weight(tensor) or not tensor.is_floating_point() or tensor.untyped_storage()._cdata in kept
            return tensor if stays else to_host(tensor)

        with saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, torch.Tensor) else from_host(packed)):
            return block_forward(*args, **kwargs)

    block.forward = forward
