"""The allocations of a step, before anything is allocated: the real model class, on tensors that have shapes and no memory.

The forward and backward passes run under torch's FakeTensorMode with train.py's own loss, freezing, adapters, checkpointing and
precision; each storage that appears and disappears is an event. What the optimizer and ZeRO hold is counted in states.py.
"""

import contextlib
import dataclasses
import weakref
from dataclasses import dataclass, field

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from zerotune.errors import UserError
from zerotune.model import activations
from zerotune.model.loading import decoder_inputs
from zerotune.plan.empty import states_of
from zerotune.plan.parameters import pinned

GRADIENT, LOGITS, ACTIVATION, COPY = "gradients", "logits", "activations", "converted weights"


@dataclass
class Trace:
    """Blocks that come and go in a step; events: (block, bytes) as it is allocated, (-block, bytes) as it is freed, in order."""

    events: list = field(default_factory=list)
    categories: dict = field(default_factory=dict)  # block -> one of the four above
    host_bytes: int = 0  # of activations that wait there, pinned, of the micro-batch with most
    flops: int = 0  # of its matrix products, what is recomputed counted again

    def peak(self, leave_out=(), beside=None, num_bytes=1):
        """Return {category: bytes} at the moment when most is allocated.

        leave_out: categories that are not counted. beside: a function from the share of the gradients that have come, 0 to 1, to
        {category: bytes} of what an engine holds at that moment; num_bytes: of all gradients (later passes add to the first one's).
        """
        live, most, at_peak, total, come = {}, -1, {}, 0, 0
        extra = beside(0.0) if beside else {}
        for block, size in self.events:
            category = self.categories[abs(block)]
            if category == GRADIENT and block > 0 and beside:
                come += size
                extra = beside(min(1.0, come / num_bytes))
            if category in leave_out:
                continue
            change = size if block > 0 else -size
            live[category] = live.get(category, 0) + change
            total += change
            if total + sum(extra.values()) > most:
                most, at_peak = total + sum(extra.values()), extra | live
        return at_peak


def flops_of(function, args, kwargs, result):
    """Return an operator's FLOPs as torch counts them, 0 for all that is no matrix product."""
    if formula := flop_registry.get(function.overloadpacket):
        return formula(*args, **kwargs, out_val=result)
    if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    return 0


class Recorder(TorchDispatchMode):
    """Notes each storage that an operator makes, and when it is freed."""

    def __init__(self, num_words, padded):
        """num_words: the size of the vocabulary, by which logits are known; padded: what a mask answers when it is asked."""
        super().__init__()
        self.trace, self.num_words, self.padded = Trace(), num_words, padded
        self.live, self.count, self.parameters = {}, 0, set()
        self.waiting = 0  # bytes on the host

    def ignore(self, tensors):
        """Take the storages of these tensors, the model's own, for no event."""
        for tensor in tensors:
            self.live[tensor.untyped_storage()._cdata] = None
            self.parameters.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            return not self.padded  # the one question that models ask of values: are all positions of a mask real?
        result = self.in_parts(function, args, kwargs)
        if result is None:
            result = function(*args, **kwargs)
        self.trace.flops += flops_of(function, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, function, args)
        return result

    def in_parts(self, function, args, kwargs):
        """Return what an operator gives that allocates more, or less, than its result; None for all others."""
        if function is torch.ops.aten.add.Tensor and not kwargs:
            return accumulated(*args)
        if function.namespace == "bitsandbytes" and function is torch.ops.bitsandbytes.gemm_4bit.default:
            with self:  # bitsandbytes/backends/default/ops.py
                return four_bit_product(*args, **kwargs)
        return None

    def note(self, tensor, function, args):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or storage.nbytes() == 0:
            return
        self.count += 1
        self.live[key] = self.count
        self.trace.events.append((self.count, storage.nbytes()))
        self.trace.categories[self.count] = self.category(tensor, function, args)
        weakref.finalize(storage, self.free, key, storage.nbytes())

    def category(self, tensor, function, args):
        if tensor.ndim > 1 and tensor.shape[-1] == self.num_words and tensor.is_floating_point():
            return LOGITS
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        converts = function is torch.ops.aten._to_copy.default and source is not None
        return COPY if converts and source.untyped_storage()._cdata in self.parameters else ACTIVATION

    def free(self, key, size):
        block = self.live.pop(key)
        self.trace.events.append((-block, size))

    def is_gradient(self, parameter):
        """Take note that what has come to be this parameter's gradient is one; a hook after its accumulation."""
        block = self.live.get(parameter.grad.untyped_storage()._cdata)
        if block:
            self.trace.categories[block] = GRADIENT


def accumulated(tensor, other, *_):
    """Return the sum of two gradients that meet, in the place of the earlier, as autograd makes it; None if it does not.

    autograd adds in place where it holds the only reference (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace), but
    never for tensors without memory, for which it would hold both and the sum.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(other, torch.Tensor):
        return None  # not in a backward pass, or in a forward pass that it repeats
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return None
    # The tensor itself and this look at its storage are the two that hold it.
    alone = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2
    return torch.ops.aten.add_.Tensor(tensor, other) if alone else None


def four_bit_product(
    rows, codes, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):
    """Return a product with four-bit weights, which are decoded for it as a whole."""
    if absmax_8bit is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, blocksize, quant_type, shape, rows.dtype)
    return torch.nn.functional.linear(rows, weight, bias)


class WithoutAttentionDropout(TorchFunctionMode):
    """A GPU's attention kernels drop out inside; the CPU's, which is traced, would hold the whole matrix of weights for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.nn.functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


@contextlib.contextmanager
def masks_are_asked():
    """Have transformers look at masks as in a run: it takes tensors without values for a graph's and keeps every mask."""
    from transformers import masking_utils  # brings torch's compiler along, as every model's file does

    original = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = original


@contextlib.contextmanager
def as_on_gpu(recorder):
    """Have activations that would wait on the host leave, which on a CPU, where the trace is made, are there already."""
    originals = activations.to_host, activations.from_host

    def to_host(tensor):
        recorder.waiting += pinned(tensor.numel() * tensor.element_size(), True)
        recorder.trace.host_bytes = max(recorder.trace.host_bytes, recorder.waiting)
        return tensor.shape, tensor.dtype

    def from_host(packed):
        tensor = torch.empty(packed[0], dtype=packed[1])
        recorder.waiting -= pinned(tensor.numel() * tensor.element_size(), True)
        return tensor

    activations.to_host, activations.from_host = to_host, from_host
    try:
        with WithoutAttentionDropout():
            yield
    finally:
        activations.to_host, activations.from_host = originals


def tensors_of(model):
    """Return the tensors that a model holds: parameters, buffers, and the scales of four-bit weights."""
    scales = [getattr(holder, name) for parameter in model.parameters() for holder, name in states_of(parameter)]
    return [*model.parameters(), *model.buffers(), *scales]


def batch_of(model, config, task, shape):
    """Return (a batch as the collator makes it, its labels) of a shape, without values."""
    ids = torch.zeros(shape.rows, shape.source_length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "classification":
        return batch, torch.zeros(shape.rows, dtype=torch.int64)
    labels = torch.zeros(shape.rows, shape.target_length or shape.source_length, dtype=torch.int64)
    batch["use_cache"] = False
    if task == "seq2seq":
        batch["decoder_input_ids"] = decoder_inputs(model, config)(labels)
    return batch, labels


def trace_step(model, config, task, shapes, forward_loss, *, autocast=None, chunked=False, on_gpu=False):
    """Return the Trace of forward and backward passes over micro-batches of these shapes, one after the other, as a step does.

    model: of `empty_model`, trainable as the run's is. autocast: the dtype of mixed precision outside DeepSpeed, or None.
    UserError for a model whose work depends on values, which are not there.
    """
    recorder = Recorder(config.get_text_config().vocab_size, any(shape.padded for shape in shapes))
    recorder.ignore(tensors_of(model))
    hooks = [p.register_post_accumulate_grad_hook(recorder.is_gradient) for p in model.parameters() if p.requires_grad]
    device = as_on_gpu(recorder) if on_gpu else contextlib.nullcontext()
    if autocast is not None:  # as Accelerator.prepare_model does it
        forward = model.forward
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=autocast)(forward))
    try:
        with device, masks_are_asked(), torch.compiler.set_stance("force_eager"), recorder:
            for shape in shapes:
                recorder.padded = shape.padded
                batch, labels = batch_of(model, config, task, shape)
                loss, _ = forward_loss(model, batch, labels, chunked=chunked)
                (loss * (1 / 7)).backward()
                del batch, labels, loss
        return dataclasses.replace(recorder.trace, events=[*recorder.trace.events])  # gradients are there when a step begins
    except (NotImplementedError, RuntimeError) as error:  # what asks for values, or knows no tensors without memory
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"a {config.model_type} model cannot be planned for --task {task}, without values ({reason})") from None
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
        if autocast is not None:
            model.forward = forward
