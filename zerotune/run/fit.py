"""Does it fit: the plan of this run, the largest micro-batch that fits, the longest one tried before step 0, and what was measured.

Planned on the main process and told to the others; tried on all of them with the same rows.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, send_to_device

from zerotune.engine.ending import start_again
from zerotune.engine.reduction import can_choose
from zerotune.engine.tensor_parallel import place
from zerotune.errors import RunError, UserError
from zerotune.model import packing
from zerotune.model.loading import hidden_size
from zerotune.plan.changes import cuts, divisors, largest_micro_batch
from zerotune.plan.forecast import Planner
from zerotune.plan.machine import GIB, this_machine
from zerotune.plan.parameters import FROZEN, OPTIMIZER, WEIGHTS, optimizer_states
from zerotune.plan.report import answer, gib, plan_lines
from zerotune.rows import IGNORE
from zerotune.rows.batches import most_micro_batches
from zerotune.rows.collation import TrainingSteps
from zerotune.run.checkpoint import list_checkpoints, newest_manifest
from zerotune.run.evaluation import evaluating
from zerotune.run.profiling import memory_gib
from zerotune.run.records import add_to_run, peak_memory

CUT, TOKENS = ("per_device_train_batch_size", "gradient_accumulation_steps"), "max_tokens_per_micro_batch"
LIMIT = "ZEROTUNE_MICRO_BATCH_LIMIT"  # the micro-batch, in rows or tokens, that did not fit, for the process in this one's place


class Fit:
    """The plan of a run, made when it is first asked for."""

    def __init__(self, accelerator, strategy, plugin, args, config, tokenizer, data, forward_loss, make_trainable):
        self.accelerator, self.strategy, self.plugin, self.args, self.data = accelerator, strategy, plugin, args, data
        self.planner = Planner(args, config, forward_loss, make_trainable, tokenizer, data)
        self.machine = this_machine(accelerator.num_processes, strategy.num_machines)

    def forecast(self):
        """Return the Forecast of this run."""
        return self.planner.forecast(self.strategy.stem, self.machine, config=self.strategy.config)

    def changes(self):
        """Return the lines of the smallest changes by which it would fit."""
        return answer(self.planner, self.machine, [], sys.argv[1:])[1]

    def show_plan(self, say):
        """Say what every strategy would take."""
        if self.accelerator.is_main_process:
            words = [word for word in sys.argv[1:] if word != "--plan_only"]
            say("\n".join(plan_lines(self.planner, self.machine, words)[1]))

    def keep_rows_a_step(self, say):
        """Cut the step anew where a run goes on under the same flags with another number of processes; return the flags as given.

        The same on every rank. UserError if the rows of a step cannot be shared out over the processes.
        """
        args, choice, problem, processes = self.args, None, None, place(self.accelerator)[0]
        given = [getattr(args, name) for name in CUT]
        if self.accelerator.is_main_process and (saved := newest_manifest(args.output_dir, args.resume_from_checkpoint)):
            rows, per_device = saved["fingerprint"]["rows a step"], given[0]
            same_flags = given == saved["given_cut"] and not set(CUT) & set(args.accept_change)
            if same_flags and rows != per_device * given[1] * processes:
                if rows % processes:
                    problem = f"a step of this run has {rows} rows; give a number of processes that divides it (given: {processes})"
                else:
                    rows_here = max(n for n in divisors(rows // processes) if n <= per_device)
                    choice = dict(zip(CUT, (rows_here, rows // processes // rows_here), strict=True))
        choice, problem = broadcast_object_list([choice, problem])
        if problem:
            raise UserError(problem)
        if choice:
            words = " x ".join(map(str, choice.values())), " x ".join(map(str, given))
            say(f"batch: {words[0]} rows x accumulation in place of {words[1]}: as many rows a step as the run had before")
            self.recut(choice)
        return given

    def recut(self, choice):
        """Take up another micro-batch and accumulation, before the model is prepared."""
        vars(self.args).update(choice)
        self.strategy.cut_anew(self.accelerator, self.plugin, self.args, hidden_size(self.planner.config))

    def choose_cut(self, say):
        """Set the flags of the largest micro-batch that fits, for a step of as many rows; return what was chosen in place of what.

        The same on every rank. A run that is gone on with keeps what was chosen; rows of which a trial has shown that they do not
        fit are not chosen again.
        """
        args, choice, why, problem = self.args, None, "", None
        size, unit = (TOKENS, "tokens") if args.max_tokens_per_micro_batch else (CUT[0], "rows")
        given = {name: getattr(args, name) for name in ((TOKENS,) if size == TOKENS else CUT)}
        if self.accelerator.is_main_process:
            choice, why = kept_cut(args, given, self.accelerator.num_processes), "as the run began"
            if choice is not None and LIMIT in os.environ:  # a smaller one would be another run; this one would be tried for ever
                problem = f"micro-batches of {choice[size]} {unit}, as the run began, do not fit here; go on with it where they do"
            elif choice is None:
                choice, forecast = largest_micro_batch(self.planner, self.strategy.stem, self.machine, self.strategy.config)
                why, problem = f"{gib(forecast.device_bytes)} of {gib(forecast.device_limit)} GiB are planned", forecast.problem
                if (limit := int(os.environ.get(LIMIT, choice[size] + 1))) <= choice[size]:
                    choice = [way for way in cuts(args, self.planner.longest_row) if way[size] < limit][-1]
                    why = f"{limit} did not fit when they were tried"
        choice, why, problem = broadcast_object_list([choice, why, problem])
        if problem:
            raise UserError(f"--auto_batch: {problem}")
        words = [" x ".join(map(str, rows.values())) for rows in (choice, given)]
        what = "tokens a micro-batch" if size == TOKENS else "rows x accumulation"
        say(f"auto_batch: {words[0]} {what} in place of {words[1]}, the same step and losses: {why}")
        self.recut(choice)
        return {"given": given, "chosen": choice, "why": why}

    def choose_checkpointing(self, say):
        """Set --gradient_checkpointing auto to the smallest share of blocks with which the run fits; the same on every rank."""
        args, choice, problem = self.args, None, None
        if args.gradient_checkpointing != "auto":
            return
        if self.accelerator.is_main_process:
            forecast = self.forecast()
            choice, problem = forecast.gradient_checkpointing, forecast.problem
            why = "fits" if forecast.fits else "does not fit, by the plan, and nothing else would"
            if problem is None:
                say(f"gradient_checkpointing: {str(choice).lower()}, which {why}: {gib(forecast.device_bytes)} GiB are planned")
        args.gradient_checkpointing, problem = broadcast_object_list([choice, problem])
        if problem:
            raise UserError(f"--gradient_checkpointing auto: {problem}")

    def choose_reduction(self):
        """Return "once" or "each" by --reduce and the plan, None where there is no choice; the same on every rank."""
        args, config, choice = self.args, self.strategy.config, None
        if not can_choose(args, config):
            return None
        if args.reduce != "auto":
            return args.reduce
        if self.accelerator.is_main_process:
            forecast = self.planner.forecast(self.strategy.stem, self.machine, config=config)
            choice = "once" if forecast.reduces_once and forecast.problem is None else "each"
        return broadcast_object_list([choice])[0]

    def longest_batch(self, collator):
        """Return (the Shape, the micro-batch) that takes most of this run's memory, the same on every rank."""
        forecast = self.forecast() if self.accelerator.is_main_process else None
        shape, problem = broadcast_object_list([forecast and forecast.shape, forecast and forecast.problem])
        if problem:
            raise UserError(f"--probe_longest_batch: {problem}")
        steps = TrainingSteps(self.data, collator, self.args, self.accelerator.num_processes, shape.rank)
        return shape, steps[shape.step][shape.micro_batch] if shape.row is None else steps.collated([shape.row] * shape.rows)

    def probe(self, model, optimizer, collator, reduction, forward_loss, say):
        """Run the largest micro-batch of the run forward and backward, and leave nothing of it.

        Weights, optimizer and the engine's counters are as they were; losses of the run are those without a trial.
        With --auto_batch a batch that does not fit makes every rank start again with a smaller one.
        """
        shape, batch = self.longest_batch(collator)
        try:
            ballast = self.missing_states(optimizer)
            with reduction.of_step(trial=True):
                for _ in range(min(2, most_micro_batches(self.args))):  # the second beside the gradients of the first
                    self.pass_over(batch, model, reduction, forward_loss)
            del ballast
            self.accelerator.wait_for_everyone()  # for a rank that could not, whose end is an error here
        except Exception as error:  # the rank that ran out of memory, or one that waited for it in vain
            if not self.args.auto_batch:
                raise
            self.start_smaller(error)
        forget_gradients(optimizer)
        memory = peak_memory()
        peak = memory["peak_device_memory_gib"] or memory["peak_host_memory_gib"]
        where = f"of step {shape.step + 1}" if shape.row is None else f"of line {self.data.lines('train', [shape.row])[0]}"
        say(f"longest micro-batch: {shape}, {where}: fits, the peak is {peak:.3f} GiB so far")

    def try_packing(self, model, collator, forward_loss, precision):
        """Have the model show that it gives two rows the same loss padded and packed; a collective under ZeRO-3."""
        columns = self.data.rows["train"][[0, min(1, len(self.data.rows["train"]) - 1)]]

        losses = []
        with evaluating(model), self.accelerator.autocast():
            for batch in (collator(columns), collator.packed(columns, count=1)):
                batch = send_to_device(batch, self.accelerator.device)
                labels = batch.pop("labels")
                losses.append(forward_loss(model, batch, labels, chunked=self.args.loss_chunks > 0)[1][labels != IGNORE])
        packing.check_exact(*losses, precision)

    def missing_states(self, optimizer):
        """Return memory as large as the optimizer states that torch's optimizers only make in their first step."""
        states = optimizer.optimizer.state if self.plugin is None else None
        learn = [p for group in optimizer.param_groups for p in group["params"]] if states is not None and not states else []
        size, _ = optimizer_states(self.args.optim, [p.shape for p in learn], 4, torch.cuda.is_available())
        return torch.empty(size, dtype=torch.uint8, device=self.accelerator.device)

    def pass_over(self, batch, model, reduction, forward_loss):
        """Run a batch forward and backward."""
        accelerator = self.accelerator
        with reduction.of_micro_batch(is_last=False):
            batch = send_to_device(dict(batch), accelerator.device)
            labels, _, _ = batch.pop("labels"), batch.pop("sources", None), batch.pop("frozen_rows", None)
            loss, _ = forward_loss(model, batch, labels, chunked=self.args.loss_chunks > 0)
            accelerator.backward(loss, **({"scale_wrt_gas": False} if self.plugin else {}))

    def start_smaller(self, error):
        """Take this process's place with a new one that tries a smaller micro-batch; for every rank, with --auto_batch.

        An engine that ran out of memory in the middle of a pass is in no state to go on from.
        """
        smallest = next(iter(cuts(self.args, self.planner.longest_row)[0].items()))
        size = self.args.max_tokens_per_micro_batch or self.args.per_device_train_batch_size
        if size == smallest[1]:
            unit = "tokens" if smallest[0] == TOKENS else "row"
            raise RunError(
                f"--auto_batch: a micro-batch of {size} {unit} does not fit ({error}); python -m zerotune plan says what would"
            )
        print(f"auto_batch: rank {self.accelerator.process_index}: micro-batches of {size} do not fit, starting again", flush=True)
        start_again(environment={LIMIT: str(size)})

    def report(self, model, optimizer, host_before_model_gib, say):
        """Say what was planned beside what was measured, and write both into run.json; a collective."""
        taken = measured(self.accelerator, model, optimizer, host_before_model_gib)
        if not self.accelerator.is_main_process:
            return
        try:
            forecast = self.forecast()
        except Exception as error:  # a run that has trained is not lost for a plan of it
            forecast = None
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            problem = forecast.problem
        if problem:
            say(f"memory: nothing was planned: {problem}")
            planned = None
        else:
            planned = in_kinds(forecast.device)
            words = ", ".join(f"{kind} {gib(planned[kind])} / {gib(taken[kind])}" for kind in planned)
            say(f"memory, GiB planned / measured at most: {words}")
        add_to_run(self.args.output_dir, {"memory": {"planned_bytes": planned, "measured_bytes": taken}})


def in_kinds(device):
    """Return a forecast's bytes in the kinds that a run can measure."""
    weights, states = device.get(WEIGHTS, 0) + device.get(FROZEN, 0), device.get(OPTIMIZER, 0)
    total = sum(device.values())
    return {"weights": weights, "optimizer states": states, "the rest": total - weights - states, "total": total}


def measured(accelerator, model, optimizer, host_before_model_gib):
    """Return bytes by kind, those of the rank with most; a collective.

    Weights and optimizer states are counted at their tensors. The total is what CUDA's allocator had reserved at most; on a CPU the
    peak of the process since before its model was loaded, which holds what loading and other libraries took as well.
    """
    cuda = torch.cuda.is_available()
    held = memory_gib(model, optimizer)["device" if cuda else "host"]
    on_cpu = (peak_memory()["peak_host_memory_gib"] - host_before_model_gib) * GIB
    total = torch.cuda.max_memory_reserved() if cuda else on_cpu
    mine = torch.tensor([held["weights"] * GIB, held["optimizer"] * GIB, total], dtype=torch.float64, device=accelerator.device)
    weights, states, total = map(int, accelerator.gather(mine[None]).max(0).values.tolist())
    return {"weights": weights, "optimizer states": states, "the rest": total - weights - states, "total": total}


def kept_cut(args, given, num_processes):
    """Return the flags that --auto_batch chose for the run that is gone on with here, None if it is none.

    given: the flags of the cut as they are given now. On another number of processes it would be another number of rows a step, and
    is chosen anew.
    """
    run = Path(args.output_dir) / "run.json"
    if args.resume_from_checkpoint == "none" or not list_checkpoints(args.output_dir) or not run.exists():
        return None
    content = json.loads(run.read_text())
    before = content["arguments"]
    if content["engine"]["num_processes"] != num_processes:
        return None
    if TOKENS in given:
        same = (content.get("auto_batch") or {}).get("given") == given
    else:
        rows = before[CUT[0]] * before[CUT[1]]
        same = before.get("auto_batch") and rows == args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {name: before[name] for name in given} if same else None


def forget_gradients(optimizer):
    """Drop the gradients of a backward pass that no step followed, as if it had not been."""
    inner = optimizer.optimizer
    inner.zero_grad()
    if hasattr(inner, "all_grad_tensors"):  # ZeRO-1 and 2 add to what is there (zero/stage_1_and_2.py, 1030-1050); 3 counts anew
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        inner.all_grad_tensors, inner.averaged_gradients = {}, {}
        inner.micro_step_id = INITIAL_MICRO_STEP_ID
        inner._epilogue_ran_this_backward = False
    elif hasattr(inner, "clear_hp_grads"):  # DeepSpeed's BF16_Optimizer
        inner.clear_hp_grads()
    gc.collect()
