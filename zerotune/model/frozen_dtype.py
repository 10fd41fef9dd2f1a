"""Frozen weights of linear layers in the precision in which they are used: half of their bytes, and not another bit of any loss.

Outside DeepSpeed weights are float32 and autocast rounds those of linear layers to 16 bits in each pass. What does not learn and
was 16 bits in its checkpoint can stay so. Embeddings and norms compute in float32 under autocast, so they are left alone.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LAYERS = nn.Linear, Conv1D


def narrow_frozen(model, args):
    """Convert the frozen weights of linear layers that lose nothing by it to the training precision.

    model: in float32, with its adapters; its `checkpoint_dtype` is what it was stored in, by which models without values are
    judged. A tensor that some other module uses as well (a tied embedding) stays, as do all under DoRA and AdaLoRA, which compute
    with the weights.
    """
    precision, model.num_narrowed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision), 0
    stored_so = precision is not None and getattr(model, "checkpoint_dtype", None) == precision
    if not stored_so or args.quantize or args.peft in ("dora", "adalora"):
        return
    users = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(type(module))
    for parameter, kinds in users.items():
        if parameter.requires_grad or parameter.dtype != torch.float32 or not all(kind in LAYERS for kind in kinds):
            continue
        small = parameter.detach().to(precision)
        if parameter.is_meta or torch.equal(small.float(), parameter):
            parameter.data = small
            model.num_narrowed += 1


def widened(model, state):
    """Return a state dict as it is loaded: in float32 what narrow_frozen has converted."""
    if not getattr(model, "num_narrowed", 0):
        return state
    return {name: tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor for name, tensor in state.items()}
