"""Out of memory, explained: in which phase, over which rows, by what, beside what was planned, and what would fit.

One rank speaks, for all that run out at the same time, and ends the other ranks of its machine, which would wait for it.
"""

import contextlib
import errno
import gc
import os
import shlex
import signal
import sys
import time
import traceback

import torch

from zerotune.engine import processes
from zerotune.engine.ending import finish, leave_code, leave_note
from zerotune.plan.report import gib
from zerotune.run.profiling import memory_gib
from zerotune.run.records import GIB, peak_memory

PHASES = {  # functions, by name, and what goes on in them; the innermost one counts
    "load_rows": "reading the rows",
    "load_model": "loading the model",
    "resume": "loading the checkpoint",
    "probe": "trying the longest micro-batch",
    "train": "a step",
    "evaluate": "an evaluation",
    "generate": "generating",
    "save": "a save",
    "write_checkpoint": "a save",
    "export": "the export",
}
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "bad allocation",
    "Cannot allocate memory",
)
EXIT_CODE = 2
RESERVE = 1 << 25
PATIENCE = 60  # seconds
NUM_TENSORS = 8


def is_out_of_memory(error):
    """Tell whether an exception means that a device or the host had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


@contextlib.contextmanager
def explained(run):
    """Turn running out of memory in a run into a report, and end the process with code 2; all else passes."""
    if run.args.memory_snapshot:
        torch.cuda.memory._record_memory_history()
    reserve = bytearray(RESERVE)  # host memory to explain with; never written, so that it takes address space alone
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        del reserve
        if run.args.memory_snapshot:
            torch.cuda.memory._dump_snapshot(run.args.memory_snapshot)
        end(run, error)


def end(run, error):
    """Print the report and end this process and the node's other ranks."""
    rank = run.accelerator.process_index
    if rank > 0:
        time.sleep(5)  # rank 0 speaks if it has run out as well, and then ends this one
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    error.__traceback__ = None  # with it and its frames goes what the failed pass held, or nothing below would find memory
    said = []
    for part in (lambda: report(run, frames, error), frames.clear, lambda: what_would_fit(run)):
        try:
            lines = part() or []
        except Exception as another:  # planning needs memory as well
            reason = f"{type(another).__name__}: {' '.join(str(another).split())[:100]}"
            lines = [f"no memory is left to say more ({reason}); python -m zerotune plan says what fits"]
        lines = [f"train.py: out of memory: {line}\n" for line in lines]
        print(*lines, sep="", end="", file=sys.stderr, flush=True)
        said += lines
    leave_note(said[0].strip(), "".join(said))
    if (job := getattr(getattr(run, "saver", None), "job", None)) and job.thread.ident:
        job.thread.join(PATIENCE)  # a save that was under way: all ranks are still there to finish it
    leave_code(EXIT_CODE)  # before the launcher ends this process for the loss of the others
    for pid in processes.neighbours():
        processes.signal_to(pid, signal.SIGKILL)
    finish(EXIT_CODE)


def report(run, frames, error):
    """Return lines: phase and batch, memory by category, the largest tensors that are alive."""
    names = [PHASES[frame.f_code.co_name] for frame in frames if frame.f_code.co_name in PHASES]
    phase = names[-1] if names else "the start"
    lines = [f"rank {run.accelerator.process_index}, in {phase}{where(run, frames, phase)}"]
    lines.append(" ".join(str(error).split())[:300] or type(error).__name__)
    model, optimizer = getattr(run, "model", None), getattr(run, "optimizer", None)
    peak = peak_memory()
    place = "device" if torch.cuda.is_available() else "host"
    words = [f"peak of the {place} {peak[f'peak_{place}_memory_gib']:.3f}"]
    if model is not None:
        words += [f"{kind} {size:.3f}" for kind, size in memory_gib(model, optimizer)[place].items()]
    lines.append(f"GiB at this moment: {', '.join(words)}")
    if tensors := largest_tensors(model, optimizer):
        lines.append(f"largest tensors alive: {'; '.join(tensors)}")
    return lines


def where(run, frames, phase):
    """Return the step, the batch with its shape and the lines of its rows, and the module that asked for memory, in words."""
    words, shape = "", ""
    for frame in frames:
        names = frame.f_locals
        if phase == PHASES["train"] == PHASES.get(frame.f_code.co_name) and "micro_batches" in names:
            step, index = names["step"], names.get("index", 1)
            lines = run.training_steps.lines_of_micro_batch(step - 1, index - 1)
            shown = ", ".join(map(str, lines[:20])) + ", ..." * (len(lines) > 20)
            words = f" (step {step}, micro-batch {index}: lines {shown} of the training rows)"
        batch = names.get("batch")
        if isinstance(batch, dict) and "input_ids" in batch:
            parts = [" x ".join(map(str, batch[n].shape)) for n in ("input_ids", "decoder_input_ids") if n in batch]
            shape = f", batch of {' + '.join(parts)} tokens"
    words += shape
    model = getattr(run, "model", None)
    modules = {id(module): name for name, module in model.named_modules()} if model is not None else {}
    inside = [modules[id(frame.f_locals["self"])] for frame in frames if id(frame.f_locals.get("self")) in modules]
    return words + (f", in {inside[-1]}" if inside and inside[-1] else "")


def largest_tensors(model, optimizer):
    """Return the largest tensors that Python knows, each storage once, with their parameter's or module's name, in words."""
    names = {}
    if model is not None:
        for name, parameter in model.named_parameters():
            names[id(parameter)] = name
            names[id(parameter.grad)] = f"gradient of {name}"
        for parameter, state in getattr(optimizer, "state", {}).items():
            for what, tensor in state.items() if isinstance(state, dict) else ():
                names[id(tensor)] = f"{what} of {names.get(id(parameter), 'a parameter')}"
    found = {}
    for thing in gc.get_objects():
        with contextlib.suppress(Exception):  # what others left half alive
            if isinstance(thing, torch.Tensor) and thing.untyped_storage().nbytes() > 0:
                key = thing.untyped_storage().data_ptr()
                if key not in found or id(thing) in names:
                    found[key] = (
                        thing.untyped_storage().nbytes(),
                        names.get(id(thing), "unnamed"),
                        tuple(thing.shape),
                        thing.dtype,
                    )
    largest = sorted(found.values(), key=lambda facts: -facts[0])[:NUM_TENSORS]
    return [
        f"{size / GIB:.3f} GiB {name} {list(shape)} {str(dtype).removeprefix('torch.')}" for size, name, shape, dtype in largest
    ]


def what_would_fit(run):
    """Return lines: what this run was planned to take, the smallest changes that would fit, and this launch."""
    run.model = run.optimizer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    fit = getattr(run, "fit", None)
    lines = []
    if fit is not None:
        forecast = fit.forecast()
        planned = ", ".join(f"{kind} {gib(size)}" for kind, size in forecast.device.items())
        lines.append(f"GiB planned: {forecast.problem or f'{planned}, together {gib(forecast.device_bytes)}'}")
        lines += fit.changes()
    strategy = f"STRATEGY={run.strategy.stem} NUM_PROCESSES={run.strategy.num_processes}"
    return [*lines, f"this launch: {strategy} bash scripts/launch.sh {shlex.join(sys.argv[1:])} (process {os.getpid()})"]
