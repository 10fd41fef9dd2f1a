"""The contents of a checkpoint as one hash: what torch.save wrote differs from run to run where nothing in it does."""

import hashlib
from pathlib import Path

import torch


def update(digest, value, skip=()):
    """Feed a nest of dicts, lists, tensors and plain values into a hash."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in skip:
                digest.update(str(key).encode())
                update(digest, value[key], skip)
    elif isinstance(value, (list, tuple, set)):
        digest.update(f"{len(value)}".encode())
        for item in value:
            update(digest, item, skip)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        update(digest, vars(value), skip)
    else:
        digest.update(repr(value).encode())


def state_hash(folder, skip=(), only="*"):
    """Return the SHA-256 of all that the *.pt files of a checkpoint hold: weights, optimizer states, random states, counters."""
    digest, files = hashlib.sha256(), sorted(path for path in Path(folder).rglob("*.pt") if path.match(only))
    assert files, f"{folder} holds no state"
    for path in files:
        digest.update(path.name.encode())
        update(digest, torch.load(path, map_location="cpu", weights_only=False), skip)
    return digest.hexdigest()
