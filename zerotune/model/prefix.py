"""The part of a model that is frozen and lies before all that learns: what comes out of it for a row is always the same.

For encoder-decoders it is the encoder, for others the blocks below the first one that learns. With its outputs at hand
(rows/prefix_states.py) it is not run at all.
"""

import contextlib
import inspect

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from zerotune.errors import UserError
from zerotune.model.freezing import block_lists, holds_weights, is_quantised, part_matcher

INPUT_DROPOUTS = "drop", "embed_dropout"  # of embeddings, beside the list of blocks (GPT-2, Phi)


def train_mode(model, frozen_eval):
    """Put a model into training mode; frozen_eval: but for what is frozen as a whole, which then has no dropout."""
    model.train()
    if not frozen_eval:
        return
    modules = dict(model.named_modules())
    for module in modules.values():
        if holds_weights(module) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    blocks = block_lists(model)
    embeddings = part_matcher(model, "embeddings", blocks)
    if not any(p.requires_grad for name, p in model.named_parameters() if embeddings(name)):
        for path in blocks:
            owner = modules[path.rpartition(".")[0]]
            for name in INPUT_DROPOUTS:
                if isinstance(getattr(owner, name, None), nn.Dropout):
                    getattr(owner, name).eval()


def frozen_prefix(model):
    """Return [the encoder], or the frozen blocks below the first that learns; raise UserError if there is no such part."""
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        learning = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        if learning:
            raise UserError(
                f"--cache_frozen: {len(learning)} tensors of the encoder learn, such as {learning[0]}; freeze all of it "
                "(--freeze encoder), or leave the cache out"
            )
        return [encoder]
    lists = block_lists(model)
    if len(lists) != 1:
        raise UserError(f"--cache_frozen: this model has {len(lists)} lists of blocks, and not one; leave it out")
    (path,) = lists
    embeddings = part_matcher(model, "embeddings", lists)
    if any(parameter.requires_grad for name, parameter in model.named_parameters() if embeddings(name)):
        raise UserError("--cache_frozen: the embeddings learn, from which all else follows; freeze them (--freeze embeddings ...)")
    blocks = model.get_submodule(path)
    first = next((n for n, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), len(blocks))
    if not first:
        raise UserError("--cache_frozen: the first block learns; freeze blocks from below (--freeze embeddings 'layers[:N]')")
    return list(blocks[:first])


def prefix_parameters(model, modules):
    """Return the parameters that a prefix's outputs follow from."""
    embeddings = part_matcher(model, "embeddings", block_lists(model))
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return [p for name, p in model.named_parameters() if id(p) in inside or embeddings(name)]


def own_parameters(model, modules):
    """Return the parameters that nothing but `modules` uses; T5's shared embedding, for one, is the decoder's as well."""
    inside = {id(module) for outer in modules for module in outer.modules()}
    owners = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(id(module) in inside)
    return [parameter for parameter, places in owners.items() if places == {True}]


class CachedPrefix:
    """A model whose frozen prefix is not run where its outputs for the rows are there.

    The model's forward takes `frozen_rows`: (this rank's rows of the batch, those of all ranks), int arrays, by which it reads and
    writes `states`. Without them it is as it was.
    """

    def __init__(self, model, unread=None, by_block=False):
        """model: before it is wrapped for training; raise UserError if it has no frozen prefix.

        unread: model/unread.py's, of what only the prefix uses. by_block: no more than a block of it is to be in memory.
        """
        self.modules, self.states = frozen_prefix(model), None
        self.whole = model.config.is_encoder_decoder
        self.passes = {"read": 0, "computed": 0}
        self.parameters = prefix_parameters(model, self.modules)
        self.own, self.on_device = own_parameters(model, self.modules), True
        self.unread, self.by_block = unread, by_block
        self.away = []  # tensors that have left the device
        self.given = self.computed = None  # of the present pass: the prefix's output as it was kept, or as it was computed
        if unread:
            self.leave_out(model)  # before they are passed by, or a module would read its weights to be passed by
        for number, module in enumerate(self.modules, 1):
            self.pass_by(module, is_last=number == len(self.modules))
        model_forward = model.forward

        def forward(*args, frozen_rows=None, **kwargs):
            if frozen_rows is None:
                return model_forward(*args, **kwargs)
            with self.of_rows(frozen_rows, kwargs):
                return model_forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(model_forward)
        model.forward = forward

    def keep_on_device(self, wanted, device):
        """Move what only the prefix uses to the device, or to the host; not quantised weights.

        Of ZeRO-3 the shards, which DeepSpeed takes from wherever they are (zero/partition_parameters.py:1360 and 1396). What is not
        read is let go of; a pass reads it by itself.
        """
        if wanted == self.on_device:
            return
        if not wanted:
            held = [getattr(parameter, "ds_tensor", parameter) for parameter in self.own if not is_quantised(parameter)]
            self.away = [tensor for tensor in held if tensor.device.type != "cpu"]
        for tensor in self.away:
            tensor.data = tensor.data.to(device if wanted else "cpu")
        if self.unread and not wanted:
            self.unread.leave(self.unread.types)
        self.on_device = wanted

    def leave_out(self, model):
        """Take what is not read out of the model's parameters; its blocks, and then the rest, read it when they run."""
        self.unread.take_out()
        self.own, self.on_device, left = [], False, set(self.unread.types)
        inside = {module for outer in self.modules for module in outer.modules()}
        blocks = [block for path in block_lists(model) for block in model.get_submodule(path) if block in inside]
        for module in dict.fromkeys([*blocks, *self.modules]):
            names = left.intersection(self.unread.within(module))
            self.read_before(module, names)
            left -= names

    def read_before(self, module, names):
        """Have a module of the prefix read weights when it runs."""
        module_forward = module.forward

        def forward(*args, **kwargs):
            self.unread.bring(names, device_of(args, kwargs))
            output = module_forward(*args, **kwargs)
            if self.by_block:
                self.unread.leave(names)
            return output

        forward.__signature__ = inspect.signature(module_forward)
        module.forward = forward

    def pass_by(self, module, is_last):
        """Have a module of the prefix return what is given in place of its output, and the last one keep what it computes."""
        module_forward = module.forward

        def forward(*args, **kwargs):
            if self.given is None:
                self.keep_on_device(True, device_of(args, kwargs))
                output = module_forward(*args, **kwargs)
                if is_last:
                    self.computed = output[0] if not isinstance(output, torch.Tensor) else output
                return output
            return BaseModelOutput(last_hidden_state=self.given) if self.whole else self.given

        forward.__signature__ = inspect.signature(module_forward)
        module.forward = forward

    @contextlib.contextmanager
    def of_rows(self, frozen_rows, inputs):
        """Around a pass over rows: give the model their states, or keep those that it computes."""
        own, of_all_ranks = frozen_rows
        known = self.states.there[of_all_ranks].all()  # alike on every rank: under ZeRO-3 each module is a collective
        mask, order = tokens_by_row(inputs)
        try:
            if known:
                states = self.states.read(own).to(mask.device)
                self.given = states.new_zeros(*mask.shape, states.shape[-1])
                self.given[mask] = torch.empty_like(states).index_copy_(0, order, states)
                if self.states.whole:
                    self.keep_on_device(False, mask.device)
            yield
            if not known:
                if self.computed.requires_grad:
                    raise UserError("--cache_frozen: something that learns lies below what is frozen; this model cannot be cached")
                self.states.write(own, self.computed.detach()[mask][order])
            self.passes["read" if known else "computed"] += 1
        finally:
            self.given = self.computed = None


def device_of(args, kwargs):
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).device


def tokens_by_row(inputs):
    """Return (which places of a batch hold tokens, a boolean mask; in which order these are the rows' tokens end to end)."""
    if "token_rows" in inputs:
        rows = inputs["token_rows"]
        mask = rows > 0
    else:
        mask = inputs["attention_mask"].bool()
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return mask, torch.argsort(rows[mask], stable=True)
