"""Models without memory: on the meta device, where they get adapters and rules as in a run, then with tensors that only pretend.

What a checkpoint decides and a configuration does not say (a head that is stored apart although it is declared tied) is not seen.
"""

import contextlib
import copy

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import initialization
from transformers.integrations import deepspeed as integration

from zerotune.errors import UserError
from zerotune.model.attention import VARIABLE_LENGTH
from zerotune.model.loading import AUTO_CLASSES
from zerotune.model.quantization import prepare_quantized


def empty_model(config, task, dtype, quantization=None, num_labels=None):
    """Return the model of a configuration on the meta device: classes, names, shapes and ties, no values.

    quantization: transformers' configuration of it, or None. UserError for int8, whose layers only get their form from values.
    """
    config, stored_in = copy.deepcopy(config), config.dtype
    if config._attn_implementation in VARIABLE_LENGTH:  # they keep what sdpa keeps, and cannot run without their GPU
        config._attn_implementation = "sdpa"
    if num_labels is not None:
        config.num_labels = num_labels
    with unsharded(), torch.device("meta"), initialization.no_init_weights():
        model = AUTO_CLASSES[task].from_config(config, dtype=dtype)
    model.tie_weights()
    model.checkpoint_dtype = stored_in
    return model if quantization is None else quantized(model, quantization)


@contextlib.contextmanager
def unsharded():
    """Have transformers make whole models inside a run under ZeRO-3, where it would shard each over all ranks, a collective."""
    active, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active


def quantized(model, quantization):
    """Exchange linear layers as bitsandbytes' quantizer in transformers does on loading (quantizers/quantizer_bnb_4bit.py)."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    if quantization.load_in_8bit:
        raise UserError("--quantize int8: cannot be planned, as bitsandbytes gives 8-bit layers their form in the first pass")
    kept = quantization.llm_int8_skip_modules or get_keys_to_not_convert(model)
    kept = [*kept, *(model._keep_in_fp32_modules or [])]
    model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization)
    for module in four_bit_layers(model):
        codes = module.weight.numel() // 2 // quantization.bnb_4bit_quant_storage.itemsize
        shape, parameter = module.weight.shape, module.weight
        parameter.data = torch.empty(codes, 1, dtype=quantization.bnb_4bit_quant_storage, device="meta")
        parameter.quant_state = empty_state(shape, quantization)
        parameter.bnb_quantized = True
    model.is_loaded_in_4bit = True
    return prepare_quantized(model)


def four_bit_layers(model):
    """Return the layers whose weights are four-bit codes."""
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def empty_state(shape, quantization, device="meta"):
    """Return what bitsandbytes keeps beside the codes of a weight (functional.py, quantize_4bit): scales of blocks of 64 weights.

    Doubly quantised scales are bytes, with float32 scales of 256 of them.
    """
    from bitsandbytes.functional import QuantState

    def floats(*sizes):
        return torch.empty(sizes, device=device)

    blocks = -(-shape.numel() // 64)
    kind = {"quant_type": quantization.bnb_4bit_quant_type, "dtype": quantization.bnb_4bit_compute_dtype}
    common = {"shape": shape, "code": floats(16), "blocksize": 64, **kind}
    if not quantization.bnb_4bit_use_double_quant:
        return QuantState(absmax=floats(blocks), **common)
    inner = QuantState(absmax=floats(-(-blocks // 256)), code=floats(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
    return QuantState(absmax=absmax, offset=floats(), state2=inner, **common)


def states_of(parameter):
    """Return the tensors beside a four-bit weight's codes, as (the object that holds it, its name)."""
    state = getattr(parameter, "quant_state", None)
    holders = [holder for holder in (state, getattr(state, "state2", None)) if holder is not None]
    return [(holder, name) for holder in holders for name, value in vars(holder).items() if isinstance(value, torch.Tensor)]


def pretend(model):
    """Give a model on the meta device tensors that claim to lie on the CPU; call it inside `fake_tensors`."""
    made = {}

    def fake_of(tensor):
        if id(tensor) not in made:
            fake = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                if hasattr(tensor, "quant_state"):
                    fake.quant_state = tensor.quant_state
            made[id(tensor)] = fake, tensor  # and the old one is kept, or another could get its number
        return made[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake_of(tensor)
                    for holder, part in states_of(tensors[name]):
                        setattr(holder, part, fake_of(getattr(holder, part)))
    return model


def fake_tensors():
    """Return the mode under which tensors have shapes and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)
