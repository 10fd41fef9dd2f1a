"""Fine-tune a Hugging Face model: one raw loop for one CPU, one GPU, a node of GPUs or many nodes.

    python train.py --model_name_or_path DIR --train_file rows.jsonl --output_dir runs/a              one process, CPU or GPU
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train.py ...        DDP on 8 GPUs
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 train.py ...      ZeRO-2
    accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 train.py ...   ZeRO-3 + CPU offload

`python train.py --help` lists the flags; scripts/launch.sh is the short way to the same launches. To adapt it: the loss is
`forward_loss`, called once in the loop; the rows are made in zerotune/rows/data.py; what learns is decided at "freezing".
"""

import zerotune.quiet  # noqa: F401  before all others: the libraries read their log levels when they are imported

# isort: split
import json
import math
import os
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    send_to_device,
    set_seed,
)
from torch.utils.data import DataLoader

from zerotune.engine.deepspeed_config import has_cuda
from zerotune.engine.optimizer import build_optimizer, lr_at
from zerotune.engine.precision import OverflowWatch, loss_scale, prepare_scaler, take_step
from zerotune.engine.stopping import Interrupted, Stopper, Watchdog, finish, restore_default_signals
from zerotune.engine.strategy import check_processes, engine_facts, launched_strategy
from zerotune.errors import RunError, UserError
from zerotune.model.adapters import add_adapter, allocate_ranks
from zerotune.model.freezing import GradientWatch, apply_rules
from zerotune.model.loading import (
    T5_FAMILY,
    apply_liger,
    count_partitioned,
    enable_gradient_checkpointing,
    hidden_size,
    load_config_and_tokenizer,
    load_model,
    max_positions,
    shift_right,
)
from zerotune.model.loss import chunk_loss, count_targets, forward_loss
from zerotune.model.quantization import quantization_config
from zerotune.rows.collation import Collator, TrainingSteps
from zerotune.rows.data import Data, describe
from zerotune.run import checkpoint, records
from zerotune.run.arguments import parse_arguments
from zerotune.run.evaluation import Evaluator, load_metrics
from zerotune.run.export import export
from zerotune.run.profiling import Profile


def main():
    # ---- config: every mistake that can be seen without a model is found here --------------------------------------------
    args = parse_arguments()
    strategy = launched_strategy(args)
    checkpoint.check_request(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    records.check_tracker(args.report_to)
    config, tokenizer = load_config_and_tokenizer(args)

    # ---- accelerator -----------------------------------------------------------------------------------------------------
    deepspeed_plugin = strategy.plugin(args, hidden_size(config))
    accelerator = Accelerator(
        # With cpu=True accelerate would drop DeepSpeed; without it, and without a GPU, it would not start DDP on the CPU.
        cpu=deepspeed_plugin is None and not has_cuda(),
        mixed_precision=args.mixed_precision,
        deepspeed_plugin=deepspeed_plugin,
        # The loop divides by the token count itself: outside DeepSpeed accelerate must not divide by the accumulation again,
        # while DeepSpeed wants to know the true number (see the backward call).
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps if deepspeed_plugin else 1),
        kwargs_handlers=[
            # One process tokenises while the others wait; the libraries' 10 minutes would end a run on a large file.
            *([InitProcessGroupKwargs("nccl" if has_cuda() else "gloo", timeout=timedelta(hours=6))] if strategy.launched else []),
            DistributedDataParallelKwargs(find_unused_parameters=args.allow_unused),
        ],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    check_processes(accelerator)
    world = accelerator.num_processes
    console = records.Console(accelerator.is_main_process)
    console.say(
        f"strategy: {strategy.name}, {world} process(es), {accelerator.device.type}, mixed precision {args.mixed_precision}"
    )
    if args.mixed_precision == "fp16" and config.model_type in T5_FAMILY:
        console.say("warning: T5's feed-forward output overflows in fp16 on many inputs; bf16 is safe where the hardware has it")

    # ---- data ------------------------------------------------------------------------------------------------------------
    named = [name for name in config.id2label.values() if not str(name).startswith("LABEL_")]
    limits = max_positions(config), max(config.get_text_config().vocab_size, len(tokenizer) if args.trainable_tokens else 0)
    data = first_on_each_node(accelerator, lambda: Data(args, tokenizer, named, *limits))
    scorers = first_on_each_node(accelerator, lambda: load_metrics(args.task, args.metric))
    data_report = data.report()
    for split, facts in data_report.items():
        console.say(f"data: {describe(split, facts)}")
    data_report["tokenised_on_ranks"] = gather_object([accelerator.process_index] if any(data.built.values()) else [])

    # ---- batch arithmetic, and what is gone on from -----------------------------------------------------------------------
    num_rows = len(data.rows["train"])
    rows_per_step = args.per_device_train_batch_size * world * args.gradient_accumulation_steps
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_rows / rows_per_step)
    warmup_steps = args.warmup_steps or round(args.warmup_ratio * max_steps)
    equation = (
        f"{args.per_device_train_batch_size} rows x {world} process(es) x {args.gradient_accumulation_steps} accumulation = "
        f"{rows_per_step} rows a step; {max_steps} steps = {max_steps * rows_per_step / num_rows:.2f} epochs of {num_rows} rows"
    )
    console.say(f"batch: {equation}")
    mathematics = fingerprint(args, strategy, config, data, max_steps, warmup_steps)
    found, content = checkpoint.choose(accelerator, args.output_dir, args.resume_from_checkpoint, mathematics, console.say)

    # ---- model, freezing -------------------------------------------------------------------------------------------------
    set_seed(args.seed)  # the same on every rank: a new classification head starts alike everywhere
    host_memory_before_model = records.peak_memory()["peak_host_memory_gib"]
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    dtype = precision if deepspeed_plugin else torch.float32  # DeepSpeed keeps float32 masters of its own
    quantization = quantization_config(args, config.model_type, precision, strategy.zero_stage)
    model, new_weights = load_model(args, config, tokenizer, data.labels, dtype, quantization)
    if new_weights:
        console.say(f"model: weights that the checkpoint does not have start new: {', '.join(new_weights)}")
    num_partitioned = count_partitioned(model)
    if args.liger:
        apply_liger(model)
    if args.peft:
        model, freeze_report = add_adapter(model, args, tokenizer, dtype, max_steps)
    else:
        freeze_report = apply_rules(model, args.freeze, args.unfreeze)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if args.loss_chunks:
        chunk_loss(model.get_base_model() if args.peft else model, args.loss_chunks)
    console.say("\n".join(f"freezing: {line}" for line in freeze_report.lines()))
    frozen = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if not p.requires_grad}
    if never := sorted(frozen & set(new_weights)):
        console.say(f"warning: these weights start new and are frozen, so they stay random: {', '.join(never)}")

    # ---- optimizer, prepare ----------------------------------------------------------------------------------------------
    optimizer = build_optimizer(
        model,
        optim=args.optim,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        on_host=strategy.optimizer_on_host,
    )
    if args.peft == "adalora":
        allocate_ranks(model, optimizer)
    own_shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    decoder_inputs = (own_shift or shift_right(config)) if args.task == "seq2seq" else None
    collator = Collator(args.task, tokenizer.pad_token_id, data.labels, 8 if has_cuda() else 1, decoder_inputs)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = TrainingSteps(data, collator, args, world, accelerator.process_index)

    # ---- resume: the position is one number; data order and learning rate follow from it ---------------------------------
    set_seed(args.seed, device_specific=True)  # dropout differs between ranks
    if found is None and args.overwrite_output_dir and accelerator.is_main_process:
        checkpoint.start_over(args.output_dir)
    facts = records.environment_facts()
    frozen = checkpoint.frozen_digest(accelerator, model)
    manifest_facts = {"fingerprint": mathematics, "frozen_sha256": frozen, "versions": facts["versions"]}
    step = checkpoint.load(accelerator, model, optimizer, found, content, frozen) if found else 0
    engine = engine_facts(accelerator, strategy, model, optimizer) | {"parameters_partitioned_at_load": num_partitioned}
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        run = {
            "arguments": vars(args),
            "engine": engine,
            "deepspeed_config": deepspeed_plugin and deepspeed_plugin.deepspeed_config,
            "batch_arithmetic": equation,
            "max_steps": max_steps,
            "warmup_steps": warmup_steps,
            "resumed_from": found,
            "parameters": {"total": freeze_report.num_total, "trainable": freeze_report.num_trainable},
            "host_memory_before_model_gib": host_memory_before_model,
            "freezing": [vars(rule) for rule in freeze_report.rules],
            "tied": freeze_report.tied,
            "data": data_report,
            "labels": data.labels,
        }
        records.write_json(Path(args.output_dir) / "run.json", run | facts)
    if args.report_to != "none":
        accelerator.init_trackers("zerotune", config={name: str(value) for name, value in vars(args).items()})
    metrics = records.Metrics(args.output_dir, console, accelerator, step)
    stopper, watchdog = Stopper(), Watchdog(args.hang_timeout_seconds, accelerator.process_index)

    def between_batches():
        watchdog.beat()
        stopper.interrupt()

    evaluator = Evaluator(accelerator, data, collator, tokenizer, scorers, args, between_batches)
    console.say("engine: " + ", ".join(f"{key} {value}" for key, value in engine.items()))

    # ---- loop ------------------------------------------------------------------------------------------------------------
    loader = DataLoader(
        batches,
        sampler=range(step, max_steps),
        batch_size=None,  # an item is a whole step already
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=restore_default_signals,
        pin_memory=has_cuda(),
        generator=torch.Generator(),  # without its own, the loader would draw from the global state that dropout uses
    )
    # DeepSpeed divides the loss by the accumulation unless told not to; the loss below is complete as it is.
    backward_options = {"scale_wrt_gas": False} if deepspeed_plugin else {}
    watch = GradientWatch(accelerator.unwrap_model(model))
    overflow = OverflowWatch(prepare_scaler(optimizer, deepspeed_plugin and deepspeed_plugin.deepspeed_config))
    window = records.Window(accelerator, with_shapes=args.profile_steps > 0)
    profile = Profile(model, optimizer, max_steps - args.profile_steps + 1, max_steps)
    overflow.overflowed_steps = content["overflowed_steps"] if found else 0
    bad_steps = evaluated_at = saved_at = 0

    def save(position):
        if warning := accelerator.is_main_process and checkpoint.space_warning(args.output_dir):
            console.say(warning)
        with window.paused():
            facts = manifest_facts | {"overflowed_steps": overflow.overflowed_steps}
            saved = checkpoint.save(accelerator, model, optimizer, args.output_dir, position, args.save_total_limit, facts)
        if saved.get("save_seconds", 0) > args.hang_timeout_seconds / 2:
            console.say("warning: a save takes more than half of --hang_timeout_seconds, after which it would count as a stall")
        metrics.write({"step": position, **saved})
        return position

    console.start(step, max_steps)
    profile.step_begins(step + 1)
    for micro_batches in loader:
        learning_rate = lr_at(
            step,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Targets of the whole step, over all micro-batches and ranks: the one divisor that makes every cut the same update.
        targets = sum(count_targets(batch) for batch in micro_batches)
        targets = accelerator.reduce(torch.full((), targets, device=accelerator.device, dtype=torch.float32), reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            watchdog.beat()
            window.add_batch(batch)
            profile("forward")
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            labels = batch.pop("labels")
            accelerator.sync_gradients = index == len(micro_batches) - 1  # the accumulation boundary, for DDP and DeepSpeed
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                loss_sum = forward_loss(model, batch, labels, chunked=args.loss_chunks > 0)
                profile("backward")
                # x world: DDP and DeepSpeed average gradients over the ranks, and this loss is to be summed.
                accelerator.backward(loss_sum * (world / targets), **backward_options)
            step_loss += loss_sum.detach()
        profile("optimizer")
        # Under DeepSpeed the last backward has clipped and stepped already; these three then only report.
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        skipped = take_step(accelerator, optimizer, grad_norm)
        optimizer.zero_grad()
        step += 1
        profiled = profile.step_ends(step)
        console.advance()

        if watch is not None:
            stop_if_unused(accelerator, watch, args.allow_unused, console)
            watch = None
        # fp16 gradients may overflow while the loss is sound: then the scale is lowered, and nothing is wrong with the rows.
        overflowed = skipped and args.mixed_precision == "fp16" and accelerator.reduce(step_loss, reduction="sum").isfinite().item()
        if args.mixed_precision == "fp16":
            overflow.after_step(step, overflowed, loss_scale(accelerator, optimizer))
        if skipped and not overflowed:
            bad_steps += 1
            lines = batches.lines_of_step(step - 1)
            metrics.write({"step": step, "bad_step": "non-finite loss or gradient; weights unchanged", "train_file_lines": lines})
            if bad_steps == args.max_bad_steps:
                save(step - bad_steps)
                raise RunError(f"step {step}: {bad_steps} bad steps in a row; the last good state is saved, see metrics.jsonl")
        if not skipped:
            bad_steps = 0
            window.add_step(step_loss, targets)
        if step % args.logging_steps == 0 or step == max_steps:
            counts = {"overflowed_steps": overflow.overflowed_steps} if args.mixed_precision == "fp16" else {}
            epoch = step * rows_per_step / num_rows
            metrics.write(window.record(step, epoch, learning_rate, grad_norm, **counts))
        if profiled:
            metrics.write(profiled)
        if args.eval_steps and step % args.eval_steps == 0 and "validation" in data.rows:
            with window.paused(), suppress(Interrupted):
                metrics.write(evaluator.evaluate(model, "validation", step)[0])
                evaluated_at = step
        stop = stopper.agreed()
        if args.save_steps and (step % args.save_steps == 0 or step == max_steps) or stop:
            saved_at = save(step)
        if stop:
            break
        profile.step_begins(step + 1)
    console.stop()

    # ---- final evaluation and export -------------------------------------------------------------------------------------
    with suppress(Interrupted):
        stopper.interrupt()
        if "validation" in data.rows and evaluated_at != step:
            metrics.write(evaluator.evaluate(model, "validation", step)[0])
        if "test" in data.rows:
            record, predicted = evaluator.evaluate(model, "test", step)
            metrics.write(record)
            write_predictions(Path(args.output_dir) / "predictions.jsonl", evaluator.prediction_rows("test", predicted))
        watchdog.stop()
        final = export(accelerator, model, tokenizer, args.output_dir, args)
        console.say(f"final: {final} loads with from_pretrained, weights compared")
    if (stop := stopper.known) and saved_at != step:
        save(step)
    if stop:
        console.say(f"stopped by signal {stop} after step {step}; the same command goes on from the newest checkpoint")
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    # It ends here, with everything alive: freeing a process group joins its threads, and one of them may wait for Python's lock.
    finish(128 + stop if stop else 0)


def fingerprint(args, strategy, config, data, max_steps, warmup_steps):
    """Return what decides the mathematics of a run, for comparison on resume; what only logs, evaluates or saves is not in it."""
    names = (
        "task freeze unfreeze mixed_precision per_device_train_batch_size gradient_accumulation_steps learning_rate "
        "group_by_length lr_scheduler_type weight_decay optim max_grad_norm seed peft lora_r lora_alpha lora_dropout "
        "target_modules modules_to_save num_virtual_tokens trainable_tokens quantize double_quant"
    )
    facts = {f"--{name}": getattr(args, name) for name in names.split()}
    model = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    facts |= {"model configuration": records.sha256_of(model), "warm-up steps": warmup_steps}
    if args.lr_scheduler_type != "constant" or args.peft == "adalora":
        facts["steps of the schedule"] = max_steps  # a constant rate can be kept up for longer
    facts |= {"training rows": f"{data.digests['train']}, {len(data.rows['train'])} rows", "labels": data.labels}
    return facts | {"strategy": strategy.summary, "processes": strategy.num_processes}


def first_on_each_node(accelerator, function):
    """Call `function` on one process of each node, then on the others, so that these find its cache; all raise its UserError."""
    error = result = None
    with accelerator.local_main_process_first():
        try:
            result = function()
        except UserError as caught:  # raised after the barrier in the context's end, or the others would wait there for ever
            error = caught
    if error is not None:
        raise error
    return result


def stop_if_unused(accelerator, watch, allow_unused, console):
    """Raise UserError, on every rank, naming the trainable parameters that had no gradient on any rank in the first step."""
    unused = set.intersection(*(set(names) for names in gather_object([watch.without_gradient()])))
    if unused and allow_unused:
        console.say(f"warning: {len(unused)} trainable tensors had no gradient in the first step: {', '.join(sorted(unused)[:10])}")
    elif unused:
        raise UserError(
            f"{len(unused)} trainable tensors had no gradient in the first step: {', '.join(sorted(unused)[:10])}; freeze them "
            "(--freeze re:PATTERN), or pass --allow_unused if they are used later (a mixture of experts)"
        )


def write_predictions(path, rows):
    """Write predictions.jsonl if there are any rows (only the main process has them)."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if lines:
        path.write_text("".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            # All ranks tend to meet the same mistake. The launcher ends them all when the first one ends: let rank 0 speak, and
            # speak up only if it had nothing to say.
            restore_default_signals(rank)
            time.sleep(5)
        where = f" (rank {rank})" if rank > 0 else ""
        print("\n".join(f"train.py: error{where}: {problem}" for problem in error.problems), file=sys.stderr, flush=True)
        finish(error.code)
