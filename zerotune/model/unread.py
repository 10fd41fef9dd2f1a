"""Frozen weights that stay in the model's safetensors files until a pass through them, or final/, wants them.

Meanwhile they are no parameters of the model but tensors without memory in their places, so that no engine sends, shards or
converts them.
"""

import contextlib
import functools
import gc
import re

import torch
from safetensors import safe_open
from torch import nn


class Unread:
    """Weights that a model has under the same names as its files."""

    def __init__(self, types, stored):
        """types: {name: type in which the run has it, such as "bfloat16"}. stored: loading.stored_names of the model."""
        self.types = {name: getattr(torch, word) for name, word in types.items()}
        self.stored, self.places = stored, {}

    @contextlib.contextmanager
    def left_out(self, model_class):
        """Around from_pretrained: the model is made without these weights, so they are neither loaded nor begun anew."""
        made = model_class.__init__

        @functools.wraps(made)
        def without(model, *args, **kwargs):
            made(model, *args, **kwargs)
            modules, paths = dict(model.named_modules()), {name: name.rpartition(".") for name in self.types}
            self.places = {name: (modules[module], attribute) for name, (module, _, attribute) in paths.items()}
            self.take_out()
            model._keys_to_ignore_on_load_unexpected |= {f"^{re.escape(name)}$" for name in self.types}
            for name in self.types:  # declared tied, and stored apart
                model.all_tied_weights_keys.pop(name, None)

        model_class.__init__ = without
        try:
            yield
        finally:
            model_class.__init__ = made

    def take_out(self):
        """Leave a tensor on the meta device in place of each parameter."""
        for module, name in self.places.values():
            parameter = module._parameters.pop(name)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            setattr(module, name, torch.empty(shape, dtype=parameter.dtype, device="meta"))
            getattr(module, name)._is_hf_initialized = True  # transformers would begin it anew

    def put_in(self):
        """Make parameters of the tensors on the meta device, for what decides what learns."""
        for module, name in self.places.values():
            empty = getattr(module, name)
            delattr(module, name)
            setattr(module, name, nn.Parameter(empty))
        gc.collect()  # the shards of ZeRO-3's parameters, which refer to themselves

    def read(self, name):
        """Return a weight on the host, mapped from its file if that has the run's type."""
        return read_tensor(self.stored, name).to(self.types[name])

    def within(self, module):
        """Return the names of those of a module and of all in it."""
        inside = set(module.modules())
        return [name for name, (owner, _) in self.places.items() if owner in inside]

    def bring(self, names, device):
        """Read those that are not there into their places."""
        for name in names:
            module, attribute = self.places[name]
            if getattr(module, attribute).is_meta:
                setattr(module, attribute, self.read(name).to(device))

    def leave(self, names):
        """Let go of them."""
        for name in names:
            module, attribute = self.places[name]
            setattr(module, attribute, torch.empty_like(getattr(module, attribute), device="meta"))

    @property
    def num_bytes(self):
        """How much they would be in the run."""
        return sum(getattr(*self.places[name]).numel() * dtype.itemsize for name, dtype in self.types.items())

    def values(self):
        """Return {name: weight on the host} of all."""
        return {name: self.read(name) for name in self.types}


def read_tensor(stored, name):
    """Return a tensor of a model's files, mapped, None if they have none of this name; stored: their loading.stored_names."""
    if name not in stored:
        return None
    with safe_open(stored[name], framework="pt") as file:
        return file.get_tensor(name)
