"""Saves: checkpoints that are complete or not there at all, and that nobody waits for.

Each rank copies what it keeps to host memory, trains on, and writes the copy behind it to its file (state_files.py) in
checkpoint-<step>.tmp. When all ranks have succeeded and every file is on the disk, the manifest is written and the folder
renamed; older checkpoints go only then. A kill leaves a .tmp folder that the next save removes; a full disk costs this save and
nothing else.
"""

import contextlib
import math
import os
import shutil
import threading
import time
from pathlib import Path

import torch.distributed as dist

from zerotune.engine import processes
from zerotune.engine.deepspeed_config import uses_nvme
from zerotune.engine.pieces import scaler_state
from zerotune.plan.machine import free_host_bytes, given_back
from zerotune.run import manifest, state_files
from zerotune.run.autopsy import is_out_of_memory
from zerotune.run.checkpoint import FORMAT, list_checkpoints

GIB = 1 << 30
ROOM = 0.8  # of the host memory that is left, which copies may take; the rest is the writes' own, and whatever comes


class Saver:
    """Saves the run's state under a step's number, and writes a record of it once it is there."""

    def __init__(self, accelerator, model, optimizer, args, facts, counts, monitor):
        """facts: what the manifests hold beside the files; counts: {name: count} so far, which they carry too."""
        self.accelerator, self.model, self.optimizer, self.args = accelerator, model, optimizer, args
        self.facts, self.counts, self.monitor = facts, counts, monitor
        self.states = {}  # {entry of the manifest: function that gives it}: what the run decides by, as it is at a save
        self.settled = ()  # names of what has learned in earlier phases
        self.last_step = None  # of the newest save
        self.last_time, self.cost = time.monotonic(), 0.0  # seconds for which the training stood still for the newest save
        self.automatic = args.save_steps == "auto"
        self.job, self.told = None, False
        self.copies = {}  # kept from save to save: the first touch of fresh memory takes longer than the copy into it
        # Agreements of a write behind the training go through a group of their own, whose order no other collective disturbs.
        several = accelerator.num_processes > 1
        self.group = dist.new_group(backend="gloo", timeout=processes.COLLECTIVE_TIMEOUT) if several else None

    def save(self, step):
        """Begin to save the state after `step`; waits for the save before. A collective."""
        args, monitor, accelerator = self.args, self.monitor, self.accelerator
        begin = time.perf_counter()
        self.wait()
        if warning := accelerator.is_main_process and space_warning(args.output_dir):
            monitor.console.say(warning)
        self.last_step, self.last_time = step, time.monotonic()
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None and uses_nvme(plugin.deepspeed_config):  # also after a signal, where --save_steps 0 does not count
            monitor.write({"step": step, "save_failed": "states on NVMe are not saved: DeepSpeed does not restore them"})
            return
        with monitor.paused():
            tensors, metadata = state_files.tensors_to_save(accelerator, self.model, self.optimizer, self.settled)
            behind = self.has_room(sum(map(size_of, tensors.values())))
            self.copies = copied(tensors, self.copies) if behind else {}
            content = self.facts | self.counts | {name: state() for name, state in self.states.items()}
            content |= {"format": FORMAT, "step": step, "scaler": scaler_state(accelerator, self.optimizer)}
            self.job = Job(self, begin, content, self.copies or tensors, metadata)
            if behind:
                self.job.thread.start()
            else:
                self.job.run()
            self.job.stall = time.perf_counter() - begin
        if self.job.stall > args.hang_timeout_seconds / 2:
            monitor.console.say(
                "warning: a save takes more than half of --hang_timeout_seconds, after which it would count as a stall"
            )
        self.tell()

    def has_room(self, size):
        """Tell whether copies of `size` bytes on each process of this machine fit into its memory; say so once."""
        here, free, held = 1 + len(processes.neighbours()), free_host_bytes(), sum(map(size_of, self.copies.values()))
        fits = (size - held + given_back()) * here <= ROOM * free
        if not self.told:
            words = f"saves: {size * here / GIB:.3f} GiB a node are copied to host memory ({free / GIB:.3f} free) and written"
            self.monitor.console.say(f"{words} {'behind the training' * fits or 'while it waits, as they do not fit'}")
        self.told = True
        return fits

    def tell(self):
        """Write the record of a save that has ended since; on every step, and no collective."""
        if self.job is not None and not self.job.thread.is_alive():
            job, self.job = self.job, None
            if job.error is not None:
                raise job.error
            self.cost = job.stall
            self.monitor.write({"step": job.content["step"], **job.record, "save_stall_seconds": round(job.stall, 3)})
            self.monitor.draw()

    def wait(self):
        """Wait until the state is on the disk, or its save has failed."""
        if self.job is not None:
            with self.monitor.paused():
                if self.job.thread.ident is not None:
                    self.job.thread.join()
            self.tell()

    def time_is_up(self):
        """Tell, on the main process, whether a save is due by the clock; by --save_steps auto the first is, to know its cost."""
        if not self.accelerator.is_main_process or self.job is not None:
            return False
        every = [self.args.save_every_seconds] if self.args.save_every_seconds else []
        if self.automatic:
            every.append(best_interval(self.cost, 3600 * self.args.mean_hours_between_failures))
        return bool(every) and time.monotonic() - self.last_time >= min(every)


def size_of(tensor):
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def copied(tensors, copies):
    """Return {name: copy in host memory} of tensors, in the memory of earlier copies where they are alike."""
    made = {}
    for name, tensor in tensors.items():
        old = copies.get(name)
        alike = old is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
        made[name] = old.copy_(tensor) if alike else tensor.to("cpu", copy=True)
    return made


class Job:
    """One save: what is to be written, and in the end its record. run: in a thread, or called."""

    def __init__(self, saver, begin, content, tensors, metadata):
        self.accelerator, self.group, self.args = saver.accelerator, saver.group, saver.args
        self.begin, self.content, self.tensors, self.metadata = begin, content, tensors, metadata
        self.stall, self.record, self.error = 0.0, {}, None
        self.thread = threading.Thread(target=self.run, name="save", daemon=True)

    def run(self):
        """Write this rank's file, agree with the others, and commit; a collective of the saves' own group."""
        try:
            self.record = self.write_checkpoint()
        except Exception as error:  # raised where the training is, by tell
            self.error = error
        self.tensors = None

    def write_checkpoint(self):
        """Return {"checkpoint_bytes", "save_seconds"}, or {"save_failed": why} after a failure on any rank, with nothing left."""
        errors, files, rank = [], {}, self.accelerator.process_index
        folder = Path(self.args.output_dir) / f"checkpoint-{self.content['step']}"
        temporary = Path(f"{folder}.tmp")
        if self.accelerator.is_main_process:
            with noting(errors):
                for leftover in Path(self.args.output_dir).glob("checkpoint-*.tmp"):
                    shutil.rmtree(leftover)
                temporary.mkdir(parents=True)
        if not (failed := self.gather(errors)):
            with noting(errors):
                name = state_files.file_name(rank)
                files[name] = state_files.write(temporary / name, self.tensors, self.metadata)
            files = dict(self.gather(list(files.items())))
            failed = self.gather(errors)
        if not failed and self.accelerator.is_main_process:
            with noting(errors):
                commit(temporary, folder, self.content | {"files": files}, self.args.save_total_limit, self.args.keep_every)
        if failed := failed or self.gather(errors):
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            return {"save_failed": "; ".join(failed)}
        size = sum(facts["bytes"] for facts in files.values())
        return {"checkpoint_bytes": size, "save_seconds": round(time.perf_counter() - self.begin, 3)}

    def gather(self, mine):
        """Return the lists of all ranks as one, the same on each."""
        if self.group is None:
            return list(mine)
        everyone = [None] * self.accelerator.num_processes
        dist.all_gather_object(everyone, mine, group=self.group)
        return [item for part in everyone for item in part]


def best_interval(cost, between_failures):
    """Return the seconds between saves that lose least to saves and failures together: sqrt(2 x cost x mean time between failures).

    cost: seconds that a save takes from the training. Young, Communications of the ACM 17 (1974); Daly, FGCS 22 (2006), whose
    further terms matter only where saves take a good part of the time.
    """
    return math.sqrt(2 * cost * between_failures)


@contextlib.contextmanager
def noting(errors):
    """Turn an exception into an entry of `errors`, for ranks that must meet again in an agreement."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):  # explained by this rank, which ends the others
            raise
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


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
            # By another name first: a kill within the removal leaves no half of a checkpoint, and the next save clears it away.
            gone = old.with_name(f"{old.name}.tmp")
            with contextlib.suppress(OSError):
                os.rename(old, gone)
                shutil.rmtree(gone, ignore_errors=True)


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
