"""Will it fit, and which strategy? Memory by category for every strategy, before a launch, without weights and without a GPU.

    python -m zerotune plan --num_gpus 8 --gpu A100 --task causal --model_name_or_path DIR --train_file rows.jsonl ...

takes train.py's flags beside its own. The folder needs a config.json alone; with --train_file and a tokenizer the micro-batches are
those that the rows make, without them the largest that --max_source_length and --max_target_length allow. The loss and what learns
are train.py's own functions.
"""

import dataclasses
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import UserError, nearest
from zerotune.flags import HARMLESS, flag
from zerotune.run.arguments import Arguments, check_arguments
from zerotune.run.groups import GROUPS
from zerotune.run.parsing import parse

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class PlanArguments:
    title = "plan"
    num_gpus: int | None = flag(None, "GPUs of the run, over all nodes. Default: this machine's, or 1.", HARMLESS, unit="gpus")
    gpus_per_node: int | None = flag(None, "GPUs of a node. Default: this machine's, or up to 8.", HARMLESS, unit="gpus")
    gpu: str | None = flag(None, "A known GPU in place of this machine's: A100, H100, L4, T4, ...", HARMLESS, unit="name")
    gpu_memory_gib: float | None = flag(None, "Memory of a GPU.", HARMLESS, unit="gib")
    host_memory_gib: float | None = flag(None, "Memory of a node. Default: this machine's.", HARMLESS, unit="gib")
    nvme_gib: float | None = flag(None, "Free space for NVMe offload on a node. Default: no limit.", HARMLESS, unit="gib")
    strategy: list[str] = flag([], "Plan these strategies alone. Default: all.", HARMLESS, unit="name")
    json: bool = flag(False, "Print JSON, sizes in bytes.", HARMLESS)
    plot: str | None = flag(None, "Also draw stacked bars into this PNG file.", HARMLESS, unit="file")


def main(words):
    usage = "python -m zerotune plan --model_name_or_path DIR [--num_gpus N --gpu NAME ...] [train.py's flags]"
    values = parse((PlanArguments, *GROUPS), words, usage, "Predict memory and speed of every strategy.")
    own = {field.name: values.pop(field.name) for field in dataclasses.fields(PlanArguments)}
    shown, plot, strategies = own.pop("json"), own.pop("plot"), own.pop("strategy")
    args = Arguments(**values)
    problems = check_arguments(args, required=("model_name_or_path",))

    from zerotune.plan.machine import planned_machine  # after the flags, as torch takes seconds to import

    try:
        machine = planned_machine(**own)
    except UserError as error:
        problems += error.problems
    from zerotune.plan.forecast import STRATEGIES
    from zerotune.plan.report import plan_lines

    unknown = [name for name in strategies if name not in STRATEGIES]
    problems += [f"--strategy {name}: not known{nearest(name, STRATEGIES)}; allowed: {', '.join(STRATEGIES)}" for name in unknown]
    if problems:
        raise UserError(*problems)
    facts, lines = plan_lines(planner_of(args), machine, flags_of_train(words, own), strategies)
    print(json.dumps(facts, indent=2, default=str) if shown else "\n".join(lines))
    if plot:
        draw(facts, machine, plot)
    return 0 if facts.get("fastest") else 1


def planner_of(args):
    """Return the Planner of train.py's flags, with the lengths of the rows if there are any."""
    from zerotune.model import loading
    from zerotune.plan.forecast import Planner
    from zerotune.rows.data import Data

    script = runpy.run_path(str(ROOT / "train.py"))
    functions = script["forward_loss"], script["make_trainable"]
    if not (args.train_file or args.dataset_name):
        return Planner(args, loading.load_config(args), *functions, NoTokenizer())
    config, tokenizer = loading.load_config_and_tokenizer(args)
    named = [name for name in config.id2label.values() if not str(name).startswith("LABEL_")]
    data = Data(args, tokenizer, named, loading.max_positions(config))
    return Planner(args, config, *functions, tokenizer, data)


class NoTokenizer:
    """Stands for a tokenizer where there are no rows: trainable tokens are then new ones."""

    def add_tokens(self, tokens):
        return len(tokens)

    def get_vocab(self):
        return {}

    def convert_tokens_to_ids(self, token):
        return 0


def flags_of_train(words, own):
    """Return the words of a command line that are train.py's, without the planner's and their values."""
    kept, skip = [], False
    names = {*own, "json", "plot", "strategy"}
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            skip = name in names or name == "no_json"
            if skip:
                continue
        elif skip:
            continue
        kept.append(word)
    return kept


def draw(facts, machine, path):
    """Draw the GPU's memory by category as stacked bars, a strategy each, with the GPU's limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from zerotune.plan.machine import GIB
    from zerotune.plan.report import COLUMNS

    bars = [f for f in facts["forecasts"] if not f["problem"]]
    figure, axes = pyplot.subplots(figsize=(10, 0.55 * len(bars) + 1.8), layout="constrained")
    left = [0.0] * len(bars)
    for (name, kinds), colour in zip(COLUMNS.items(), pyplot.get_cmap("tab10").colors, strict=False):
        sizes = [sum(f["device"].get(kind, 0) for kind in kinds) / GIB for f in bars]
        if any(sizes):
            axes.barh([f["strategy"] for f in bars], sizes, left=left, label=name, color=colour)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    limit = machine.gpu_bytes and machine.gpu_bytes / GIB
    if limit:
        axes.axvline(limit, color="black", linestyle="--", label=f"limit, {limit:.1f} GiB")
        if max(left) > 4 * limit:  # the bars that are far beyond it would hide the others
            axes.set_xlim(0, 4 * limit)
            for place, end in enumerate(left):
                if end > 4 * limit:
                    axes.annotate(
                        f"{end:,.0f} >", (4 * limit, place), ha="right", va="center", xytext=(-4, 0), textcoords="offset points"
                    )
    axes.invert_yaxis()
    axes.set_xlabel("GiB on a GPU at the peak")
    axes.set_title(f"{facts['machine']}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
