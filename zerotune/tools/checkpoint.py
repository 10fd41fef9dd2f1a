"""Look at a checkpoint, check it, or make a model folder of it: on one machine, without a GPU and without the launcher.

python -m zerotune checkpoint show runs/a/checkpoint-500
python -m zerotune checkpoint verify runs/a/checkpoint-500
python -m zerotune checkpoint export runs/a/checkpoint-500 model
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from zerotune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def main(words):
    parser = argparse.ArgumentParser("python -m zerotune checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|verify|export")
    show = commands.add_parser(
        "show", help="print step, layout and the SHA-256 of the state, the same however it is cut into files"
    )
    verify = commands.add_parser("verify", help="compare every file with the manifest; exit code 1 if one differs")
    export = commands.add_parser("export", help="write what from_pretrained loads, as a run's final/ is")
    for command in (show, verify, export):
        command.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument("--json", action="store_true")
    export.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    export.add_argument("--model_name_or_path", help="where the model is now that the run began from; default: where it was")
    args = parser.parse_args(words)
    return {"show": show_state, "verify": verify_files, "export": write_model}[args.command](args)


def verified(folder):
    """Return the manifest of a whole checkpoint; UserError with all that is wrong otherwise."""
    from zerotune.run import manifest
    from zerotune.run.checkpoint import FORMAT

    if not (folder / manifest.NAME).is_file():
        raise UserError(f"{folder}: no checkpoint, as it has no {manifest.NAME}; give a checkpoint-<step> folder of a run")
    try:
        content, problems = manifest.verify(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    if not problems and content.get("format") != FORMAT:
        problems = [f"format {content.get('format', 1)}, and this version reads {FORMAT}; use the version that wrote it"]
    if problems:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    return content


def verify_files(args):
    try:
        content = verified(args.folder)
    except UserError as error:
        error.code = 1 if args.folder.is_dir() else 2
        raise
    size = sum(facts["bytes"] for facts in content["files"].values())
    print(f"{args.folder}: whole, step {content['step']}, {len(content['files'])} files, {size:,} bytes")
    return 0


def show_state(args):
    from zerotune.run.state_files import BUFFER, SavedState

    content = verified(args.folder)
    saved = SavedState(args.folder)
    kinds = Counter(kind for parameter in saved.shapes for kind in saved.places[parameter])
    steps = sorted({int(numbers["step"]) for numbers in saved.numbers.values() if "step" in numbers})
    facts = {
        "step": content["step"],
        "layout": content["layout"],
        "files": {name: facts["bytes"] for name, facts in content["files"].items()},
        "bytes": sum(facts["bytes"] for facts in content["files"].values()),
        "parameters": len(saved.shapes),
        "states": dict(kinds),
        "optimizer_steps": steps,
        "uncut_states": len(saved.whole),
        "buffers": sum(BUFFER in kinds for kinds in saved.places.values()),
        "loss_scale": content["scaler"] and content["scaler"]["scale"],
        "overflowed_steps": content["overflowed_steps"],
        "frozen_weights": content["frozen_weights"],
        "model_name_or_path": content["arguments"]["model_name_or_path"],
        "versions": content["versions"],
        "state_sha256": saved.digest(),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
            print(f"{name:<19} {shown}")
    return 0


def write_model(args):
    """Build the run's model on the CPU, fill it from the checkpoint and export it as the end of the run does."""
    if args.out.exists():
        raise UserError(f"{args.out}: is there already; give a folder that is not")
    content = verified(args.folder)
    from zerotune.run.arguments import Arguments

    flags = Arguments(**content["arguments"])
    flags.model_name_or_path = args.model_name_or_path or flags.model_name_or_path
    import runpy

    from zerotune.run.saved_model import export_saved

    make_trainable = runpy.run_path(str(ROOT / "train.py"))["make_trainable"]
    export_saved(args.folder, content, flags, make_trainable, args.out)
    print(f"{args.out}: step {content['step']}, loads with from_pretrained")
    return 0
