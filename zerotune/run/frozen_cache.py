"""--cache_frozen: outputs of a frozen encoder, or of frozen bottom blocks, computed in the first epoch and read in the others."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device

from zerotune.engine.frozen import frozen_checksum
from zerotune.engine.processes import first_on_each_node, neighbours
from zerotune.errors import UserError
from zerotune.model.packing import check_exact
from zerotune.model.prefix import CachedPrefix
from zerotune.rows import IGNORE
from zerotune.rows.prefix_states import PrefixStates
from zerotune.run.records import GIB, add_to_run


class FrozenCache:
    """Goes along with a run; without --cache_frozen it does nothing."""

    def __init__(self, args, model):
        """model: before it is wrapped for training."""
        self.args, self.epoch, self.prefix, self.states = args, None, None, None
        if args.cache_frozen:
            self.prefix = CachedPrefix(model.get_base_model() if args.peft else model)

    def open(self, run, forward_loss):
        """Have the model show that it can be cached, and make or find the cache of these weights and rows; a collective."""
        if self.prefix is None:
            return
        if 1 + len(neighbours()) < run.accelerator.num_processes:
            raise UserError("--cache_frozen: its ranks write one file, which is safe on one machine alone; leave it out on several")
        self.run, data, accelerator = run, run.data, run.accelerator
        dtype, width = self.try_out(forward_loss)
        weights = frozen_checksum(accelerator, run.model, run.precision, self.prefix.parameters)
        lengths = data.costs["train"][:, 0]
        facts = {
            "weights": weights,
            "model configuration": run.fingerprint["model configuration"],  # equal weights may compute otherwise
            "modules": f"{len(self.prefix.modules)} x {type(self.prefix.modules[0]).__name__}",
            "rows": data.digest("train"),
            "lengths": hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).tobytes()).hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            "width": width,
            "mixed_precision": self.args.mixed_precision,
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.states = PrefixStates(Path(self.args.cache_frozen) / name, lengths, width, dtype)
        size = f"{len(lengths):,} rows, {int(self.states.ends[-1]):,} tokens x {self.states.row_bytes:,} bytes"
        run.console.say(f"frozen cache: {size} = {self.states.num_bytes / GIB:.3f} GiB in {self.states.folder}")
        first_on_each_node(accelerator, lambda: self.states.make(facts))
        self.refresh()
        self.prefix.states = self.states

    def refresh(self):
        """Look on all ranks which rows are there, while none writes; a collective."""
        self.run.accelerator.wait_for_everyone()
        self.states.refresh()
        there = int(self.states.there.sum())
        self.run.console.say(f"frozen cache: {there:,} of {len(self.states.there):,} rows are there")
        self.run.accelerator.wait_for_everyone()

    def begin(self, step):
        """Before a step, counted from 1: where an epoch begins, what all ranks have computed is there for all."""
        if self.prefix is None:
            return
        epoch = self.run.schedule.rows_at(step - 1) // len(self.states.there)
        if self.epoch not in (None, epoch) and not self.states.whole:
            self.states.flush()
            self.refresh()
        self.epoch = epoch

    def keep(self):
        """Make what was computed last, so that a run that goes on from here finds it."""
        if self.prefix is not None:
            self.states.flush()

    def end(self):
        """Keep what was computed, and write into run.json what was read."""
        if self.prefix is None:
            return
        self.states.flush()
        self.refresh()
        if self.run.accelerator.is_main_process:
            facts = {"folder": str(self.states.folder), "bytes": self.states.num_bytes, "bytes_a_token": self.states.row_bytes}
            facts |= {"rows": len(self.states.there), "rows_there": int(self.states.there.sum()), "passes": self.prefix.passes}
            add_to_run(self.args.output_dir, {"frozen_cache": facts})

    def try_out(self, forward_loss):
        """Return (type, width) of the states; UserError unless two rows' targets lose the same with them as without.

        Twice computed, with other random numbers, they have to be the same bits, or dropout is at work in what is frozen.
        """
        run = self.run
        columns, rows = run.data.rows["train"][[0, min(1, len(run.data.rows["train"]) - 1)]], np.arange(2)
        batch = send_to_device(run.collator.training(columns), run.accelerator.device)
        labels, trial, losses = batch.pop("labels"), Trial(), []
        self.prefix.states = trial
        for seed, known in ((1, False), (2, False), (2, True)):
            trial.there[:] = known
            torch.manual_seed(seed)
            with run.accelerator.no_sync(run.model), run.accelerator.autocast():
                given = {**batch, "frozen_rows": (rows, rows)}
                losses.append(forward_loss(run.model, given, labels, chunked=self.args.loss_chunks > 0)[1][labels != IGNORE])
        if not torch.equal(*trial.kept):
            raise UserError("--cache_frozen: what is frozen gives other numbers each time, as by dropout; leave the cache out")
        check_exact(losses[1], losses[2], run.precision, "--cache_frozen", "with its frozen part cached than computed")
        self.prefix.passes = dict.fromkeys(self.prefix.passes, 0)
        kept = trial.kept[0]
        return (run.precision if self.prefix.whole else kept.dtype), kept.shape[-1]


class Trial:
    """States of two rows in memory."""

    def __init__(self):
        self.there, self.kept, self.whole = np.zeros(2, dtype=bool), [], False

    def write(self, rows, states):
        self.kept.append(states)

    def read(self, rows):
        return self.kept[-1]
