"""What decides the mathematics of a run, for comparison on resume; what only logs, evaluates or saves is not in it."""

from zerotune.flags import MATHEMATICS, names_deciding
from zerotune.run.arguments import Arguments
from zerotune.run.records import sha256_of


def fingerprint(args, strategy, config, data, schedule):
    """Return {what: value} of plain JSON values: flags declared as MATHEMATICS, and what the others lead to."""
    facts = {f"--{name}": getattr(args, name) for name in names_deciding(Arguments, MATHEMATICS)}
    model = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    facts |= {"model configuration": sha256_of(model), "warm-up steps": schedule.warmup_steps}
    if args.lr_scheduler_type != "constant" or args.peft == "adalora":
        facts["steps of the schedule"] = schedule.max_steps  # a constant rate can be kept up for longer
    facts |= {"training rows": f"{data.digests['train']}, {len(data.rows['train'])} rows", "labels": data.labels}
    return facts | {"strategy": strategy.summary, "processes": strategy.num_processes}
