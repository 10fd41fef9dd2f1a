"""The state of a run by parameter name, whatever engine holds it: which elements of each parameter this rank keeps, and where.

One process and DDP keep whole parameters; ZeRO-1 and 2 a part of each group's flat float32 copy, which may begin and end inside a
parameter; ZeRO-3 a shard of each parameter. The optimizer's states lie beside the tensor that it steps. Places such as
zero/stage3.py:3154 are in deepspeed/runtime of DeepSpeed 0.19.8. Under tensor parallel a name says which piece of the layer it is.
"""

import contextlib
from dataclasses import dataclass

import torch

from zerotune.engine.optimizer import replay_bias_correction
from zerotune.engine.processes import unwrap
from zerotune.engine.tensor_parallel import piece_words

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of the flattened parameter `name`, which lie from `offset` on in `owner`.

    owner: the tensor that the optimizer steps, number `number` of this rank's; shape: of the whole parameter.
    """

    name: str
    shape: tuple
    start: int
    numel: int
    owner: torch.Tensor
    offset: int
    number: int

    def of(self, tensor):
        """Return this piece of the owner, or of a state of the owner's shape; a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def zero_optimizer(optimizer):
    """Return DeepSpeed's ZeRO optimizer inside accelerate's, None without DeepSpeed."""
    inner = optimizer.optimizer
    return None if isinstance(inner, torch.optim.Optimizer) else inner


def base_optimizer(optimizer):
    """Return the optimizer that holds the states, inside accelerate's and DeepSpeed's."""
    zero = zero_optimizer(optimizer)
    return optimizer.optimizer if zero is None else zero.optimizer


def pieces(model, optimizer):
    """Return the Pieces of the trainable parameters that this rank keeps, in the model's order."""
    zero, found, owners, of_layers = zero_optimizer(optimizer), [], {}, piece_words(model)
    for name, parameter in unwrap(model).named_parameters():
        if not parameter.requires_grad:
            continue
        shape, start, numel, offset = tuple(getattr(parameter, "ds_shape", parameter.shape)), 0, parameter.numel(), 0
        if zero is None:
            owner = parameter
        elif hasattr(parameter, "ds_id"):  # zero/stage3.py:3154; the last shards are padded
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            owner = zero.fp32_partitioned_groups_flat[group]
            start = torch.distributed.get_rank(zero.dp_process_group) * length
            numel = max(0, min(length, parameter.ds_numel - start))
        elif (mapping := parameter._hp_mapping) is not None:  # utils/tensor_fragment.py beside runtime
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            owner, offset = flat_groups(zero)[mapping.param_group_index], mapping.hp_fragment_address.start
        else:
            continue
        if numel:
            number = owners.setdefault(id(owner), len(owners))
            found.append(Piece(name + of_layers, shape, start, numel, owner, offset, number))
    return found


def flat_groups(zero):
    """Return this rank's flat float32 parts under ZeRO-1 and 2 (stage_1_and_2.py:829), or of BF16_Optimizer (bf16_optimizer.py)."""
    parts = getattr(zero, "single_partition_of_fp32_groups", None)
    return zero.fp32_groups_flat_partition if parts is None else parts


def states_of(optimizer, owner):
    """Return an owner's optimizer states: ({name: tensor of its shape}, {name: number}, {name: any other tensor})."""
    elements, numbers, others = {}, {}, {}
    for name, value in base_optimizer(optimizer).state.get(owner, {}).items():
        if not isinstance(value, torch.Tensor):
            numbers[name] = value
        elif value.ndim == 0:
            numbers[name] = value.item()
        else:
            (elements if value.shape == owner.shape else others)[name] = value
    return elements, numbers, others


def set_states(optimizer, states):
    """Give the optimizer its states: {id of an owner: {name: tensor or number}}; tensors become the optimizer's own."""
    base = base_optimizer(optimizer)
    with fp32_groups(zero_optimizer(optimizer)):
        numbers, groups = {}, []
        for group in base.param_groups:
            members = [numbers.setdefault(id(owner), len(numbers)) for owner in group["params"]]
            groups.append({name: value for name, value in group.items() if name != "params"} | {"params": members})
        content = {numbers[owner]: as_kept(base, values) for owner, values in states.items()}
        base.load_state_dict({"state": content, "param_groups": groups})
        owners = [owner for group in base.param_groups for owner in group["params"]]
    steps = [states[id(owner)].get("step", 0) for owner in owners if id(owner) in states]
    replay_bias_correction(base, [int(step) for step in steps])


def as_kept(base, values):
    """Return states with their numbers as the optimizer keeps them: torch's AdamW counts its steps in a float32 tensor."""
    if "step" not in values:
        return values
    step = values["step"]
    return values | {"step": torch.tensor(float(step)) if isinstance(base, torch.optim.AdamW) else int(step)}


@contextlib.contextmanager
def fp32_groups(zero):
    """Have ZeRO-3's optimizer see what it steps; between steps its groups are empty (zero/stage3.py:3551)."""
    hidden = hasattr(zero, "_set_fp32_optimizer_param_groups")
    if hidden:
        zero._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        if hidden:
            zero._clear_fp32_optimizer_param_groups()


@torch.no_grad()
def publish_weights(optimizer):
    """Make the weights that the passes use out of the float32 ones that were loaded; a collective under DeepSpeed."""
    zero = zero_optimizer(optimizer)
    if zero is None:
        return
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # gathered parameters back to shards, as before a load of DeepSpeed's own
    for used, master, group in zip(
        zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    ):
        used.copy_(master)  # zero/stage3.py:3573 to 3586
        for shard, part in zip(group, zero.unflatten(used, group), strict=True):
            shard.data = part.data
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()
    for parameter in zero.parameter_offload.module.parameters():
        parameter.ds_secondary_tensor = None  # hpZ's copies, of which DeepSpeed forgets those that are trained alone


def scaler_state(accelerator, optimizer):
    """Return fp16's loss scale as {"of": whose, "scale": now, ...: what else it counts}, None in another precision."""
    zero = zero_optimizer(optimizer)
    if accelerator.scaler is not None:
        state = accelerator.scaler.state_dict()
        return {"of": "torch", "scale": state["scale"], "state": state}
    if accelerator.mixed_precision != "fp16" or zero is None:
        return None
    counted = {name: value for name, value in vars(zero.loss_scaler).items() if isinstance(value, (bool, int, float))}
    return {"of": "DeepSpeed", "scale": float(zero.loss_scaler.cur_scale), "state": counted}


def set_scaler_state(accelerator, optimizer, saved):
    """Go on with a saved loss scale; between torch's scaler and DeepSpeed's the scale alone is carried over."""
    zero = zero_optimizer(optimizer)
    if saved is None:
        return
    if accelerator.scaler is not None:
        state = saved["state"] if saved["of"] == "torch" else accelerator.scaler.state_dict() | {"scale": saved["scale"]}
        accelerator.scaler.load_state_dict(state)
    elif accelerator.mixed_precision == "fp16" and zero is not None:
        vars(zero.loss_scaler).update(saved["state"] if saved["of"] == "DeepSpeed" else {"cur_scale": saved["scale"]})
