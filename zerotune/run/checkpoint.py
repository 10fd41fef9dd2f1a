"""Where a run goes on from: its newest whole checkpoint, in the layout that it finds itself in. saving.py writes them.

No random states are in them: what is random in a step follows from its number.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list

from zerotune.engine.pieces import set_scaler_state
from zerotune.errors import UserError
from zerotune.run import manifest, state_files
from zerotune.run.export import repair
from zerotune.run.fingerprint import compare, moved

FOLDER = re.compile(r"checkpoint-(\d+)")
FORMAT = 2  # of the files; 1 was DeepSpeed's own and torch.save's, of one layout each


def list_checkpoints(output_dir):
    """Return [(step, folder)] of the folders named checkpoint-<step>, oldest first; names are given to finished saves alone."""
    folders = ((FOLDER.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in folders if match)


def check_request(output_dir, resume_from_checkpoint, overwrite_output_dir):
    """Raise UserError if --resume_from_checkpoint ('auto', 'none' or a folder) cannot be meant."""
    if resume_from_checkpoint == "none":
        if (Path(output_dir) / "run.json").exists() and not overwrite_output_dir:
            raise UserError(
                f"--output_dir {output_dir}: holds a run already; resume it (--resume_from_checkpoint auto), give another "
                "folder, or start over with --overwrite_output_dir"
            )
    elif resume_from_checkpoint != "auto":
        try:
            whole = (Path(resume_from_checkpoint) / manifest.NAME).is_file()
        except OSError as error:
            raise UserError(f"--resume_from_checkpoint {resume_from_checkpoint}: {error.strerror}") from None
        if not whole:
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: no complete checkpoint; "
                "allowed: auto, none, or a checkpoint-<step> folder"
            )


def newest_manifest(output_dir, resume_from_checkpoint):
    """Return the manifest of the checkpoint that will probably be gone on from, not yet verified; None if there is none."""
    found = [path for _, path in reversed(list_checkpoints(output_dir))] if resume_from_checkpoint == "auto" else []
    for folder in found if resume_from_checkpoint in ("auto", "none") else [resume_from_checkpoint]:
        with contextlib.suppress(ValueError, OSError):
            content = manifest.read(folder)
            return content if content.get("format") == FORMAT else None
    return None


def choose(accelerator, output_dir, resume_from_checkpoint, fingerprint, layout, accepted, say):
    """Return (folder, manifest, changes) of the checkpoint to go on from, (None, None, []) for step 0; the same on every rank.

    'auto' takes the newest that verifies; damaged ones are renamed to checkpoint-<step>.damaged and named through `say`. Raises
    UserError, touching nothing, for a damaged folder that was asked for and for a checkpoint of another mathematics, unless its
    changes are among `accepted`. changes: lines of what is accepted or laid out otherwise.
    """
    choice, changes, problems = (None, None), [], []
    try:
        if accelerator.is_main_process and resume_from_checkpoint == "auto":
            for _, folder in reversed(list_checkpoints(output_dir)):
                content, damage = manifest.verify(folder)
                if not damage:
                    choice = folder, content
                    break
                aside = set_aside(folder)
                say(f"warning: {folder} is damaged ({'; '.join(damage[:3])}); set aside as {aside.name}")
        elif accelerator.is_main_process and resume_from_checkpoint != "none":
            folder = Path(resume_from_checkpoint)
            content, damage = manifest.verify(folder)
            choice = folder, content
            problems += [f"--resume_from_checkpoint {folder}: damaged: {problem}" for problem in damage[:10]]
    except OSError as error:  # not damage, and nothing to go on without: the other ranks have to hear of it
        problems.append(f"{error.filename}: {error.strerror}; every file of a checkpoint to resume from has to be readable")
    folder, content = choice
    if content is not None and not problems:
        if content.get("format") != FORMAT:
            problems.append(
                f"{folder}: has format {content.get('format', 1)} and this version reads {FORMAT}; finish the run with the "
                "version that began it, or start over in another --output_dir"
            )
        else:
            problems, changes = compare(content["fingerprint"], fingerprint, accepted, folder)
            changes += moved(content["layout"], layout)
    choice, changes, problems = broadcast_object_list([choice, changes, problems])
    if problems:
        raise UserError(*problems)
    if changes:
        say(f"{choice[0].name} goes on with a change: {'; '.join(changes)}")
    return *choice, changes


def set_aside(folder):
    """Rename a damaged checkpoint to a free name; return the new path."""
    for number in range(1000):
        aside = Path(f"{folder}.damaged{number or ''}")
        if not aside.exists():
            os.rename(folder, aside)
            return aside
    raise UserError(f"{folder}: damaged, and there are 1000 damaged ones beside it; remove them")


def load(accelerator, model, optimizer, folder, content, frozen, phases=None):
    """Restore weights, optimizer and loss scale from a verified checkpoint of any layout; return its step; a collective.

    phases: of --freeze_schedule; at a border the checkpoint is of the phase before.
    """
    saved = content["frozen_weights"]
    # Rounded to another precision, whose change was accepted, they cannot be compared.
    if saved and frozen and saved != frozen and saved.split()[0] == frozen.split()[0]:
        raise UserError(
            f"{folder}: it belongs to other frozen weights than --model_name_or_path has; give the model it was made with"
        )
    step = content["step"]
    new = {name for name, birth in phases.births(step).items() if birth == step} if phases else set()
    state_files.load(accelerator, model, optimizer, folder, new, phases.settled(step) if phases else set())
    set_scaler_state(accelerator, optimizer, content["scaler"])
    if accelerator.state.deepspeed_plugin is not None:
        model.global_steps, model.skipped_steps = content["step"], content["overflowed_steps"]
        model.global_samples = model.global_steps * model.train_batch_size()
    return content["step"]


def open_folder(output_dir, anew):
    """Mend what a kill left of final/ and merged/; anew: remove an earlier run, whose checkpoints a later 'auto' would pick up."""
    for name in ("final", "merged"):
        repair(Path(output_dir) / name)
    if not anew:
        return
    for path in [*Path(output_dir).glob("checkpoint-*"), *(Path(output_dir) / name for name in ("metrics.jsonl", "failures"))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
