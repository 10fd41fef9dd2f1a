"""Fine-tune a Hugging Face model: one raw loop for one CPU, one GPU, a node of GPUs or many nodes.

    python train.py --model_name_or_path DIR --train_file rows.jsonl --output_dir runs/a              one process, CPU or GPU
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train.py ...        DDP on 8 GPUs
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 train.py ...      ZeRO-2
    accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 train.py ...   ZeRO-3 + CPU offload

`python train.py --help` lists the flags; scripts/launch.sh is the short way to the same launches. `main` is the table of contents.
To adapt it: the loss is `forward_loss`; what learns is decided in `load_model`; the rows are made in zerotune/rows/encoding.py.
"""

import zerotune.quiet  # noqa: F401  before all others: the libraries read their log levels when they are imported

# isort: split
from zerotune.run.arguments import arguments_or_exit

if __name__ == "__main__":
    ARGS = arguments_or_exit()  # before the libraries, which take seconds to import: --help and a wrong flag answer at once

# isort: split
import math
from contextlib import suppress
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    send_to_device,
    set_seed,
)
from torch.utils.data import DataLoader

from zerotune.engine import processes, stopping
from zerotune.engine.deepspeed_config import has_cuda
from zerotune.engine.determinism import seed_pass, set_deterministic, set_tf32
from zerotune.engine.ending import exit_for, finish, ignore_signals
from zerotune.engine.optimizer import build_optimizer
from zerotune.engine.processes import unwrap
from zerotune.engine.reduction import Reduction
from zerotune.engine.schedule import Schedule
from zerotune.engine.strategy import launched_strategy
from zerotune.engine.tensor_parallel import place
from zerotune.model import adapters, loading
from zerotune.model.activations import enable_gradient_checkpointing, every_nth, offload_activations
from zerotune.model.attention import lines_of_packed
from zerotune.model.compiling import compile_blocks
from zerotune.model.freezing import apply_rules
from zerotune.model.frozen_dtype import narrow_frozen
from zerotune.model.loss import chunk_loss, count_targets, token_losses
from zerotune.model.packing import check_packable, pack_forward
from zerotune.model.phases import Phases
from zerotune.model.prefix import train_mode
from zerotune.model.quantization import quantization_config
from zerotune.rows.batches import most_micro_batches
from zerotune.rows.collation import Collator, TrainingSteps
from zerotune.rows.data import Data, describe, marked
from zerotune.run import borders, checkpoint, records
from zerotune.run.autopsy import explained
from zerotune.run.best import Best, Calendar
from zerotune.run.evaluation import Evaluator, metrics_before_training
from zerotune.run.fingerprint import fingerprint, layout
from zerotune.run.fit import Fit
from zerotune.run.frozen_cache import FrozenCache
from zerotune.run.guard import Guard
from zerotune.run.monitor import Monitor
from zerotune.run.saved_model import export_best
from zerotune.run.saving import Saver


def main(args):
    run = setup(args)  # strategy, accelerator, console, config, tokenizer
    with explained(run):  # should memory run out
        load_rows(run)  # data, and what the run will take
        cut_steps(run)  # the batch arithmetic; and which checkpoint is gone on from, if there is one
        load_model(run)  # model, optimizer, and a report of what learns
        start = resume(run)  # the position is one number: data order and learning rate follow from it
        accompany(run, start)  # monitor, saver, guard, evaluator: what goes along with the loop
        step = train(run, start)
        end(run, step)


def setup(args):
    """Find every mistake that can be seen without a model, and start the processes' engine."""
    strategy = launched_strategy(args)
    processes.meet_again()
    checkpoint.check_request(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    records.check_tracker(args.report_to)
    config, tokenizer = loading.load_config_and_tokenizer(args)
    if args.packing:
        check_packable(config)
    plugin = strategy.plugin(args, loading.hidden_size(config), config)
    backend = "nccl" if has_cuda() else "gloo"
    meeting = processes.meeting()
    accelerator = Accelerator(
        # With cpu=True accelerate would drop DeepSpeed; without it, and without a GPU, it would not start DDP on the CPU.
        cpu=plugin is None and not has_cuda(),
        mixed_precision=args.mixed_precision,
        deepspeed_plugin=plugin,
        # The loop divides by the token count itself: outside DeepSpeed accelerate must not divide by the accumulation again,
        # while DeepSpeed wants to know the true number (see the backward call).
        gradient_accumulation_plugin=GradientAccumulationPlugin(most_micro_batches(args) if plugin else 1),
        kwargs_handlers=[
            *([InitProcessGroupKwargs(backend, timeout=processes.COLLECTIVE_TIMEOUT)] if strategy.launched else []),
            DistributedDataParallelKwargs(
                # DDP regroups the gradients after its first step, unless it looks for unused ones: after a resume the first step
                # would add up in another order.
                find_unused_parameters=args.allow_unused or args.deterministic,
                gradient_as_bucket_view=True,  # else each gradient is held twice
                broadcast_buffers=False,  # they are constants
            ),
        ],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    meeting.cancel()
    processes.check_processes(accelerator, args.output_dir)
    watchdog = stopping.Watchdog(args.hang_timeout_seconds, accelerator.process_index)
    set_deterministic(args.deterministic)
    set_tf32(args.tf32)
    console = records.Console(accelerator.is_main_process)
    console.say(f"strategy: {strategy.name}, {processes.describe(accelerator)}, mixed precision {args.mixed_precision}")
    if args.mixed_precision == "fp16" and config.model_type in loading.T5_FAMILY:
        console.say("warning: T5's feed-forward output overflows in fp16 on many inputs; bf16 is safe where the hardware has it")
    made = {"strategy": strategy, "plugin": plugin, "accelerator": accelerator, "watchdog": watchdog}
    return SimpleNamespace(args=args, console=console, config=config, tokenizer=tokenizer, **made)


def load_rows(run):
    """Load and check the rows."""
    args, accelerator, config = run.args, run.accelerator, run.config
    named = [name for name in config.id2label.values() if not str(name).startswith("LABEL_")]
    limits = loading.max_positions(config), loading.vocabulary_size(config, run.tokenizer, args.trainable_tokens)
    run.data = processes.first_on_each_node(accelerator, lambda: Data(args, run.tokenizer, named, *limits))
    processes.check_alike("rows", {split: run.data.digest(split) for split in run.data.rows})
    run.data_report = run.data.report()
    for split, facts in run.data_report.items():
        run.console.say(f"data: {describe(split, facts)}")
    if args.messages_column:
        run.console.say(f"data: what is learned of a row: {marked(run.data.rows['train'][0], run.tokenizer)}")
    wanted = args.task, args.metric, len(run.data.rows) > 1
    run.metrics = processes.first_on_each_node(accelerator, lambda: metrics_before_training(*wanted))
    run.data_report["tokenised_on_ranks"] = processes.ranks_where(run.data.built(), accelerator)
    run.fit = Fit(accelerator, run.strategy, run.plugin, args, config, run.tokenizer, run.data, forward_loss, make_trainable)


def cut_steps(run):
    """Do the batch arithmetic, and choose the checkpoint to go on from."""
    args, accelerator = run.args, run.accelerator
    if args.plan_only:
        run.fit.show_plan(run.console.say)
        finish(0)
    run.given_cut = run.fit.keep_rows_a_step(run.console.say)  # of a run that goes on with another number of processes
    run.auto_batch = run.fit.choose_cut(run.console.say) if args.auto_batch else None
    run.fit.choose_checkpointing(run.console.say)
    run.schedule = Schedule.of(args, len(run.data.rows["train"]), place(accelerator)[0], accelerator.num_processes)
    run.console.say(f"batch: {run.schedule.equation}")
    run.fingerprint, run.layout = fingerprint(args, run.config, run.data, run.schedule), layout(args, run.strategy)
    request = args.output_dir, args.resume_from_checkpoint
    compared = run.fingerprint, run.layout, args.accept_change
    run.found, run.manifest, run.changes = checkpoint.choose(accelerator, *request, *compared, run.console.say)
    if run.found:
        run.schedule = run.schedule.gone_on_with(run.manifest)
    run.best = Best.of(args, run.manifest)
    run.calendar = Calendar(args, run.schedule, run.best, "validation" in run.data.rows)


def load_model(run):
    """Load the model, decide what of it learns and how, and hand both to the engine."""
    args, accelerator, console = run.args, run.accelerator, run.console
    set_seed(args.seed)  # the same on every rank: a new classification head starts alike everywhere
    run.host_memory_before_model = records.peak_memory()["peak_host_memory_gib"]
    run.precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    dtype = run.precision if run.plugin else torch.float32  # DeepSpeed keeps float32 masters of its own
    quantization = quantization_config(args, run.config.model_type, run.precision, run.strategy.zero_stage)
    run.cache = FrozenCache(run)
    model, new_weights = loading.load_model(args, run.config, run.tokenizer, run.data.labels, dtype, quantization, run.cache.unread)
    run.num_partitioned = loading.count_partitioned(model)
    run.begin = run.manifest["step"] if run.found else 0
    model, run.freeze_report = make_trainable(model, args, run.tokenizer, dtype, run.schedule.max_steps, run.begin)
    run.phases = run.freeze_report.phases
    console.say("\n".join(f"freezing: {line}" for line in run.freeze_report.lines()))
    for line in loading.about_new_weights(model, new_weights):
        console.say(line)

    optimizer = build_optimizer(
        model,
        optim=args.optim,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        on_host=run.strategy.optimizer_on_host,
        bf16_states=run.strategy.bf16_states,
        births=run.phases and run.phases.births(run.begin),
        muon_learning_rate=args.muon_learning_rate,
    )
    run.cache.follow(model)
    if args.peft == "adalora":
        adapters.allocate_ranks(model, optimizer)
    decoder_inputs = loading.decoder_inputs(model, run.config) if args.task == "seq2seq" else None
    packing = (loading.hidden_size(run.config), lines_of_packed(model.config)) if args.packing else ()
    multiple = 8 if has_cuda() else 1
    run.collator = Collator(args.task, run.tokenizer.pad_token_id, run.data.labels, multiple, decoder_inputs, *packing)
    run.model, run.optimizer = accelerator.prepare(model, optimizer)
    train_mode(run.model, args.frozen_eval)
    run.reduction = Reduction(accelerator, run.model, run.fit.choose_reduction())
    if args.packing and not run.cache.found:  # before anything of an earlier run is touched; what is found has been tried so
        run.fit.try_packing(run.model, run.collator, forward_loss, run.precision)


def make_trainable(model, args, tokenizer, dtype, max_steps, step=None):
    """Decide what of a model learns and what its passes keep; return (the model, a report). The planner calls it as well.

    step: how many are done, by which --freeze_schedule decides; None: where most learns.
    """
    if args.peft:
        model, report = adapters.add_adapter(model, args, tokenizer, dtype, max_steps)
    elif args.freeze_schedule:
        report = Phases(args.freeze_schedule, model, max_steps, args.seed).begin(model, step)
    else:
        report = apply_rules(model, args.freeze, args.unfreeze)
    if every := every_nth(args.gradient_checkpointing):
        enable_gradient_checkpointing(model, every)
    base = model.get_base_model() if args.peft else model
    if dtype == torch.float32 and args.frozen_dtype == "auto":
        narrow_frozen(base, args)
    if args.loss_chunks:
        chunk_loss(base, args.loss_chunks)
    if args.packing:
        pack_forward(base)
    if args.torch_compile:
        compile_blocks(model)
    if args.activation_offload:
        offload_activations(model)
    return model, report


def resume(run):
    """Go on from the checkpoint that was chosen, write run.json, and return the number of steps that are done."""
    args, accelerator, model = run.args, run.accelerator, run.model
    if accelerator.is_main_process:
        checkpoint.open_folder(args.output_dir, anew=run.found is None and args.overwrite_output_dir)
    never, facts = run.freeze_report.never_learning(unwrap(model)), records.environment_facts()
    frozen = run.cache.frozen_checksum(never)
    if run.found:
        checkpoint.load(accelerator, model, run.optimizer, run.found, run.manifest, frozen, run.phases)
    run.cache.open(forward_loss)
    engine = processes.engine_facts(accelerator, run.strategy, model, run.optimizer)
    engine |= {"parameters_partitioned_at_load": run.num_partitioned, "gradients_reduced": run.reduction.words}
    engine["attention"] = unwrap(model).config._attn_implementation
    if accelerator.is_main_process:
        records.write_run(args.output_dir, records.facts_of(run, engine) | facts)
    if args.report_to != "none":
        accelerator.init_trackers("zerotune", config={name: str(value) for name, value in vars(args).items()})
    run.console.say("engine: " + ", ".join(f"{key} {value}" for key, value in engine.items()))
    if args.probe_longest_batch or args.auto_batch:
        run.fit.probe(model, run.optimizer, run.collator, run.reduction, forward_loss, run.console.say)
    run.manifest_facts = {"fingerprint": run.fingerprint, "layout": run.layout, "row_offset": run.schedule.row_offset}
    run.manifest_facts |= {"frozen_weights": frozen, "versions": facts["versions"], "arguments": vars(args)}
    run.manifest_facts["given_cut"] = run.given_cut
    return run.begin


def forward_loss(model, batch, labels, chunked=False):
    """Run the model, prepared or not, on a batch; return (its summed loss, a float32 scalar; each label's loss, for the records).

    For another loss: sum over whatever it is a mean of, and have count_targets count the same; any cut of a step stays right then.
    chunked: the model has been through chunk_loss, and its logits never exist as a whole.
    """
    if chunked:
        outputs = model(**batch, loss_labels=labels)
        return outputs["loss_sum"], outputs["losses"]
    logits = model(**batch).logits
    if labels.ndim > 1:
        logits = logits[:, -labels.shape[1] :]  # prompt tuning puts positions of its own in front
    losses = token_losses(logits, labels)
    return losses.sum(), losses.detach()


def accompany(run, start):
    """Make what watches the steps, refuses bad ones, saves, evaluates, knows the best and listens for signals."""
    args, accelerator, model, optimizer = run.args, run.accelerator, run.model, run.optimizer
    saved = run.manifest or {"overflowed_steps": 0}
    counts = {"overflowed_steps": saved["overflowed_steps"]}
    run.training_steps = TrainingSteps(run.data, run.collator, args, *place(accelerator), run.schedule.row_offset)
    given = run.schedule, run.console, counts, start, run.data, run.watchdog
    run.monitor = Monitor(accelerator, model, optimizer, args, *given)
    run.saver = Saver(accelerator, model, optimizer, args, run.manifest_facts, counts, run.monitor)
    lines_of_step = run.training_steps.lines_of_step
    run.guard = Guard(accelerator, model, optimizer, args, run.monitor, run.saver, lines_of_step, saved.get("guard"))
    run.stopper = stopping.Stopper()
    given = accelerator, model, run.data, run.collator, run.tokenizer, args, forward_loss, run.metrics
    run.evaluator = Evaluator(*given, run.monitor, run.stopper, run.best)
    run.saver.settled = run.phases.settled(start) if run.phases else ()
    run.saver.states = {"best": run.best.state, "guard": run.guard.state}
    run.saver.last_step = start if run.found else None


def train(run, start):
    """Take the optimizer steps after step `start`; return the last one's number."""
    if run.found and pause(run, start):  # an evaluation that a signal cut off is made up for; one that ended the run stays its end
        return start
    args, accelerator, model, optimizer, monitor = run.args, run.accelerator, run.model, run.optimizer, run.monitor
    # DeepSpeed divides the loss by the accumulation unless told not to; the loss below is complete as it is.
    backward_options = {"scale_wrt_gas": False} if run.plugin else {}
    loader = DataLoader(
        run.training_steps,
        sampler=range(start, run.schedule.max_steps),
        batch_size=None,  # an item is a whole step already
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=has_cuda(),
    )
    step = start
    for step, micro_batches in monitor.steps(loader, start):
        run.cache.begin(step)
        learning_rate = run.schedule.lr_at(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)  # Muon's

        # Targets of the whole step, over all micro-batches and ranks: the one divisor that makes every cut the same update.
        targets = sum(count_targets(batch) for batch in micro_batches)
        targets = accelerator.reduce(torch.full((), targets, device=accelerator.device, dtype=torch.float32), reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        with run.reduction.of_step():
            for index, batch in enumerate(monitor.batches(micro_batches), 1):
                is_last = index == len(micro_batches)
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                labels = batch.pop("labels")
                seed_pass(args.seed, step, index, run.training_steps.seed)  # for dropout
                with run.reduction.of_micro_batch(is_last):
                    loss_sum, losses = forward_loss(model, batch, labels, chunked=args.loss_chunks > 0)
                    step_loss += loss_sum.detach()
                    monitor.losses(losses, labels)
                    if is_last and run.guard.is_spike(step_loss, targets):
                        loss_sum = loss_sum * math.nan  # gradients that no strategy takes a step with
                    # x processes: DDP and DeepSpeed average gradients over the ranks, and this loss is to be summed.
                    accelerator.backward(loss_sum * (accelerator.num_processes / targets), **backward_options)

        # DeepSpeed has clipped and stepped already; these three then only report.
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        taken = run.guard.step(step, step_loss, grad_norm)
        optimizer.zero_grad()
        monitor.step(step, taken, step_loss, targets, learning_rate, grad_norm)

        if pause(run, step):
            break
    return step


def pause(run, step):
    """Evaluate, then save, where it is due, so that a checkpoint knows its own evaluation; return whether the run ends here."""
    if run.calendar.evaluates(step):
        with suppress(stopping.Interrupted):
            run.evaluator.evaluate("validation", step)
    stop = run.stopper.agreed(run.saver.time_is_up())
    run.saver.tell()
    border = borders.is_border(run, step)
    if (stop or run.stopper.wished or border or run.calendar.saves(step)) and run.saver.last_step != step:
        run.cache.keep()  # first: a run that goes on from this step counts on the rows before it
        run.saver.save(step)
    if border and not stop and not run.best.used_up:
        borders.go_over(run, step)
    return stop or run.best.used_up


def end(run, step):
    """Evaluate for the last time, write final/, and end the process: 0, or 128 + the signal that stopped the run."""
    data, evaluator, saver = run.data, run.evaluator, run.saver
    if run.args.end_report and not run.stopper.known:  # a scheduler that stops the run gives it little time
        run.fit.report(run.model, run.optimizer, run.host_memory_before_model, run.console.say)
    with suppress(stopping.Interrupted):
        run.stopper.interrupt()
        if run.calendar.has_validation and evaluator.last_step != step:
            evaluator.evaluate("validation", step)
        if "test" in data.rows:
            evaluator.write_predictions("test", evaluator.evaluate("test", step))
        run.monitor.watchdog.stop()
        run.cache.end()
        export_best(run, step, make_trainable)
    if stop := run.stopper.known:
        if saver.last_step != step:
            saver.save(step)
        saver.wait()
        run.console.say(f"stopped by signal {stop} after step {step}; the same command goes on from the newest checkpoint")
    saver.wait()
    if run.accelerator.is_main_process:
        ended = f"signal {stop}" if stop else "all steps" if step >= run.schedule.max_steps else "early stopping"
        records.add_to_run(run.args.output_dir, {"ended": ended})
    run.monitor.draw(ended=not stop)
    run.accelerator.wait_for_everyone()
    for tracker in run.accelerator.trackers:
        tracker.finish()
    # It ends here, with everything alive: freeing a process group joins its threads, and one of them may wait for Python's lock.
    finish(128 + stop if stop else 0)


if __name__ == "__main__":
    try:
        main(ARGS)
    except Exception as error:
        exit_for(error)
        raise
