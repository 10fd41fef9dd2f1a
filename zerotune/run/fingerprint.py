"""What decides the mathematics of a run, and how it is laid out over processes, for comparison on resume.

Another mathematics is refused unless the change is accepted by name; another layout is gone on with and said.
"""

from zerotune.flags import MATHEMATICS, names_deciding
from zerotune.run.arguments import FIXED, LED_TO_BY, Arguments
from zerotune.run.records import sha256_of


def fingerprint(args, config, data, schedule):
    """Return {what: value} of plain JSON values: flags declared as MATHEMATICS, and what the others lead to."""
    facts = {f"--{name}": getattr(args, name) for name in names_deciding(Arguments, MATHEMATICS)}
    model = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    facts |= {"model configuration": sha256_of(model), "warm-up steps": schedule.warmup_steps}
    if args.lr_scheduler_type != "constant" or args.peft == "adalora":
        facts["steps of the schedule"] = schedule.max_steps  # a constant rate can be kept up for longer
    facts |= {"training rows": f"{data.digest('train')}, {len(data.rows['train'])} rows", "labels": data.labels}
    return facts | {"rows a step": schedule.rows_per_step}


def layout(args, strategy):
    """Return {what: value} of what changes where and how a run computes, and no number of it but for rounding."""
    facts = {"strategy": strategy.stem, "processes": strategy.num_processes}
    return facts | {
        name: getattr(args, name)
        for name in (
            *LED_TO_BY["rows a step"],
            "max_tokens_per_micro_batch",
            "attn_implementation",
            "gradient_checkpointing",
            "loss_chunks",
            "packing",
            "reduce",
            "torch_compile",
        )
    }


def compare(saved, present, accepted, folder):
    """Return (lines of what is refused, lines of what is accepted) for two fingerprints; accepted: names of --accept_change."""
    refused, changes = [], []
    defaults = {f"--{name}": value for name, value in vars(Arguments()).items()}  # of flags that the saved run did not know yet
    for name in sorted(saved.keys() | present.keys()):
        was, now = saved.get(name, defaults.get(name)), present.get(name)
        flags = LED_TO_BY.get(name, [name.removeprefix("--")] if name.startswith("--") else [])
        flags = [flag for flag in flags if flag not in FIXED]
        if was == now:
            continue
        if set(flags) & set(accepted):
            changes.append(f"{name} {was!r} -> {now!r}")
            continue
        line = f"{folder}: {name} was {was!r} and is {now!r}; go on with the same, or start over in another --output_dir"
        refused.append(line + (f", or allow it: --accept_change {flags[0]}" if flags else ""))
    return refused, changes


def moved(saved, present):
    """Return words for each entry of two layouts that differs; a flag that the saved run did not know yet has its default."""
    before = vars(Arguments()) | saved
    return [f"{name} {before.get(name)} -> {value}" for name, value in present.items() if before.get(name) != value]
