"""Checkpoints of a run: complete and verified, or not there at all; and where to go on from.

A save writes checkpoint-<step>.tmp, every rank its own shard; when all ranks have succeeded and every file is on the disk, the
manifest is written and the folder renamed; older checkpoints go only then. A kill leaves a .tmp folder that the next save
removes; a full disk costs this save and nothing else.
"""

import contextlib
import hashlib
import os
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from zerotune.engine.deepspeed_config import uses_nvme
from zerotune.engine.optimizer import replay_bias_correction
from zerotune.engine.processes import unwrap
from zerotune.errors import UserError
from zerotune.run import manifest
from zerotune.run.export import repair

FOLDER = re.compile(r"checkpoint-(\d+)")
DEEPSPEED_TAG = "deepspeed"  # DeepSpeed's files lie in a sub-folder of this name
STATE, RANDOM = "state.pt", "random_{rank}.pt"


def list_checkpoints(output_dir):
    """Return [(step, folder)] of the folders named checkpoint-<step>, oldest first; names are given to finished saves alone."""
    folders = ((FOLDER.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in folders if match)


# ---- saving ----------------------------------------------------------------------------------------------------------


def random_state():
    """Return this process's random generators' states as plain values, which load without unpickling code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state):
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def collecting_errors(engine, errors):
    """Have DeepSpeed's writes of this rank note a failure in `errors` and go on.

    save_checkpoint is a collective: a rank that left it by an exception would leave the others waiting in a barrier for ever.
    """
    writers = (
        (engine.checkpoint_engine, "save"),
        (engine, "_copy_recovery_script"),  # DeepSpeed's zero_to_fp32.py, put into every checkpoint by rank 0
    )

    def guarded(function):
        def call(*arguments, **options):
            try:
                return function(*arguments, **options)
            except Exception as error:  # torch raises RuntimeError, OSError and its own for a full disk
                errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

        return call

    originals = [getattr(owner, name) for owner, name in writers]
    for (owner, name), original in zip(writers, originals, strict=True):
        setattr(owner, name, guarded(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(writers, originals, strict=True):
            setattr(owner, name, original)


def write_state(accelerator, model, optimizer, folder, errors):
    """Write the strategy's own state: DeepSpeed's shards, or (main process) trainable weights, buffers, optimizer and scaler.

    Frozen weights are those of --model_name_or_path, and the manifest holds their SHA-256.
    """
    if accelerator.state.deepspeed_plugin is not None:
        with collecting_errors(model, errors):
            model.save_checkpoint(str(folder), DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=True)
    elif accelerator.is_main_process:
        inner = unwrap(model)
        learned = {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
        state = {"parameters": learned, "buffers": dict(inner.named_buffers()), "optimizer": optimizer.optimizer.state_dict()}
        state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        torch.save(state, folder / STATE)


def save(accelerator, model, optimizer, output_dir, step, save_total_limit, facts):
    """Write and commit checkpoint-<step>; return {"checkpoint_bytes", "save_seconds"}, or {"save_failed": why} after a failure.

    facts: what goes into the manifest beside the files: fingerprint, versions, frozen_sha256.
    A failure (a full disk, say) on any rank removes the temporary folder and keeps every older checkpoint.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and uses_nvme(plugin.deepspeed_config):  # also after a signal, where --save_steps 0 does not count
        return {"save_failed": "DeepSpeed does not restore what lies on NVMe; a resumed run would go on from other weights"}
    begin, errors = time.perf_counter(), []
    folder = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(f"{folder}.tmp")
    if accelerator.is_main_process:
        with noting(errors):
            for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            (temporary / DEEPSPEED_TAG).mkdir(parents=True)
    if not agree(errors):
        with noting(errors):
            write_state(accelerator, model, optimizer, temporary, errors)
            torch.save(random_state(), temporary / RANDOM.format(rank=accelerator.process_index))
    files = {}
    if not (failed := agree(errors)):
        names = manifest.list_files(temporary)[accelerator.process_index :: accelerator.num_processes]
        with noting(errors):
            for name in names:  # the ranks share the work of syncing and hashing
                manifest.sync(temporary / name)
                files[name] = manifest.file_facts(temporary / name)
        files = dict(gather_object(list(files.items())))
        failed = agree(errors)
    if not failed and accelerator.is_main_process:
        with noting(errors):
            commit(temporary, folder, facts | {"step": step, "files": files}, save_total_limit)
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
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def agree(errors):
    """Return the errors of all ranks, the same on each; a collective."""
    return gather_object(list(errors))


def commit(temporary, folder, content, save_total_limit):
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
    kept = {folder, *(path for _, path in list_checkpoints(folder.parent)[-save_total_limit:])}
    for _, old in list_checkpoints(folder.parent):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


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


def choose(accelerator, output_dir, resume_from_checkpoint, fingerprint, say):
    """Return (folder, manifest) of the checkpoint to go on from, (None, None) to start at step 0; the same on every rank.

    'auto' takes the newest that verifies; damaged ones are renamed to checkpoint-<step>.damaged and named through `say`. Raises
    UserError, touching nothing, for a damaged folder that was asked for and for a checkpoint of another mathematics.
    """
    choice, problems = (None, None), []
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
    if choice[1] is not None and not problems:
        problems += differences(choice[1]["fingerprint"], fingerprint, choice[0])
    choice, problems = broadcast_object_list([choice, problems])
    if problems:
        raise UserError(*problems)
    return choice


def set_aside(folder):
    """Rename a damaged checkpoint to a free name; return the new path."""
    for number in range(1000):
        aside = Path(f"{folder}.damaged{number or ''}")
        if not aside.exists():
            os.rename(folder, aside)
            return aside
    raise UserError(f"{folder}: damaged, and there are 1000 damaged ones beside it; remove them")


def differences(saved, present, folder):
    """Return a line for each entry of the two fingerprints that differs: going on would be another training."""
    return [
        f"{folder}: {name} was {saved.get(name)!r} and is {present.get(name)!r}; "
        "go on with the same, or start over in another --output_dir"
        for name in sorted(saved.keys() | present.keys())
        if saved.get(name) != present.get(name)
    ]


def load(accelerator, model, optimizer, folder, content, frozen_sha256):
    """Restore weights, optimizer, scaler and this rank's random state from a verified checkpoint; return its step."""
    if content["frozen_sha256"] != frozen_sha256:
        raise UserError(
            f"{folder}: it belongs to other frozen weights than --model_name_or_path has; give the model it was made with"
        )
    if accelerator.state.deepspeed_plugin is not None:
        model.load_checkpoint(str(folder), DEEPSPEED_TAG, load_module_strict=False, load_lr_scheduler_states=False)
        replay_bias_correction(model.basic_optimizer, model.global_steps - model.skipped_steps)
    else:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        inner = unwrap(model)
        present = dict(inner.named_parameters()) | dict(inner.named_buffers())
        with torch.no_grad():
            for name, tensor in (state["parameters"] | state["buffers"]).items():
                present[name].copy_(tensor)
        optimizer.optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    set_random_state(torch.load(folder / RANDOM.format(rank=accelerator.process_index), weights_only=True))
    return content["step"]


def frozen_digest(accelerator, model):
    """Return the SHA-256 of the frozen weights, a list with one entry a rank that holds a part of them; a collective.

    [] if nothing is frozen, and with NVMe, where nothing is saved.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and uses_nvme(plugin.deepspeed_config):
        return []
    frozen = [(name, p) for name, p in unwrap(model).named_parameters() if not p.requires_grad]
    sharded = any(hasattr(parameter, "ds_tensor") for _, parameter in frozen)
    mine = []
    if frozen and (sharded or accelerator.is_main_process):
        digest = hashlib.sha256()
        for name, parameter in frozen:
            shard = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous().flatten()
            if sharded:  # the last shards are padded with whatever was in memory
                shard = shard[: max(0, parameter.ds_numel - accelerator.process_index * shard.numel())]
            digest.update(name.encode())
            digest.update(shard.view(torch.uint8).numpy())
        mine = [digest.hexdigest()]
    return gather_object(mine)


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
        self.last_step = None  # of the newest save

    def save(self, step):
        args, monitor = self.args, self.monitor
        if warning := self.accelerator.is_main_process and space_warning(args.output_dir):
            monitor.console.say(warning)
        with monitor.paused():
            facts = self.facts | self.counts
            saved = save(self.accelerator, self.model, self.optimizer, args.output_dir, step, args.save_total_limit, facts)
        if saved.get("save_seconds", 0) > args.hang_timeout_seconds / 2:
            monitor.console.say(
                "warning: a save takes more than half of --hang_timeout_seconds, after which it would count as a stall"
            )
        monitor.write({"step": step, **saved})
        monitor.draw()
        self.last_step = step
