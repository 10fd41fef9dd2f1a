"""The state in a checkpoint: a file of safetensors for each rank, whose tensors are named by parameter and place.

`weight/<first element>/<parameter>` is a run of elements of a flattened parameter in float32, `<state>/<first element>/<parameter>`
the same elements of an optimizer state; any number of processes under any strategy finds in them what it needs. A state that is not
cut like its parameter (the scales of 8 bits) lies whole under `whole:<state>/<number>/<parameter or rank>`; where parameters are
not whole it is of use to the same layout alone.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open

from zerotune.engine.pieces import WEIGHT, pieces, publish_weights, set_states, states_of, zero_optimizer
from zerotune.engine.processes import unwrap
from zerotune.engine.tensor_parallel import num_pieces, piece_words
from zerotune.errors import UserError

BUFFER, WHOLE = "buffer", "whole:"
DTYPES = {  # the format's names: huggingface.co/docs/safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def file_name(rank):
    return f"state-{rank:05d}.safetensors"


# ---- writing ---------------------------------------------------------------------------------------------------------


def shares(found, num_processes, rank):
    """Return the part of DDP's pieces, which all ranks have, that one rank writes: whole parameters, about as many bytes each."""
    loads, mine = [0] * num_processes, []
    for piece in sorted(found, key=lambda piece: -piece.numel):
        least = loads.index(min(loads))
        loads[least] += piece.numel
        if least == rank:
            mine.append(piece)
    return mine


def undivided(accelerator, optimizer, rank):
    """Return how this layout names states that are not cut like their parameter: '' where parameters are whole."""
    if accelerator.state.deepspeed_plugin is None:
        return ""
    family = "shards" if hasattr(zero_optimizer(optimizer), "fp32_partitioned_groups_flat") else "groups"
    return f"{family} {rank} of {accelerator.num_processes}"


def settled_part(accelerator, parameter):
    """Return (first element, flat tensor) of a frozen parameter that this rank keeps; a whole one the main process writes."""
    if hasattr(parameter, "ds_id"):
        shard = parameter.ds_tensor.detach().view(-1)
        start = accelerator.process_index * shard.numel()
        return start, shard[: max(0, parameter.ds_numel - start)]
    return 0, parameter.detach().view(-1)


def tensors_to_save(accelerator, model, optimizer, settled=()):
    """Return ({name in the file: tensor on its device}, metadata) of what this rank writes; nothing is copied.

    settled: names of frozen parameters that have learned before.
    """
    found, label = pieces(model, optimizer), undivided(accelerator, optimizer, accelerator.process_index)
    if not label:
        found = shares(found, accelerator.num_processes, accelerator.process_index)
    tensors, numbers = {}, {}
    for piece in found:
        place = f"{piece.start}/{piece.name}"
        elements, numbers[piece.name], others = states_of(optimizer, piece.owner)
        tensors[f"{WEIGHT}/{place}"] = piece.of(piece.owner)
        tensors |= {f"{kind}/{place}": piece.of(state) for kind, state in elements.items()}
        owner = f"{piece.number}/{label or piece.name}"
        tensors |= {f"{WHOLE}{kind}/{owner}": state.detach() for kind, state in others.items()}
    shapes = {p.name: p.shape for p in found}
    for name, parameter in unwrap(model).named_parameters():
        if name in settled and (accelerator.is_main_process or hasattr(parameter, "ds_id")):
            start, part = settled_part(accelerator, parameter)
            shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if part.numel():
                tensors[f"{WEIGHT}/{start}/{name}"] = part
    if accelerator.is_main_process:
        tensors |= {f"{BUFFER}/0/{name}": buffer for name, buffer in persistent_buffers(unwrap(model)).items()}
    return tensors, {"shapes": json.dumps(shapes), "numbers": json.dumps(numbers)}


def persistent_buffers(model):
    """Return {name: buffer} of those that a state_dict holds; the others are constants, in the precision of an engine."""
    return {
        f"{module_name}.{name}".lstrip("."): buffer
        for module_name, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def write(path, tensors, metadata):
    """Write tensors as a safetensors file, one after the other, and sync it; return {"bytes", "sha256"} of what was written.

    The format has no writer that streams: its own wants all bytes in host memory at once, beside the tensors.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each begins at its own alignment
    header, place = {"__metadata__": metadata}, 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        entry = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [place, place + size]}
        header[name], place = entry, place + size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    digest, total = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for name in [None, *names]:
            part = len(content).to_bytes(8, "little") + content
            if name is not None:
                part = memoryview(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy())
            digest.update(part)
            total += len(part)
            while part:  # a write may be a part of what was asked for
                part = part[file.write(part) :]
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}


# ---- reading ---------------------------------------------------------------------------------------------------------


class SavedState:
    """A checkpoint's state by parameter name; only the bytes that are asked for are read."""

    def __init__(self, folder):
        self.folder, self.shapes, self.numbers, self.whole = folder, {}, {}, {}
        self.places = defaultdict(dict)  # parameter: {state: [(first element, number of them, file, name in it)]}
        for path in sorted(Path(folder).glob("state-*.safetensors")):
            file = safe_open(path, framework="pt")
            metadata = file.metadata()
            self.shapes |= {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            self.numbers |= json.loads(metadata["numbers"])
            for name in file.keys():  # noqa: SIM118  a safetensors file is no dict
                kind, start, parameter = name.split("/", 2)
                if kind.startswith(WHOLE):
                    self.whole[name] = file
                else:
                    size = math.prod(file.get_slice(name).get_shape())
                    self.places[parameter].setdefault(kind, []).append((int(start), size, file, name))
        for kinds in self.places.values():
            for found in kinds.values():
                found.sort(key=lambda place: place[0])

    def parts(self, kind, parameter, start=0, numel=1 << 62):
        """Yield (offset from start, tensor) of the saved runs of elements that lie in [start, start + numel), in their order."""
        for first, size, file, name in self.places.get(parameter, {}).get(kind, ()):
            begin, end = max(start, first), min(start + numel, first + size)
            if begin < end:
                yield begin - start, file.get_slice(name)[begin - first : end - first]

    def fill(self, target, kind, parameter, start=0):
        """Copy elements from `start` on into a one-dimensional tensor; UserError if some are not there."""
        filled = 0
        for offset, part in self.parts(kind, parameter, start, target.numel()):
            target[offset : offset + part.numel()].copy_(part)
            filled += part.numel()
        if filled != target.numel():
            raise UserError(f"{self.folder}: it holds {filled} of {target.numel()} elements of {kind} of {parameter}")

    def optimizer_states(self, parameter):
        """Return {name: dtype} of the optimizer states that are cut like a parameter."""
        found = {kind: next(self.parts(kind, parameter))[1].dtype for kind in self.places[parameter]}
        return {kind: dtype for kind, dtype in found.items() if kind not in (WEIGHT, BUFFER)}

    def digest(self):
        """Return the SHA-256 of weights, optimizer states and step counts by parameter name, however they are cut into files."""
        digest = hashlib.sha256()
        for parameter, kinds in sorted(self.places.items()):
            for kind in sorted(kinds):
                digest.update(f"{kind} {parameter} {self.shapes.get(parameter)}".encode())
                for _, part in self.parts(kind, parameter):
                    digest.update(part.contiguous().view(-1).view(torch.uint8).numpy())
        for parameter, numbers in sorted(self.numbers.items()):
            digest.update(f"{parameter} {sorted((name, float(value)) for name, value in numbers.items())}".encode())
        for name in sorted(self.whole):
            digest.update(name.encode())
            digest.update(self.whole[name].get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load(accelerator, model, optimizer, folder, new=frozenset(), settled=frozenset()):
    """Restore weights, buffers and optimizer states from a verified checkpoint, each rank what it keeps; a collective.

    new: names of what begins to learn here, without states. settled: of what has learned before and is frozen; its weights alone
    are restored. UserError, with nothing changed, if other parameters learn here or states cannot be cut for this layout.
    """
    saved, found = SavedState(folder), pieces(model, optimizer)
    check(saved, accelerator, model, optimizer, new, settled)
    label, states, owners = undivided(accelerator, optimizer, accelerator.process_index), defaultdict(dict), {}
    for piece in found:
        owners[str(piece.number) if label else piece.name] = piece.owner
        if piece.name in saved.shapes:
            saved.fill(piece.of(piece.owner), WEIGHT, piece.name, piece.start)
        if piece.name in new:
            continue
        own = states[id(piece.owner)]
        for kind, dtype in saved.optimizer_states(piece.name).items():
            if kind not in own:
                own[kind] = torch.zeros_like(piece.owner, dtype=dtype, requires_grad=False)
            saved.fill(piece.of(own[kind]), kind, piece.name, piece.start)
        own |= saved.numbers[piece.name]
    for name, file in saved.whole.items():
        kind, number, where = name.removeprefix(WHOLE).split("/", 2)
        if where == label or not label:
            owner = owners[number if label else where]
            states[id(owner)][kind] = file.get_tensor(name).to(owner.device)
    set_states(optimizer, states)
    with torch.no_grad():
        for name, parameter in unwrap(model).named_parameters():
            if name in settled:
                start, part = settled_part(accelerator, parameter)
                saved.fill(part, WEIGHT, name, start)
        for name, buffer in persistent_buffers(unwrap(model)).items():
            for _, content in saved.parts(BUFFER, name):
                buffer.copy_(content.view(buffer.shape))
    publish_weights(optimizer)


def check(saved, accelerator, model, optimizer, new, settled):
    """Raise UserError unless a state can be loaded here: the same parameters learn, and no state is in blocks cut otherwise."""
    own, named = piece_words(model), unwrap(model).named_parameters()
    cut, here = {num_pieces(name) for name in saved.shapes}, num_pieces(own)
    if cut - {here}:
        raise UserError(
            f"{saved.folder}: its layers are cut into {max(cut)} piece(s), and here into {here}; go on under the "
            "tensor_parallel.autotp_size that it was saved under"
        )
    theirs = {name: shape for name, shape in saved.shapes.items() if name.endswith(own)}
    here = {n + own: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named if p.requires_grad or n in settled}
    for name in sorted((here.keys() | theirs.keys()) - (new - theirs.keys())):
        if here.get(name) != theirs.get(name):
            shapes = ["not there" if shape is None else f"of shape {list(shape)}" for shape in (theirs.get(name), here.get(name))]
            raise UserError(f"{saved.folder}: {name} is {shapes[0]} in it and {shapes[1]} here; go on with the model it is of")
    allowed = {undivided(accelerator, optimizer, rank) for rank in range(accelerator.num_processes)}
    for name in saved.whole:
        kind, _, where = name.removeprefix(WHOLE).split("/", 2)
        if where not in allowed and not ("" in allowed and where in here):
            raise UserError(
                f"{saved.folder}: {kind} of its optimizer is in blocks that this layout does not have; go on under the strategy "
                "and the number of processes that it was saved under"
            )
