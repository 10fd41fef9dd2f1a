"""What is watched beside the loop while steps are taken: tokens, losses, times, memory, stalls; and what becomes a record of it."""

import time
from pathlib import Path

import torch

from zerotune.engine import ending
from zerotune.engine.processes import unwrap
from zerotune.engine.tensor_parallel import copies
from zerotune.model import compiling
from zerotune.model.attention import lines_of_packed
from zerotune.model.loss import by_source
from zerotune.run import records
from zerotune.run.profiling import Profile
from zerotune.run.report.page import write_report


class Monitor:
    """Goes along with the loop; everything here could be left out without another number in the model."""

    def __init__(self, accelerator, model, optimizer, args, schedule, console, counts, step, data, watchdog):
        """counts: {name: count} that go into every training record of an fp16 run; step: where the run starts."""
        self.console, self.schedule, self.logging_steps, self.output_dir = console, schedule, args.logging_steps, args.output_dir
        self.counts = counts if args.mixed_precision == "fp16" else {}
        self.metrics = records.Metrics(args.output_dir, console, accelerator, step)
        rows_apart = lines_of_packed(unwrap(model).config) is not None
        self.window = records.Window(accelerator, args.profile_steps > 0, rows_apart)
        self.end_report, self.accelerator, self.compiles = args.end_report, accelerator, args.torch_compile
        self.names, self.stream, self.sources = data.names("train"), data.stream(args.seed), None
        # Losses and targets of each source: of the steps taken since the last record, and of this one.
        self.by_source = torch.zeros(2, len(self.names), dtype=torch.float64, device=accelerator.device)
        self.of_step = torch.zeros_like(self.by_source)
        self.next_page = 0  # when to draw report.html again at the earliest, by time.perf_counter
        last = schedule.max_steps
        self.profile = Profile(accelerator, model, optimizer, last - args.profile_steps + 1, last)
        self.watchdog = watchdog
        self.write, self.paused, self.beat = self.metrics.write, self.window.paused, self.watchdog.beat
        self.beat()
        ending.failures = Path(args.output_dir) / "failures"

    def steps(self, loader, start):
        """Yield (the step's number, its micro-batches), the first being start + 1."""
        self.console.start(start, self.schedule.max_steps)
        self.profile.step_begins(start + 1)
        try:
            for step, micro_batches in enumerate(loader, start + 1):
                if step == start + 1:
                    begun = {"step": start, "start_seconds": round(records.seconds_since_launch(), 1)}
                    cut_off = self.metrics.cut_off_at_step
                    self.write(begun | ({"cut_off_at_step": cut_off} if cut_off is not None else {}))
                yield step, micro_batches
                self.profile.step_begins(step + 1)
        finally:
            self.console.stop()

    def batches(self, micro_batches):
        """Yield a step's micro-batches as they are."""
        for batch in micro_batches:
            self.beat()
            self.sources = batch.pop("sources", None)
            self.window.add_batch(batch)
            self.profile("forward")
            yield batch

    def losses(self, losses, labels):
        """Take note of the loss of each label of the present micro-batch, of one shape; nothing is read of them yet."""
        if self.names:
            self.of_step += by_source(losses, labels, self.sources, len(self.names))

    def source_facts(self, step):
        """Return {name of a source: rows drawn of it so far, passes over it, its loss since the last record}; a collective."""
        sums, targets = (self.accelerator.reduce(self.by_source, reduction="sum") / copies(self.accelerator)).tolist()
        drawn = self.stream.drawn(self.schedule.rows_at(step)).tolist()
        self.by_source.zero_()
        return {
            name: {
                "rows": rows,
                "epoch": round(rows / size, 4),
                "loss": loss / count if count else None,
                "target_tokens": int(count),
            }
            for name, rows, size, loss, count in zip(self.names, drawn, self.stream.source_sizes, sums, targets, strict=True)
        }

    def step(self, step, taken, step_loss, targets, learning_rate, grad_norm):
        """Take note of a step, and write a record where one is due."""
        profiled = self.profile.step_ends(step)
        self.console.advance()
        if taken:
            self.window.add_step(step_loss, targets)
            self.by_source += self.of_step
        self.of_step.zero_()
        if step % self.logging_steps == 0 or step == self.schedule.max_steps:
            more = self.counts | ({"sources": self.source_facts(step)} if self.names else {})
            more |= {"compiled_graphs": compiling.graphs} if self.compiles else {}
            self.write(self.window.record(step, self.schedule.epoch_at(step), learning_rate, grad_norm, **more))
        if profiled:
            self.write(profiled)

    def draw(self, ended=False):
        """Draw report.html anew; ended: and the pictures. Its time is not the steps'."""
        begin = time.perf_counter()
        if not self.console.active or (begin < self.next_page and not ended):
            return
        with self.paused():
            write_report(self.output_dir, self.console.say, ended and self.end_report)
        # Of 10,000 records it takes 0.2 seconds. Of very many it is not drawn at every save, but for 1 % of the run's time.
        seconds = time.perf_counter() - begin
        self.next_page = begin + 100 * seconds if seconds > 1 else 0
