"""A run of train.py whose steps are taken apart, and taken by a bare PyTorch loop as well: the child processes of overhead.py.

    python tests/step_clock.py OUT.json --model_name_or_path ... (train.py's flags)

Between two steps of train.py's loop the bare one takes the same step on a model of its own, in the same process, so that both see
the same moments of a noisy machine; which goes first alternates. With several processes there is no bare loop. The last step but
one counts bytes, the last one Python calls; they have no times.
"""

import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from zerotune.engine.ending import exit_with  # noqa: E402
from zerotune.errors import UserError  # noqa: E402
from zerotune.model.freezing import apply_rules  # noqa: E402
from zerotune.model.loading import load_model  # noqa: E402
from zerotune.rows import IGNORE  # noqa: E402
from zerotune.run.arguments import parse_arguments  # noqa: E402
from zerotune.run.profiling import Traffic  # noqa: E402

PARTS = ("forward", "backward", "clip", "optimizer")  # of a step; what is left is the loop's own
COUNTED = 2  # steps without times


class Clock:
    """Seconds of a step by part; in the last step Python calls outside the parts, instead."""

    def __init__(self):
        self.seconds, self.calls, self.inside, self.counting = Counter(), Counter(), 0, False

    def around(self, owner, name, part):
        """Have calls of owner.name count as a part."""
        inner = getattr(owner, name)

        def call(*arguments, **options):
            self.inside += 1
            begin = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.seconds[part] += time.perf_counter() - begin

        setattr(owner, name, call)

    def after_passes(self, reduction):
        """Have what DeepSpeed does when a step's passes are over, gradients reduced once, count as the optimizer's part."""
        inner = reduction.of_step

        @contextlib.contextmanager
        def of_step():
            with contextlib.ExitStack() as stack:
                stack.enter_context(inner())
                yield
                self.inside += 1
                begin = time.perf_counter()
            self.inside -= 1
            self.seconds["optimizer"] += time.perf_counter() - begin

        reduction.of_step = of_step

    def count(self, frame, event, argument):
        """Count a call, for sys.setprofile."""
        if event == "call" and not self.inside and frame.f_code.co_qualname != "Clock.around.<locals>.call":
            self.calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"] += 1


def bare_loop(args, config, tokenizer):
    """Return a function from micro-batches to a step's mean loss: a loop as one writes it by hand, on a model of its own."""
    model, _ = load_model(args, config, tokenizer, None, torch.float32, None)
    apply_rules(model, args.freeze, args.unfreeze)
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, weight_decay=0.0, fused=True)

    def step(micro_batches):
        targets, total = sum((batch["labels"] != IGNORE).sum() for batch in micro_batches), 0.0
        for batch in micro_batches:
            labels = batch.pop("labels")
            logits = model(**batch).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum") / targets
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(learning, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def begun(words):
    """Return (train.py's run of a command line just before its loop, the number of steps that are done)."""
    run = train.setup(parse_arguments(words))
    train.load_rows(run)
    train.cut_steps(run)
    train.load_model(run)
    start = train.resume(run)
    train.accompany(run, start)
    return run, start


def main(out, words):
    run, start = begun(words)
    args = run.args
    alone = run.accelerator.num_processes == 1
    bare = bare_loop(args, run.config, run.tokenizer) if alone else None
    clock, steps, losses, inner = Clock(), [], [], run.monitor.steps
    for owner, name, part in (
        (train, "forward_loss", "forward"),
        (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "clip"),
        (run.optimizer, "step", "optimizer"),
    ):
        clock.around(owner, name, part)

    clock.after_passes(run.reduction)
    traffic = Traffic()

    def bare_seconds(micro_batches, facts):
        begin = time.perf_counter()
        facts["bare_loss"] = bare(micro_batches)
        facts["bare_seconds"] = time.perf_counter() - begin

    def clocked(loader, first):
        iterator = inner(loader, first)
        for number in range(args.max_steps):
            left, facts = args.max_steps - number, {}
            clock.seconds.clear()
            with traffic if left == 2 else contextlib.nullcontext():
                sys.setprofile(clock.count if left == 1 else None)
                begin = time.perf_counter()
                item = next(iterator)
                fetched = time.perf_counter() - begin
                sys.setprofile(None)
                copy = [{name: value for name, value in batch.items() if name != "sources"} for batch in item[1]]
                if bare and number % 2:
                    bare_seconds(copy, facts)
                sys.setprofile(clock.count if left == 1 else None)
                begin = time.perf_counter()
                yield item
                facts["seconds"], facts["rows"] = fetched + time.perf_counter() - begin, fetched
                sys.setprofile(None)
            facts |= {part: clock.seconds[part] for part in PARTS}
            if bare and not number % 2:
                bare_seconds(copy, facts)
            if left > COUNTED:
                steps.append({key: float(value) for key, value in facts.items()})

    monitor_step = run.monitor.step

    def with_loss(step, taken, step_loss, targets, *more):
        losses.append(step_loss / targets)
        monitor_step(step, taken, step_loss, targets, *more)

    run.monitor.steps, run.monitor.step = clocked, with_loss
    train.train(run, start)
    if run.accelerator.is_main_process:
        engine = json.loads((Path(args.output_dir) / "run.json").read_text())
        facts = {
            "steps": steps,
            "losses": torch.stack(losses).tolist(),
            "calls": dict(clock.calls.most_common()),
            "collective_bytes": dict(traffic.bytes),
        }
        facts |= {"parameters": engine["parameters"], "engine": engine["engine"]}
        Path(out).write_text(json.dumps(facts))
    run.monitor.watchdog.stop()
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        exit_with(error)
