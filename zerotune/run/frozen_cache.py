"""--cache_frozen: outputs of a frozen encoder, or of frozen bottom blocks, computed in the first epoch and read in the others.

A run that finds the outputs of all rows reads nothing of the weights behind them: an earlier run has left a note of what these are,
and that the losses with the cache are those without it. They stay in the model's files until an evaluation or final/ wants them.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from transformers.utils import find_adapter_config_file

from zerotune.engine.ending import write_whole
from zerotune.engine.frozen import checksum_of, checksum_words, frozen_checksum
from zerotune.engine.processes import first_on_each_node, neighbours, ranks_where, unwrap
from zerotune.errors import UserError
from zerotune.model.loading import stored_names
from zerotune.model.packing import check_exact
from zerotune.model.prefix import CachedPrefix
from zerotune.model.unread import Unread, read_tensor
from zerotune.rows import IGNORE
from zerotune.rows.cache import file_sha256
from zerotune.rows.prefix_states import PrefixStates
from zerotune.run.arguments import LED_TO_BY
from zerotune.run.records import GIB, add_to_run, package_versions, sha256_of
from zerotune.source import source_hash

# Of what a resume looks at, what cannot change the outputs of the frozen part: the update, and how rows are dealt.
UNSEEN = {"warm-up steps", "steps of the schedule", "rows a step", "processes", "reduce"}
UNSEEN |= set(LED_TO_BY["rows a step"]) | {"max_tokens_per_micro_batch", "--group_by_length", "--length_window", "--optim"}
UNSEEN |= {
    f"--{name}" for name in "learning_rate muon_learning_rate lr_scheduler_type weight_decay max_grad_norm max_loss_spike".split()
}

NOTED = "weights", "frozen", "dtype", "width", "unread", "folder"  # what a note says


class FrozenCache:
    """Goes along with a run; without --cache_frozen it does nothing."""

    def __init__(self, run):
        """Before the model is loaded; a collective."""
        self.run, self.args, self.epoch, self.prefix, self.states = run, run.args, None, None, None
        self.found = self.unread = None
        if self.args.cache_frozen:
            self.note = self.name_of_note() if run.accelerator.is_main_process else None
            self.found = broadcast_object_list([self.whole_one()])[0]
        if self.found and self.found["unread"]:
            self.unread = Unread(self.found["unread"], stored_names(self.args.model_name_or_path))

    def name_of_note(self):
        """Return the name of a note on the frozen weights and a pass through them, from what both follow from.

        None where that is more than the safetensors, the flags and the pinned code.
        """
        run, args, files = self.run, self.args, sorted(set(stored_names(self.args.model_name_or_path).values()))
        other_files = any(getattr(run.config, name, None) for name in ("auto_map", "transformers_weights"))
        adapted = find_adapter_config_file(args.model_name_or_path)  # transformers loads an adapter that lies beside
        if not files or other_files or adapted or args.quantize or args.liger:
            return None
        facts = {name: value for name, value in (run.fingerprint | run.layout).items() if name not in UNSEEN}
        facts |= {name: getattr(self.args, name) for name in ("frozen_dtype", "activation_offload")}
        facts |= {"files": list(map(file_sha256, files)), "versions": package_versions(), "source": source_hash()}
        facts |= {"device": run.accelerator.device.type, "stage": run.strategy.zero_stage, "DeepSpeed": run.plugin is not None}
        return f"tried-{sha256_of(facts)[:16]}.json"

    def whole_one(self):
        """Return what the note on a cache that holds the states of all rows says, None without one."""
        for note in Path(self.args.cache_frozen).glob(f"*/{self.note}") if self.note else ():
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                content = json.loads(note.read_text())
                content = {name: content[name] for name in NOTED}
                whole = set((note.parent / "done.bin").read_bytes()) == {1} and (note.parent / "states.bin").stat().st_size
                if whole and content["folder"] == note.parent.name:
                    return content
        return None

    def follow(self, model):
        """Have a model, before it is wrapped for training, give and take its frozen part's outputs."""
        if self.args.cache_frozen:
            by_block = self.run.strategy.zero_stage == 3
            self.prefix = CachedPrefix(model.get_base_model() if self.args.peft else model, self.unread, by_block)
            if ((self.run.strategy.config or {}).get("zero_optimization") or {}).get("zero_quantized_weights"):
                self.prefix.own = []  # shards that DeepSpeed quantises have to be on the device

    def frozen_checksum(self, parameters):
        """Return engine.frozen's checksum of all that is frozen, known if the cache is whole; a collective."""
        run = self.run
        self.frozen = self.found["frozen"] if self.found else frozen_checksum(run.accelerator, run.model, run.precision, parameters)
        return self.frozen

    def open(self, forward_loss):
        """Have the model show that it can be cached, and make or find the cache of these weights and rows; a collective."""
        if self.prefix is None:
            return
        run, data, accelerator = self.run, self.run.data, self.run.accelerator
        several = 1 + len(neighbours()) < accelerator.num_processes
        if several and not self.found:
            raise UserError(
                f"--cache_frozen {self.args.cache_frozen}: no run with these flags and files has left a whole cache there, and "
                "several machines do not fill one; fill it on one machine, with the same strategy, or leave it out"
            )
        tried = self.found
        if not tried:
            dtype, width = self.try_out(forward_loss)
            tried = {"weights": frozen_checksum(accelerator, run.model, run.precision, self.prefix.parameters)}
            tried |= {"frozen": self.frozen, "dtype": str(dtype).removeprefix("torch."), "width": width}
            tried["unread"] = self.as_stored()
        lengths = data.costs["train"][:, 0]
        facts = {
            "weights": tried["weights"],
            "model configuration": run.fingerprint["model configuration"],  # equal weights may compute otherwise
            "modules": f"{len(self.prefix.modules)} x {type(self.prefix.modules[0]).__name__}",
            "rows": data.digest("train"),
            "lengths": hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).tobytes()).hexdigest(),
            "dtype": tried["dtype"],
            "width": tried["width"],
            "mixed_precision": self.args.mixed_precision,
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.states = PrefixStates(Path(self.args.cache_frozen) / name, lengths, tried["width"], getattr(torch, tried["dtype"]))
        if several and (blind := ranks_where(not self.states.folder.exists(), accelerator)):
            raise UserError(
                f"--cache_frozen {self.args.cache_frozen}: ranks {blind} do not see {name} in it, which machine 0 has; give a "
                "folder on a file system that all machines share"
            )
        size = f"{len(lengths):,} rows, {int(self.states.ends[-1]):,} tokens x {self.states.row_bytes:,} bytes"
        run.console.say(f"frozen cache: {size} = {self.states.num_bytes / GIB:.3f} GiB in {self.states.folder}")
        first_on_each_node(accelerator, lambda: self.states.make(facts))
        if self.note and not self.found:
            with contextlib.suppress(OSError):  # the next run tries again
                write_whole(self.states.folder / self.note, json.dumps(tried | {"folder": name}) + "\n")
        self.refresh()
        self.prefix.states = self.states
        if self.unread:
            run.console.say(f"frozen cache: {self.unread.num_bytes / GIB:.3f} GiB of frozen weights are not read")

    def as_stored(self):
        """Return {name: type} of what only the frozen part uses if the model's files hold it under the same names; a collective.

        An empty dictionary otherwise, and where a compiled model would have to read it.
        """
        run, own, total = self.run, set(map(id, self.prefix.own)), torch.zeros((), dtype=torch.int64)
        there = frozen_checksum(run.accelerator, run.model, run.precision, self.prefix.own)
        if not self.note or not own or self.args.torch_compile:
            return {}
        stored, types = stored_names(self.args.model_name_or_path), {}
        for name, parameter in unwrap(run.model).named_parameters():
            if id(parameter) in own:
                name_in_file = name.removeprefix("base_model.model.")
                weights = read_tensor(stored, name_in_file)
                if weights is None or weights.shape != getattr(parameter, "ds_shape", parameter.shape):
                    return {}
                types[name_in_file] = str(parameter.dtype).removeprefix("torch.")
                total += checksum_of(name, weights.flatten().to(run.precision))
        return types if there == checksum_words(run.precision, total) else {}

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
