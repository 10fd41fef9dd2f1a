"""Checkpoints of a run: complete or not there at all, and where to go on from."""

import json
import os
import re
import shutil
import time
from pathlib import Path

from zerotune.errors import UserError

NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir):
    """Return [(step, folder)] of the complete checkpoints in a run directory, oldest first."""
    folders = [(NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in folders if match and (path / "position.json").is_file())


def save(accelerator, output_dir, step, save_total_limit):
    """Write checkpoint-<step>: weights, optimizer, random states of every rank, and the position; then drop the oldest ones.

    The folder gets its name only when everything in it is written, so that a kill leaves a .tmp folder and never half a
    checkpoint. Returns {"checkpoint_bytes", "save_seconds"}.
    """
    begin = time.perf_counter()
    folder = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(f"{folder}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "position.json").write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for _, old in list_checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"checkpoint_bytes": size, "save_seconds": round(time.perf_counter() - begin, 3)}


def find(output_dir, resume_from_checkpoint, overwrite_output_dir):
    """Return the checkpoint folder to resume from, or None to start at step 0; raise UserError.

    resume_from_checkpoint: 'auto', 'none' or a folder.
    """
    if resume_from_checkpoint == "auto":
        found = list_checkpoints(output_dir)
        return found[-1][1] if found else None
    if resume_from_checkpoint == "none":
        if (Path(output_dir) / "run.json").exists() and not overwrite_output_dir:
            raise UserError(
                f"--output_dir {output_dir}: holds a run already; resume it (--resume_from_checkpoint auto), give another folder, "
                "or start over with --overwrite_output_dir"
            )
        return None
    folder = Path(resume_from_checkpoint)
    if not (folder / "position.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder}: no complete checkpoint; allowed: auto, none, or a checkpoint-<step> folder"
        )
    return folder


def start_over(output_dir):
    """Remove what a run of its own left in the folder, so that a later 'auto' cannot pick up an older run's checkpoint."""
    for path in [*Path(output_dir).glob("checkpoint-*"), Path(output_dir) / "metrics.jsonl"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def load(accelerator, folder):
    """Restore weights, optimizer and random states from a checkpoint; return its step."""
    accelerator.load_state(str(folder))
    return json.loads((Path(folder) / "position.json").read_text())["step"]
