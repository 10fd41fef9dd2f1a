"""The numbers: some steps of the user's own model and rows under the strategy, beside the same steps of one process.

Both take the same rows in each step: what the strategy spreads over processes, one process takes in more micro-batches. Dropout is
switched off in a copy of the model's configuration, as each rank draws its own. What stays is the rows' tokens, in their cache.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from zerotune.errors import UserError
from zerotune.run.groups import BestArguments
from zerotune.tools.benchmark.cells import OUT_OF_MEMORY
from zerotune.tools.doctor.finding import fails, fine, hurts, of_problem
from zerotune.tools.doctor.launch import ROOT, reason_of, run_to_end
from zerotune.tools.machines import COMPARED

STEPS = 3
# Relative differences of a loss. In float32 both are the same sum in another order, and tests/test_equivalence.py holds every
# strategy to this. In 16 bits a number has 8 (bf16) or 11 (fp16) significant bits, and DeepSpeed's weights and gradients are such
# numbers, where one process keeps float32 and rounds on the way.
TOLERANCE = {"no": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
REFUSAL = "train.py: error: "
SMALL_LOSS = 0.1  # a smaller one is the difference of larger numbers, whose rounding it has


def words_of(args):
    """Return train.py's command line for Arguments, without what is left at its default."""
    words = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if value == default or value is None:
            continue
        if isinstance(value, list):
            words += [f"--{field.name}", *map(str, value)] if value else []
        else:
            words.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


def compared(args, model, train_file, output_dir, accumulation):
    """Return the command line of a run that is compared: STEPS steps, no evaluation, no checkpoint, no dropout of an adapter."""
    changed = dataclasses.replace(
        args,
        model_name_or_path=str(model),
        train_file=[str(file) for file in train_file],
        dataset_name=None,
        dataset_config_name=None,
        validation_file=[],
        test_file=[],
        output_dir=str(output_dir),
        lora_dropout=0.0,
        merge_adapter=False,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=0,
        save_strategy="steps",
        save_steps=0,
        **{field.name: field.default for field in dataclasses.fields(BestArguments)},
        profile_steps=0,
        plan_only=False,
        resume_from_checkpoint="none",
        overwrite_output_dir=True,
        report_to="none",
    )
    return words_of(changed)


def dropouts(configuration):
    """Return the part of a configuration, a dict, that makes a model random, each number as 0: {} if there is none."""
    found = {}
    for key, value in configuration.items():
        if isinstance(value, dict) and key != "label2id":
            if inner := dropouts(value):
                found[key] = inner
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            found |= {key: 0.0} if "drop" in str(key) or "jitter" in str(key) else {}
    return found


def merge(content, changes):
    """Return a dict with changes, as deep as they go."""
    merged = dict(content)
    for key, value in changes.items():
        merged[key] = merge(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def model_without_dropout(args, configuration, folder):
    """Return the model to compare on: the given one, or a folder with links to its files and a config.json without dropout.

    configuration: the model's, as transformers reads it, with the defaults that its file leaves out.
    """
    changes = dropouts(configuration.to_dict())
    if not changes:
        return args.model_name_or_path
    source = Path(args.model_name_or_path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        other_frameworks = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.gguf", "onnx/*", "original/*"]
        source = Path(snapshot_download(args.model_name_or_path, ignore_patterns=other_frameworks))
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    content = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(merge(content, changes)))
    return folder


def rows_of_hub(args, folder):
    """Return the files of training rows: --train_file, or the hub data set's train split, as its others would be evaluated."""
    if args.train_file:
        return args.train_file
    from zerotune.rows.data import load_hub

    path = folder / "train.parquet"
    load_hub(args)["train"].to_parquet(path)
    return [path]


def losses_of(folder):
    """Return (losses of a finished run's steps, None for one that was skipped; its run.json; its training records)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    return [record["loss"] for record in training], json.loads((folder / "run.json").read_text()), training


def shown(losses):
    return " ".join("none" if loss is None else f"{loss:.6g}" for loss in losses)


def compare_losses(strategy, ours, plain, mixed_precision):
    """Return the finding on losses of the same steps: `ours` under the strategy, `plain` of one process; None: a skipped step."""
    tolerance = TOLERANCE[mixed_precision]
    skipped = [losses for losses in (ours, plain) if None in losses]
    if skipped and mixed_precision != "fp16":
        fix = "lower --learning_rate, look at the rows; `bash scripts/launch.sh` with the same flags names the step's rows"
        who = strategy if None in ours else "one process"
        return fails("numbers", f"a loss or gradient is not finite under {who}: {shown(skipped[0])}", fix)
    pairs = [(a, b) for a, b in zip(ours, plain, strict=True) if a is not None and b is not None]
    if not pairs:
        found = f"not compared: all {len(ours)} steps overflowed, as fp16's first ones do while its loss scale falls"
        return hurts("numbers", found, "--mixed_precision bf16, where the hardware has it")
    difference = max(abs(a - b) / max(abs(b), SMALL_LOSS) for a, b in pairs)
    found = f"losses of {len(pairs)} steps under {strategy} {shown(ours)}, of one process {shown(plain)}"
    limit = f"{difference:.1e} apart (relative), up to {tolerance:.0e} is rounding"
    if difference <= tolerance:
        return fine("numbers", f"{found}: {limit}")
    fix = "do not train with it: try STRATEGY=ddp and another ZeRO stage to see which is off, and the pinned versions"
    return fails("numbers", f"the numbers under {strategy} differ: {found}: {limit}", fix)


def out_of_memory(log):
    """Return the line of a run's output that says that memory ran out, or ""."""
    return next((line[:300] for line in log.splitlines() if OUT_OF_MEMORY.search(line) or "OOM killer" in line), "")


def failed(check, who, code, log):
    """Return the finding on a run that did not end well; code and log: its exit code and output."""
    if line := out_of_memory(log):
        return fails(check, f"{who}: {line}", "README.md, Troubleshooting: what to change, in the order of its cost")
    refusals = [line.removeprefix(REFUSAL) for line in log.splitlines() if line.startswith(REFUSAL)]
    if code == UserError.code and refusals:  # bad rows follow their number
        finding = of_problem(check, refusals[0])
        return dataclasses.replace(finding, found=": ".join([finding.found, *refusals[1:4]]))
    return fails(
        check, f"{who}: exit code {code}: {reason_of(log)}", "`bash scripts/launch.sh` with the same flags shows the whole log"
    )


def compare(launch, environment, args, configuration, folder):
    """Run both and return (findings, run.json and training records of the strategy's run, None where it failed); folder: for files.

    With several machines the first one compares: the records are there.
    """
    folder, name = Path(folder), Path(args.model_name_or_path).name
    # On several machines the folder is one for all, and each makes what it reads itself.
    own = folder / str(launch.rank)
    own.mkdir(exist_ok=True)
    given = model_without_dropout(args, configuration, own / "model"), rows_of_hub(args, own)
    dropout = ", without dropout" if given[0] != args.model_name_or_path else ""

    def run(who, accumulation, **more):
        out, log = folder / who, own / f"{who}.log"
        words = compared(args, *given, out, accumulation)
        code = run_to_end(["bash", ROOT / "scripts" / "launch.sh", *words], environment | {COMPARED: "1"} | more, log)
        shutil.rmtree(out / "final", ignore_errors=True)  # as large as the model
        return code, log.read_text(errors="replace")

    code, log = run("strategy", args.gradient_accumulation_steps)
    if code:
        return [failed("steps", f"{STEPS} steps under {launch.strategy}", code, log)], None
    if launch.rank:
        return [fine("steps", f"{STEPS} steps of {name}{dropout}; machine 0 compares the numbers")], None
    losses, content, training = losses_of(folder / "strategy")
    last = training[-1]
    peak = last["peak_device_memory_gib"] or last["peak_host_memory_gib"]
    found = f"{STEPS} steps of {name}{dropout} under {launch.strategy}, final/ included; {peak} GiB at most in a process"
    findings = [fine("steps", f"{found}, {last['step_seconds']:.3g} s for the last")]
    if launch.strategy == "single":
        return findings, (content, training)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if launch.strategy == "cpu" else {}
    alone = {"STRATEGY": "single", "NUM_PROCESSES": "1", "NUM_MACHINES": "1"} | hidden
    code, log = run("plain", args.gradient_accumulation_steps * launch.processes, **alone)
    if code and out_of_memory(log):
        found = f"not compared: one process does not hold this model ({out_of_memory(log)})"
        findings.append(hurts("numbers", found, "compare on a smaller model of the family, with the same flags"))
    elif code:
        findings.append(failed("numbers", "one process", code, log))
    else:
        findings.append(compare_losses(launch.strategy, losses, losses_of(folder / "plain")[0], args.mixed_precision))
    return findings, (content, training)
