"""What a run leaves for people and programs to read: run.json, metrics.jsonl, and the console.

One record is one dict: the same numbers go to metrics.jsonl, to the console and to a tracker.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm.auto import tqdm

from zerotune.engine.tensor_parallel import copies
from zerotune.errors import UserError, nearest
from zerotune.rows.collation import TERMS, count_tokens, shape_terms

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "evaluate", "peft")
SECRET = re.compile(r"(token|secret|password|api_?key)(?!izer|s_)", re.IGNORECASE)
GIB = 2**30
IMPORTED = time.perf_counter()


def finite(value):
    """Return a value with what JSON has no word for (nan, inf) as None, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(value):
    """Return the SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path, content):
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(finite(content), indent=2, default=str, allow_nan=False) + "\n")
    os.replace(temporary, path)


def package_versions():
    """Return {package: version} of Python and the libraries, None for one that is not installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def environment_facts():
    """Return versions, commit, command line and machine; nothing secret is in them."""
    root = Path(__file__).resolve().parents[2]
    describe = ["git", "-C", root, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]  # -dirty: changes beside it
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"versions": package_versions(), "git_commit": commit or None, "command_line": redact(sys.argv), "device": device}


def facts_of(run, engine):
    """Return what run.json holds of train.py's run before its first step, as a dict."""
    args = run.args
    content = {
        "arguments": vars(args),
        "engine": engine,
        "deepspeed_config": run.plugin and run.plugin.deepspeed_config,
        "resumed_from": run.found,
        "legs": legs(args.output_dir, run.begin, run.layout, run.changes),
        "host_memory_before_model_gib": run.host_memory_before_model,
        "data": run.data_report,
        "auto_batch": run.auto_batch,
        "labels": run.data.labels,
    }
    return content | run.schedule.facts() | run.freeze_report.facts()


def write_run(output_dir, content):
    """Write run.json, the description of a run, before its first step; UserError if that cannot be done."""
    with writable(output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(output_dir) / "run.json", content)


def add_to_run(output_dir, facts):
    """Put facts that are known late into run.json."""
    path = Path(output_dir) / "run.json"
    with contextlib.suppress(OSError):  # a full disk: said already when it was
        write_json(path, json.loads(path.read_text()) | facts)


def legs(output_dir, step, layout, changes):
    """Return run.json's list of a run's launches, this one last: where it began, when, how it is laid out and what changed."""
    path = Path(output_dir) / "run.json"
    before = json.loads(path.read_text()).get("legs", []) if step and path.exists() else []
    leg = {"from_step": step, "started": datetime.now().astimezone().isoformat(timespec="seconds"), "machine": platform.node()}
    return [*before, leg | {"strategy": layout["strategy"], "num_processes": layout["processes"], "changes": changes}]


@contextlib.contextmanager
def writable(output_dir):
    """Turn a failure of a run's first writes into the user's mistake that it is."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir}: {error.filename}: {error.strerror}; give a folder that can be written"
        ) from None


def seconds_since_launch():
    """Return the seconds since this run was started: since its launcher was, where there is one, this process's parent."""
    try:
        started = process_start(os.getppid() if "WORLD_SIZE" in os.environ else os.getpid())
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # no /proc: since this module was imported
        return time.perf_counter() - IMPORTED


def process_start(pid):
    """Return when a process was started, in seconds since the machine was (proc(5), field 22 of stat)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def redact(words):
    """Return a command line with the values of flags that look like secrets hidden."""
    result = []
    for word in words:
        flag, _, value = word.partition("=")
        if result and SECRET.search(result[-1]) and result[-1].startswith("--") and "=" not in result[-1]:
            word = "***"
        elif flag.startswith("--") and value and SECRET.search(flag):
            word = f"{flag}=***"
        result.append(word)
    return result


def peak_memory():
    """Return peak_device_memory_gib (torch's allocator; 0 without a GPU) and peak_host_memory_gib (resident) of this process."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_device_memory_gib": round(device / GIB, 3), "peak_host_memory_gib": round(host / GIB, 3)}


def check_tracker(name):
    """Raise UserError unless accelerate knows the tracker and its package is installed (accelerate would go on without it)."""
    if name == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name in {str(getattr(known, "value", known)) for known in get_available_trackers()}:
        return
    known = sorted(str(getattr(tracker, "value", tracker)) for tracker in LOGGER_TYPE_TO_CLASS)
    if name in known:
        raise UserError(f"--report_to {name}: its package is not installed; pip install it, or --report_to none")
    raise UserError(f"--report_to {name}: allowed: none, {', '.join(known)}{nearest(name, known)}")


class Console:
    """Prints on one rank: a progress bar where there is a terminal, plain lines where there is none."""

    def __init__(self, active):
        self.active, self.bar = active, None
        self.terminal = sys.stderr.isatty()

    def say(self, text):
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step, max_steps):
        if self.active and self.terminal:
            self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self):
        if self.bar is not None:
            self.bar.update()

    def show(self, record):
        """Show a record: beside the bar if it is a training one and there is a bar, else as a line."""
        if self.bar is not None and record.get("loss") is not None:
            memory = record["peak_device_memory_gib"] or record["peak_host_memory_gib"]
            numbers = f"{record['tokens_per_second']:,.0f} tokens/s, {memory:.1f} GiB"
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {numbers}")
        else:
            self.say("  ".join(f"{key} {number(value)}" for key, value in record.items() if not isinstance(value, (dict, list))))

    def stop(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def number(value):
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


class Metrics:
    """metrics.jsonl, the console and a tracker, fed with the same records; only the main process writes."""

    def __init__(self, output_dir, console, accelerator, step):
        """step: where the run starts; records of later steps, from a run that was cut off, are taken out of the file."""
        self.path, self.console, self.accelerator = Path(output_dir) / "metrics.jsonl", console, accelerator
        self.cut_off_at_step = None  # the last step of the run before that is known of, if it is to be taken again
        if accelerator.is_main_process:
            with writable(output_dir):
                lines = self.path.read_text().splitlines() if self.path.exists() else []
                kept = [line for line in lines if step_of(line) <= step]
                later = [step_of(line) for line in lines if step < step_of(line) < float("inf")]
                self.cut_off_at_step = max(later, default=None)
                temporary = Path(f"{self.path}.tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                os.replace(temporary, self.path)

    def write(self, record):
        if self.accelerator.is_main_process:
            try:
                self._append(record)
            except OSError as error:  # a full disk costs the record, not the run
                self.console.say(f"warning: {self.path}: {error.strerror}; the record is shown here alone")
        self.console.show(record)
        scalars = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        self.accelerator.log(scalars, step=record["step"])

    def _append(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")


def step_of(line):
    """Return a record's step; a line torn by a kill counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


class Window:
    """Sums over the steps since the last record; tensors stay on the device until `record` reads them, once."""

    def __init__(self, accelerator, with_shapes=False, rows_apart=False):
        """with_shapes: add `shape_terms`, from which zerotune.tools.flops gets FLOPs, to the records; rows_apart: for it."""
        self.accelerator, self.with_shapes, self.rows_apart = accelerator, with_shapes, rows_apart
        self.restart()

    def restart(self):
        self.loss_sum = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        self.target_tokens = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        self.real_tokens = self.padded_tokens = self.steps = 0
        self.shape_terms = [0] * len(TERMS)
        self.begin = time.perf_counter()

    def add_step(self, loss_sum, targets):
        """Count one optimizer step: its summed loss on this rank and the target tokens of all ranks, device scalars."""
        self.loss_sum += loss_sum
        self.target_tokens += targets
        self.steps += 1

    def add_batch(self, batch):
        """Count the tokens of one collated micro-batch, from its tensors on the CPU."""
        real, padded = count_tokens(batch)
        self.real_tokens, self.padded_tokens = self.real_tokens + real, self.padded_tokens + padded
        if self.with_shapes:
            terms = shape_terms(batch, self.rows_apart)
            self.shape_terms = [total + term for total, term in zip(self.shape_terms, terms, strict=True)]

    @contextlib.contextmanager
    def paused(self):
        """Leave what happens inside (an evaluation, a save) out of the step time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.begin += time.perf_counter() - begin

    def record(self, step, epoch, learning_rate, grad_norm, **more):
        """Return the training record of the steps since the last one, over all ranks, and start the next window."""
        memory = peak_memory()
        host = [self.real_tokens, self.padded_tokens, *self.shape_terms, *memory.values()]
        mine = torch.cat([self.loss_sum[None], torch.tensor(host, device=self.accelerator.device, dtype=torch.float64)])
        ranks = self.accelerator.gather(mine[None])
        copies_of_row = copies(self.accelerator)
        sums = ranks[:, : -len(memory)].sum(0) / copies_of_row
        (loss_sum, real, padded), terms = sums[:3].tolist(), sums[3:].tolist()
        seconds, targets = time.perf_counter() - self.begin, self.target_tokens.item() / copies_of_row
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss_sum / targets if targets else None,  # every step of the window was skipped
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "target_tokens": int(targets),
            "real_tokens": int(real),
            "tokens_per_second": round(real / seconds, 1),
            "padding_fraction": round(1 - real / padded, 4),
            "step_seconds": round(seconds / max(1, self.steps), 6),
            **dict(zip(memory, ranks[:, -len(memory) :].max(0).values.tolist(), strict=True)),
            **more,
        }
        if self.with_shapes:
            record["shape_terms"] = [int(term) for term in terms]
        self.restart()
        return record
