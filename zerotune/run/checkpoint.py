"""Checkpoints of a run: complete and verified, or not there at all; and where to go on from.

A save writes checkpoint-<step>.tmp, every rank one file (state_files.py); when all ranks have succeeded and every file is on the
disk, the manifest is written and the folder renamed; older checkpoints go only then. A kill leaves a .tmp folder that the next save
removes; a full disk costs this save and nothing else. No random states are saved: what is random in a step follows from its number.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from zerotune.engine.deepspeed_config import uses_nvme
from zerotune.engine.pieces import scaler_state, set_scaler_state
from zerotune.errors import UserError
from zerotune.run import manifest, state_files
from zerotune.run.autopsy import is_out_of_memory
from zerotune.run.export import repair
from zerotune.run.fingerprint import compare, moved

FOLDER = re.compile(r"checkpoint-(\d+)")
FORMAT = 2  # of the files; 1 was DeepSpeed's own and torch.save's, of one layout each


def list_checkpoints(output_dir):
    """Return [(step, folder)] of the folders named checkpoint-<step>, oldest first; names are given to finished saves alone."""
    folders = ((FOLDER.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in folders if match)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(accelerator, model, optimizer, output_dir, step, save_total_limit, facts, keep_every=0):
    """Write and commit checkpoint-<step>; return {"checkpoint_bytes", "save_seconds"}, or {"save_failed": why} after a failure.

    facts: what goes into the manifest beside the files: fingerprint, layout, versions, frozen weights.
    A failure (a full disk, say) on any rank removes the temporary folder and keeps every older checkpoint.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and uses_nvme(plugin.deepspeed_config):  # also after a signal, where --save_steps 0 does not count
        return {"save_failed": "states on NVMe are not saved: DeepSpeed does not restore them"}
    begin, errors, files = time.perf_counter(), [], {}
    folder = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(f"{folder}.tmp")
    if accelerator.is_main_process:
        with noting(errors):
            for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
    if not (failed := agree(errors)):
        with noting(errors):
            name = state_files.file_name(accelerator.process_index)
            files[name] = state_files.write(temporary / name, *state_files.tensors_to_save(accelerator, model, optimizer))
        files = dict(gather_object(list(files.items())))
        failed = agree(errors)
    if not failed and accelerator.is_main_process:
        with noting(errors):
            content = facts | {"format": FORMAT, "step": step, "files": files, "scaler": scaler_state(accelerator, optimizer)}
            commit(temporary, folder, content, save_total_limit, keep_every)
    if failed := failed or agree(errors):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        return {"save_failed": "; ".join(failed)}
    return {"checkpoint_bytes": sum(f["bytes"] for f in files.values()), "save_seconds": round(time.perf_counter() - begin, 3)}


@contextlib.contextmanager
def noting(errors):
    """Turn an exception into an entry of `errors`, for ranks that must meet again in `agree`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):  # explained by this rank, which ends the others
            raise
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def agree(errors):
    """Return the errors of all ranks, the same on each; a collective."""
    return gather_object(list(errors))


def commit(temporary, folder, content, save_total_limit, keep_every):
    """Give a fully written folder its name, and remove the oldest checkpoints beyond the limit."""
    manifest.write(temporary, content)
    for path in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        manifest.sync(path)
    replaced = Path(f"{folder}.replaced.tmp")
    if folder.exists():  # after going on from an older checkpoint by hand
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    manifest.sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    remove_old(folder, save_total_limit, keep_every)


def remove_old(newest, save_total_limit, keep_every):
    """Remove the oldest checkpoints beyond the limit, but for those whose step `keep_every` divides and for the best ones.

    Each within the limit keeps the one that was the best when it was written: should a damaged one be set aside, the run goes on
    from the one before with all that it knows of.
    """
    found = list_checkpoints(newest.parent)
    kept = {newest, *(path for _, path in found[-save_total_limit:])}
    kept |= {best_of(folder, dict(found)) for folder in kept}
    for step, old in found:
        if old not in kept and not (keep_every and step % keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)


def best_of(folder, found):
    """Return the checkpoint of the best evaluation that one knows of, of those there are ({step: folder}); None without."""
    with contextlib.suppress(ValueError, OSError):
        steps = manifest.read(folder).get("best", {}).get("kept", [])
        return next((found[step] for step in reversed(steps) if step in found), None)


def space_warning(output_dir):
    """Return a line of warning if the disk has less room than the newest checkpoint took, else None."""
    found = list_checkpoints(output_dir)
    if not found:
        return None
    last = sum(path.stat().st_size for path in found[-1][1].rglob("*") if path.is_file())
    free = shutil.disk_usage(output_dir).free
    return f"warning: {free:,} bytes are free in {output_dir}, but a checkpoint takes {last:,}" if free < last else None


# ---- resuming --------------------------------------------------------------------------------------------------------


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


def load(accelerator, model, optimizer, folder, content, frozen):
    """Restore weights, optimizer and loss scale from a verified checkpoint of any layout; return its step; a collective."""
    if content["frozen_weights"] not in (None, frozen) and frozen is not None:
        raise UserError(
            f"{folder}: it belongs to other frozen weights than --model_name_or_path has; give the model it was made with"
        )
    state_files.load(accelerator, model, optimizer, folder)
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
    for path in [*Path(output_dir).glob("checkpoint-*"), Path(output_dir) / "metrics.jsonl"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Saver:
    """Saves the run's state under a step's number and writes a record of it."""

    def __init__(self, accelerator, model, optimizer, args, facts, counts, monitor):
        """facts: what the manifests hold beside the files; counts: {name: count} so far, which they carry too."""
        self.accelerator, self.model, self.optimizer, self.args = accelerator, model, optimizer, args
        self.facts, self.counts, self.monitor = facts, counts, monitor
        self.states = {}  # {entry of the manifest: function that gives it}: what the run decides by, as it is at a save
        self.last_step = None  # of the newest save

    def save(self, step):
        args, monitor = self.args, self.monitor
        if warning := self.accelerator.is_main_process and space_warning(args.output_dir):
            monitor.console.say(warning)
        with monitor.paused():
            facts = self.facts | self.counts | {name: state() for name, state in self.states.items()}
            where = args.output_dir, step, args.save_total_limit
            saved = save(self.accelerator, self.model, self.optimizer, *where, facts, args.keep_every)
        if saved.get("save_seconds", 0) > args.hang_timeout_seconds / 2:
            monitor.console.say(
                "warning: a save takes more than half of --hang_timeout_seconds, after which it would count as a stall"
            )
        monitor.write({"step": step, **saved})
        monitor.draw()
        self.last_step = step
