"""A fingerprint of the weights that do not learn, which no checkpoint holds: the same however they are laid out."""

import hashlib

import torch

from zerotune.engine.processes import unwrap

ROW = 1 << 16  # elements that share a factor
CHUNK = 16 * ROW  # elements looked at together: some 25 MB beside the weights
MIXING = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number; odd


def frozen_checksum(accelerator, model, dtype, parameters=None):
    """Return the precision and 16 hexadecimal digits that change with any frozen weight, None if nothing is frozen; a collective.

    parameters: a list of those that count; None: all.

    dtype: the training precision. Without DeepSpeed the weights are float32 whatever it is, and are compared as rounded to it.

    A sum modulo 2^64, over all pairs of bytes, of their value times a factor that depends on their place: a sum can be made of any
    shards in any order, as a cryptographic digest cannot. It tells different weights by mistake, not by malice.
    """
    counted = None if parameters is None else {id(parameter) for parameter in parameters}
    named = unwrap(model).named_parameters()
    frozen = [(name, p) for name, p in named if not p.requires_grad and (counted is None or id(p) in counted)]
    if not frozen:
        return None
    total = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    sharded = any(hasattr(parameter, "ds_tensor") for _, parameter in frozen)
    for name, parameter in frozen if sharded or accelerator.is_main_process else ():
        weights, start = getattr(parameter, "ds_tensor", parameter).detach().flatten(), 0
        if sharded:  # the last shards are padded with whatever was in memory
            start = accelerator.process_index * weights.numel()
            weights = weights[: max(0, parameter.ds_numel - start)]
        if weights.dtype == torch.float32:
            weights = weights.to(dtype)
        total += checksum_of(name, weights, start).to(total.device)
    total = accelerator.reduce(total, reduction="sum") if accelerator.num_processes > 1 else total
    return checksum_words(dtype, total)


def checksum_words(dtype, total):
    """Return a whole checksum in words; total: the sum of its parts."""
    return f"{str(dtype).removeprefix('torch.')} {total.item() % (1 << 64):016x}"


def checksum_of(name, weights, start=0):
    """Return a flat tensor's part of a checksum, an int64 scalar; weights: those of parameter `name` from element `start` on."""
    first = start * weights.element_size() // 2
    return checksum(byte_pairs(weights), first, int.from_bytes(hashlib.sha256(name.encode()).digest()[:3]))


def byte_pairs(tensor):
    """Return a flat tensor's bytes as int16, a single last byte with a zero."""
    content = tensor.contiguous().view(torch.uint8)
    if content.numel() % 2:
        content = torch.cat([content, content.new_zeros(1)])
    return content.view(torch.int16)


def checksum(values, first, salt):
    """Return the sum of int16 values times the factors of their places, from `first` on; salt: below 2^24, of their tensor."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    within = factors(torch.arange(ROW, device=values.device))
    for begin in range(0, values.numel(), CHUNK):
        part = values[begin : begin + CHUNK]
        lead = (first + begin) % ROW
        rows = torch.nn.functional.pad(part, (lead, -(lead + part.numel()) % ROW)).view(-1, ROW).long()
        numbers = torch.arange(len(rows), device=values.device) + (first + begin) // ROW
        total += ((rows * within).sum(1) * factors(numbers + (salt << 32))).sum()
    return total


def factors(numbers):
    """Return an odd 64-bit factor for each int64 number: two rounds of multiplying and folding, as splitmix64 does."""
    mixed = numbers
    for _ in range(2):
        mixed = (mixed + 1) * MIXING
        mixed = mixed ^ (mixed >> 31)
    return mixed | 1
