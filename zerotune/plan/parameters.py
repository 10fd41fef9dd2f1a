"""The parameters of a model and what optimizers hold for them: bytes by category, computed from shapes.

The formulas are those of the pinned libraries, read in their source at the places that are named.
"""

from dataclasses import dataclass
from math import prod

from zerotune.engine.optimizer import BITSANDBYTES
from zerotune.errors import UserError
from zerotune.model.freezing import is_quantised

WEIGHTS, FROZEN, GATHERED = "weights", "frozen weights", "gathered weights"
GRADIENTS, OPTIMIZER, BUCKETS = "gradients", "optimizer states", "buckets"
REDUCTION, STEP, LOCAL = "reduction transients", "step transients", "local gradients"
CATEGORIES = (WEIGHTS, FROZEN, GATHERED, GRADIENTS, LOCAL, OPTIMIZER, BUCKETS, REDUCTION, STEP)

FLOAT32, FLOAT64 = 4, 8  # bytes of an element


@dataclass(frozen=True)
class Parameter:
    """A parameter as the model is loaded: its whole shape, bytes of an element, and whether it is trained.

    quantised: by bitsandbytes; shape and itemsize are then those of the codes as they are stored, and its scales are among the
    other bytes.
    """

    name: str
    shape: tuple
    itemsize: int
    learns: bool
    quantised: bool = False

    @property
    def numel(self):
        return prod(self.shape)

    @property
    def decayed(self):
        """Tell in which of the optimizer's groups it is (zerotune/engine/optimizer.py, parameter_groups)."""
        return len(self.shape) >= 2


def parameters_of(model):
    """Return the Parameters of a torch model, tied ones once, whether it is sharded by ZeRO-3, without memory, or neither."""
    found = []
    for name, parameter in model.named_parameters():
        shard = getattr(parameter, "ds_tensor", parameter)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        found.append(Parameter(name, shape, shard.element_size(), parameter.requires_grad, is_quantised(parameter)))
    return found


def optimizer_states(optim, shapes, itemsize, cuda):
    """Return (device, host) bytes that an optimizer keeps for tensors of these shapes; itemsize: bytes of their elements.

    optim: --optim, or "cpu" for DeepSpeedCPUAdam. bitsandbytes' 8-bit states are a code an element (AdamW: two) and a float32 scale
    for each 256 of each; tensors of fewer than 4096 elements have float32 ones (bitsandbytes/optim/optimizer.py:502-531).
    """
    if optim == "muon":
        raise UserError("--optim muon: its memory is not modelled")
    sizes = [prod(shape) for shape in shapes]
    if optim == "cpu":  # two moments, and a counter that is a number (deepspeed/ops/adam/cpu_adam.py:161)
        return 0, 2 * itemsize * sum(sizes)
    if optim == "adafactor":  # rows and columns of the last two dimensions (transformers/optimization.py:1237)
        factored = [prod(s[:-1]) + prod(s[:-2]) * s[-1] if len(s) > 1 else prod(s) for s in shapes]
        return FLOAT32 * sum(factored), 0
    if optim not in BITSANDBYTES:  # two moments and a float32 counter, on the host unless fused (torch/optim/adam.py:168-184)
        counters = FLOAT32 * len(sizes)
        on_host = counters if cuda and optim == "adamw_torch" else 0
        return 2 * itemsize * sum(sizes) + counters - on_host, on_host
    device, host, count = 0, 0, 1 if "lion" in optim else 2
    eight_bits = [size >= 4096 and not optim.endswith("_32bit") for size in sizes]
    for size, small in zip(sizes, eight_bits, strict=True):
        moments = count * size * (1 if small else FLOAT32)
        if optim.startswith("paged") and cuda and size >= 1e5:  # in memory that CUDA moves out when it is short (line 383)
            host += moments
        else:
            device += moments
        device += count * FLOAT32 * -(-size // 256) * small
    return device + count * 256 * FLOAT32 * any(eight_bits), host  # with one table of the codes' values for each moment


def optimizer_temporaries(optim, shapes, itemsize, cuda):
    """Return the bytes that an optimizer takes on top while it steps over one group of tensors.

    On CUDA the fused and the bitsandbytes kernels take none; torch's other AdamW makes one square root of the whole group
    (torch/optim/adam.py:790). On a CPU it goes through the tensors one by one and makes two, while that of the tensor before is
    still there (line 544); so does Adafactor everywhere (transformers/optimization.py:1261). bitsandbytes has five float32 tensors
    of a parameter's size on a CPU, Lion with a float32 state three (bitsandbytes/backends/cpu/ops.py:417-424, 498-514).
    """
    sizes = [prod(shape) for shape in shapes]
    one_by_one = max(2 * size + before for size, before in zip(sizes, [0, *sizes], strict=False))
    if optim == "adafactor":
        return FLOAT32 * one_by_one
    if optim == "adamw_torch":
        return itemsize * (sum(sizes) if cuda else one_by_one)
    if optim in BITSANDBYTES and not cuda:
        return (3 if optim == "lion_32bit" else 5) * FLOAT32 * max(sizes)
    return 0


def optimizer_groups(parameters):
    """Return the trainable Parameters as the optimizer's groups, decayed first, empty ones left out."""
    groups = [[p for p in parameters if p.learns and p.decayed == decayed] for decayed in (True, False)]
    return [group for group in groups if group]


def pinned(size, pin):
    """Return the bytes of a host tensor: pinned, torch rounds it to a power of two (ATen/core/CachingHostAllocator.h:302)."""
    return 1 << (int(size) - 1).bit_length() if pin and size else size
