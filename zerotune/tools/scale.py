"""What 64 to 1,024 GPUs would give: bytes, tokens that hide the network, our own loop, failures; beside what others measured.

    python -m zerotune scale --out docs/scale.md

Formulas with their sources, and docs/scale.json, which tests/ranks.py counts on 1 to 16 processes. It starts no model and no GPU.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from zerotune.errors import UserError
from zerotune.plan.forecast import UTILISATION
from zerotune.plan.machine import known_gpu
from zerotune.plan.network import bytes_of_step

ROOT = Path(__file__).resolve().parents[2]
COUNTS, PAGE = ROOT / "docs/scale.json", Path(__file__).with_name("scale.md")
NODE = 8  # GPUs
# NCCL's own estimates for a ring with its Simple protocol, microseconds: to begin, and for a hop within a node and between nodes
# (src/graph/tuning.cc: baseLat, hwLat of NVLINK and NET).
BEGIN, HOP_WITHIN, HOP_BETWEEN = 8.4e-6, 3.4e-6, 14e-6
NETWORKS = {  # bytes/s that a ring has out of a node
    "H100, 8 x 400 Gbit/s a node": ("H100", 400e9),
    "H100, 8 x 200 Gbit/s": ("H100", 200e9),
    "A100, 8 x 200 Gbit/s": ("A100", 200e9),
    "A100, 1 x 100 Gbit/s": ("A100", 12.5e9),
}
STRATEGIES = {  # name: (stage, hpz, how gradients are reduced, bytes of a weight and of a gradient on their way)
    "ddp": (0, 1, "once", 2, 4),
    "zero2": (2, 1, "once", 2, 2),
    "zero2, --reduce each": (2, 1, "each", 2, 2),
    "zero3": (3, 1, "once", 2, 2),
    "zero3, --reduce each": (3, 1, "each", 2, 2),
    "zero3_hpz": (3, NODE, "once", 2, 2),
    "zeropp": (3, 1, "each", 1, 0.5),
}
ZEROPP = 3, NODE, "once", 1, 0.5  # all of ZeRO++ at once: its paper's case, arXiv:2306.10209
MEAN_HOURS = 7.9 * 1024  # between failures of one GPU: Kokolis et al. 2024 (arXiv:2410.21680), 7.9 h of a job of 1,024
# What others measured (github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, in two versions;
# github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md): who, model, parameters, tokens of a GPU's
# micro-batch, [(GPUs, their number)]; full sharding, bf16, H100s, 8 x 400 Gbit/s a node. The number: MFU in per cent, or tokens/s.
FOUNDRY = "LLM Foundry, its table of H100s"
MEASURED = [
    (FOUNDRY, "13 B", 12.85e9, 2 * 2048, [(8, 39.79), (16, 39.58), (32, 39.95), (64, 39.86)]),
    (FOUNDRY, "7 B", 6.66e9, 6 * 2048, [(8, 46.4), (128, 45.7), (256, 44.2), (512, 42.2)]),
    (FOUNDRY, "3 B", 2.65e9, 6 * 2048, [(32, 41.70), (64, 40.80)]),
    (FOUNDRY, "1 B", 1.32e9, 20 * 2048, [(8, 41.8), (16, 42.4), (32, 41.5), (64, 40.9), (128, 40.6), (256, 39.2), (512, 36.7)]),
    ("torchtitan, H100s, December 2024", "8 B", 8.03e9, 2 * 8192, [(8, 5762), (128, 5605)]),
    ("torchtitan, the same, compiled", "8 B", 8.03e9, 2 * 8192, [(8, 6667), (128, 6514)]),
]


def sent(name, parameters, num_gpus, micro_batches=1, learning=1.0):
    """Return (bytes out of a node, bytes within it) that a GPU sends in a step in bf16; name: of STRATEGIES, or such an entry."""
    stage, hpz, reduce, of_weight, of_gradient = STRATEGIES.get(name, name)
    reductions = micro_batches if reduce == "each" else 1
    sizes = {
        "weights": of_weight * parameters,
        "learning": of_weight * parameters * learning,
        "gradients": of_gradient * parameters * learning,
    }
    return bytes_of_step(stage, num_gpus, **sizes, micro_batches=micro_batches, reductions=reductions, hpz=hpz)


def ring_latency(num_gpus):
    """Return the seconds that a ring's hops take, however few bytes go around."""
    nodes = max(1, num_gpus // NODE)
    return BEGIN + (num_gpus - nodes) * HOP_WITHIN + (nodes if nodes > 1 else 0) * HOP_BETWEEN


def tokens_that_hide(name, gpu, bandwidth, num_gpus, micro_batches=1):
    """Return the tokens of a GPU's micro-batch from which computing takes as long as sending, all weights learning.

    6 FLOPs a parameter and token (Kaplan et al. 2020) at 45 % of the data sheet: the model's size cancels.
    """
    over, within = sent(name, 1e9, num_gpus, micro_batches)
    seconds = over / bandwidth + within / gpu.link
    return seconds * UTILISATION * gpu.flops / (6e9 * micro_batches)


def fit(points):
    """Return (at 0, per rank, largest distance) of the line through (ranks, value), by least squares."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope, max(abs(intercept + slope * x - y) for x, y in points)


def bytes_lines():
    lines = ["| strategy | all of 7 B learn, GB | a tenth learns, GB | of it within a node, GB |", "|---|---|---|---|"]
    for name in STRATEGIES:
        everything, tenth = sent(name, 7e9, 64, 4), sent(name, 7e9, 64, 4, 0.1)
        words = f"{everything[1] / 1e9:.0f} / {tenth[1] / 1e9:.0f}" if everything[1] else "-"
        lines.append(f"| `{name}` | {everything[0] / 1e9:.1f} | {tenth[0] / 1e9:.1f} | {words} |")
    return lines


def token_lines():
    lines = [f"| strategy | {' | '.join(NETWORKS)} |", "|---" * (1 + len(NETWORKS)) + "|"]
    for name in STRATEGIES:
        for micro_batches in (1, 8):
            words = (
                f"{tokens_that_hide(name, known_gpu(gpu), bandwidth, 1024, micro_batches):,.0f}"
                for gpu, bandwidth in NETWORKS.values()
            )
            lines.append(f"| `{name}`, {micro_batches} micro-batch{'es' * (micro_batches > 1)} | {' | '.join(words)} |")
    return lines


def hop_lines():
    lines = ["| GPUs | a ring's hops, ms | 1 GB within a node of H100s, ms | out of it, ms | hops of 32 blocks' micro-batch, ms |"]
    lines.append("|---|---|---|---|---|")
    within, between = (1e9 / link * 1e3 for link in (known_gpu("H100").link, NETWORKS["H100, 8 x 400 Gbit/s a node"][1]))
    for num_gpus in (8, 64, 512, 1024):
        hops = ring_latency(num_gpus) * 1e3
        lines.append(f"| {num_gpus:,} | {hops:.2f} | {within:.1f} | {between:.1f} | {hops * 3 * 32:.0f} |")
    return lines


def predicted(parameters, tokens, num_gpus, share):
    """Return the share of a step in which a GPU computes, of a strategy like zero3 whose sending overlaps computing.

    share: of the data sheet's FLOP/s while it computes. 3 collectives a block, of 32.
    """
    compute = 6 * parameters * tokens / (share * known_gpu("H100").flops)
    bandwidth = known_gpu("H100").link if num_gpus <= NODE else NETWORKS["H100, 8 x 400 Gbit/s a node"][1]
    network = sent("zero3", parameters, num_gpus)[0] / bandwidth + 3 * 32 * ring_latency(num_gpus)
    return compute / max(compute, network)


def zeropp_line():
    """Return ZeRO++'s own counts beside these: what leaves a node in a step, in the bytes of a model in 16 bits."""
    many, counted = 1_000_000, ((3, "ZeRO-3", "zero3"), (2, "hpZ", "zero3_hpz"), (0.75, "hpZ, qwZ and qgZ", ZEROPP))
    return "; ".join(f"{words} {paper:g} and {sent(name, 1e9, many)[0] / 2e9:.3g}" for paper, words, name in counted)


def measured_lines():
    """Return (lines, errors in per cent, a sentence on 1,024 GPUs): what was kept of the speed, as measured and by the formulas."""
    lines = ["| who | model | GPUs | measured | kept, of the first | kept, by formula | error |", "|---|---|---|---|---|---|---|"]
    errors, doubled, at_1024 = [], [], []
    for who, model, parameters, tokens, numbers in MEASURED:
        fewest, base = numbers[0]
        share = base / 100 if base < 100 else 6 * parameters * base / known_gpu("H100").flops
        for num_gpus, number in numbers[1:]:
            formula = predicted(parameters, tokens, num_gpus, share) / predicted(parameters, tokens, fewest, share)
            errors.append(100 * (formula / (number / base) - 1))
            words = f"{fewest} -> {num_gpus} | {base:,} -> {number:,} | {number / base:.3f} | {formula:.3f} | {errors[-1]:+.1f} %"
            lines.append(f"| {who} | {model} | {words} |")
        of = dict(numbers)
        if 512 in of:
            doubled.append(f"{100 * (1 - of[512] / of[256]):.1f} % ({model})")
            at_1024.append(f"{of[512] / base * of[512] / of[256]:.0%}")
    kept = f"at that pace {' and '.join(at_1024)} of the speed of 8 are kept at 1,024."
    pace = f"From 256 to 512 GPUs {' and '.join(doubled)} are lost;\n{kept}"
    return lines, errors, pace


def own_lines(cells):
    """Return the lines of what train.py asks in a step, a save, an evaluation, at the start and the end, as ranks grow."""
    lines = ["| strategy | ranks | start | step | save | evaluation | end | files of a checkpoint | rank 0 in a step, ms |"]
    lines.append("|---" * 9 + "|")

    def asked(part):
        collectives = sum(v for k, v in part.items() if k not in ("seconds", "objects", "bytes of objects") and "listings" not in k)
        return f"{collectives:.0f}; {part.get('objects', 0):.0f}; {part.get('listings', 0):.0f}"

    for cell in cells:
        if cell["accumulation"] == 1:
            words = " | ".join(asked(cell["parts"][part]) for part in ("start", "step", "save", "evaluation", "end"))
            own = 1e3 * cell["parts"]["step"]["seconds"]
            lines.append(
                f"| `{cell['strategy']}` | {cell['ranks']} | {words} | {cell['parts']['checkpoint']['files']} | {own:.1f} |"
            )
    return lines


def growth_lines(cells):
    lines = [
        "| strategy | rank 0 in a step, ms | a rank more, ms | largest error, ms | at 1,024 ranks, ms |",
        "|---|---|---|---|---|",
    ]
    for strategy in dict.fromkeys(cell["strategy"] for cell in cells):
        points = [
            (cell["ranks"], 1e3 * cell["parts"]["step"]["seconds"])
            for cell in cells
            if cell["strategy"] == strategy and cell["accumulation"] == 1 and cell["ranks"] > 1
        ]
        begin, slope, error = fit(points)
        # A line of so few ranks bends by its error over their range: so much it may be off, rank by rank.
        spread = error / (points[-1][0] - points[0][0]) * 1024
        lines.append(f"| `{strategy}` | {begin:.1f} | {slope:.3f} | {error:.2f} | {begin + slope * 1024:.0f} +- {spread:.0f} |")
    return lines


def failure_lines():
    lines = ["| GPUs | hours between failures | save every, min | lost to saves, failures and restarts |", "|---|---|---|---|"]
    save, restart = 60.0, 600.0
    for num_gpus in (8, 64, 512, 1024):
        mean = MEAN_HOURS * 3600 / num_gpus
        interval = math.sqrt(2 * save * mean)
        lost = save / interval + interval / 2 / mean + restart / mean
        lines.append(f"| {num_gpus:,} | {mean / 3600:,.1f} | {interval / 60:.0f} | {lost:.1%} |")
    return lines


def page(counts):
    """Return docs/scale.md; counts: docs/scale.json."""
    cells, files = counts["cells"], counts["files_imported"]
    measured, errors, pace = measured_lines()
    of_zero3 = [cell for cell in cells if cell["strategy"] == "zero3" and cell["accumulation"] == 1]
    (fewer, many), ranks = ([cell["parts"]["checkpoint"] for cell in of_zero3[-2:]], of_zero3[-1]["ranks"] - of_zero3[-2]["ranks"])
    failures = failure_lines()
    return PAGE.read_text().format(
        bytes="\n".join(bytes_lines()),
        utilisation=UTILISATION,
        tokens="\n".join(token_lines()),
        hop=1e3 * ring_latency(1024) * 3 * 32,
        compute=1e3 * 6 * 7e9 * 8192 / (UTILISATION * known_gpu("H100").flops),
        hops="\n".join(hop_lines()),
        own="\n".join(own_lines(cells)),
        growth="\n".join(growth_lines(cells)),
        python=files["Python"],
        libraries=files["libraries"],
        millions=1024 * files["Python"] / 1e6,
        more_files=(many["files"] - fewer["files"]) / ranks,
        more_bytes=(many["bytes of manifest"] - fewer["bytes of manifest"]) / ranks,
        mean_hours=MEAN_HOURS,
        failures="\n".join(failures),
        measured="\n".join(measured),
        zeropp=zeropp_line(),
        mean=statistics.fmean(abs(error) for error in errors),
        worst=max(errors, key=abs),
        pace=pace,
        lost=failures[-1].split("|")[-2].strip(),
    )


def main(words):
    parser = argparse.ArgumentParser(prog="python -m zerotune scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the page there; default: print it")
    args = parser.parse_args(words)
    if not COUNTS.exists():
        raise UserError(f"{COUNTS}: not there; python tests/ranks.py --out docs/scale.json makes it")
    text = page(json.loads(COUNTS.read_text()))
    if args.out:
        try:
            args.out.write_text(text)
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}; give a file in a folder that is there") from None
    else:
        print(text, end="")
    return 0
