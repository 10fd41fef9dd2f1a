"""What to change: the largest micro-batch that fits, and the smallest changes by which a run would fit at all."""

import dataclasses

from zerotune.plan.forecast import strategies_on

# In the order of what they cost: first what leaves every loss as it is, then what changes the training.
SAME_LOSSES = (
    ("the loss in 8 pieces", {"loss_chunks": 8}),
    ("activations computed again", {"gradient_checkpointing": True}),
    ("activations computed again, the loss in 8 pieces", {"gradient_checkpointing": True, "loss_chunks": 8}),
)
OTHER_TRAINING = (
    ("16 bits", {"mixed_precision": "bf16"}),
    ("optimizer states in 8 bits", {"optim": "adamw_bnb_8bit"}),
    ("an adapter in place of all weights", {"peft": "lora", "target_modules": ["all-linear"]}),
    ("an adapter on a base in 4 bits", {"peft": "lora", "target_modules": ["all-linear"], "quantize": "nf4", "double_quant": True}),
)


def cut(args, rows):
    """Return the flags of the same optimizer step in micro-batches of `rows`, a divisor of its rows on one process."""
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": total // rows}


def cuts(args, longest_row=1):
    """Return the ways to cut the same optimizer step, {flag: value} each, the smallest micro-batch first.

    By tokens, where there is a limit: it and its halves, down to the longest row.
    """
    if limit := args.max_tokens_per_micro_batch:
        sizes = [limit >> halvings for halvings in range(limit.bit_length()) if limit >> halvings >= longest_row]
        return [{"max_tokens_per_micro_batch": size} for size in reversed(sizes or [limit])]
    return [cut(args, rows) for rows in divisors(args.per_device_train_batch_size * args.gradient_accumulation_steps)]


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def candidates(args, longest_row=1):
    """Yield lists of (words, {flag: value}), the smallest changes first; of the changes in a list one is enough.

    Whatever the run has already is left out. longest_row: in tokens; no micro-batch may have less.
    """
    if tokens := args.max_tokens_per_micro_batch:
        sizes = [tokens // n for n in (2, 4, 8) if tokens // n >= longest_row]
        smaller = [(f"micro-batches of {size} tokens", {"max_tokens_per_micro_batch": size}) for size in sizes]
    else:
        rows = [n for n in reversed(divisors(args.per_device_train_batch_size)) if n < args.per_device_train_batch_size]
        smaller = [(f"micro-batches of {n}", cut(args, n)) for n in rows]
    same = [words for words in SAME_LOSSES if not (args.task == "classification" and "loss_chunks" in words[1])]
    yield smaller
    yield from ([change] for change in same)
    words, flags = smaller[-1] if smaller else ("", {})
    least = flags | {name: value for _, flags in same for name, value in flags.items()}
    everything = f"{words}, " * bool(smaller) + "and all that leaves the losses as they are"
    yield [(everything, least)]
    for words, flags in OTHER_TRAINING:
        if flags.get("mixed_precision") and args.mixed_precision != "no" or flags.get("peft") and args.peft:
            continue
        if not flags.get("optim") or args.optim.startswith("adamw_torch"):
            yield [(words, flags), (f"{words}, {everything}", least | flags)]


def smallest_changes(planner, machine, count=3):
    """Return [(words, {flag: value}, Forecast)] of the first changes by which a strategy fits, with the fastest that does."""
    found = []
    for alternatives in candidates(planner.args, planner.longest_row):
        for words, flags in alternatives:
            if all(getattr(planner.args, name) == value for name, value in flags.items()):
                continue
            changed = dataclasses.replace(planner.args, **flags)
            if best := fastest(planner.forecast(strategy, machine, changed) for strategy in strategies_on(machine)):
                found.append((words, flags, best))
                break
        if len(found) == count:
            break
    return found


def fastest(forecasts):
    """Return the forecast of most rows a second among those that fit, or None."""
    return max((f for f in forecasts if f.fits), key=lambda f: f.rows_per_second, default=None)


def largest_micro_batch(planner, strategy, machine, config=None):
    """Return (flags of the largest micro-batch that fits into the same step, its Forecast), or of the smallest if none does."""
    args, ways = planner.args, cuts(planner.args, planner.longest_row)
    low, high, best = 0, len(ways) - 1, None
    while low <= high:  # memory grows with the micro-batch
        middle = (low + high) // 2
        forecast = planner.forecast(strategy, machine, dataclasses.replace(args, **ways[middle]), config)
        if forecast.fits:
            best, low = (ways[middle], forecast), middle + 1
        else:
            high = middle - 1
    return best or (ways[0], planner.forecast(strategy, machine, dataclasses.replace(args, **ways[0]), config))
