"""The model of a checkpoint, put together on the CPU from its shards, whatever the layout; and final/ of the best one.

An engine that has trained is not loaded a second time (DeepSpeed #1612: parts of it stay as they were). The main process alone
reads the files, and needs host memory for two models of final/'s size: the one it fills, and the one it loads to compare.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate.utils import broadcast_object_list, set_seed

from zerotune.engine.frozen import frozen_checksum
from zerotune.engine.pieces import WEIGHT
from zerotune.engine.tensor_parallel import num_pieces
from zerotune.errors import UserError
from zerotune.model import loading
from zerotune.model.adapters import adapter_state
from zerotune.model.quantization import quantization_config
from zerotune.run import manifest
from zerotune.run.export import by_main_process, export, write
from zerotune.run.records import add_to_run
from zerotune.run.state_files import BUFFER, SavedState, persistent_buffers


def model_of(folder, content, flags, make_trainable):
    """Return (model on the CPU, tokenizer) of a verified checkpoint; on one process, while the others may do as they like.

    content: its manifest. flags: those of its run, make_trainable: train.py's. UserError if the model that the run began from is
    not the one that --model_name_or_path names.
    """
    saved = SavedState(folder)
    if (pieces := max(map(num_pieces, saved.shapes), default=1)) > 1:
        raise UserError(
            f"{folder}: its layers are cut into {pieces} pieces (tensor_parallel); take the run's final/, which is whole"
        )
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # else ZeRO-3 would shard the model over all ranks
    config, tokenizer = loading.load_config_and_tokenizer(flags)
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[flags.mixed_precision]
    dtype = torch.float32 if content["layout"]["strategy"] in ("single", "ddp") else precision
    set_seed(flags.seed)  # new weights that do not learn are as they were
    quantization = quantization_config(flags, config.model_type, precision, 0)
    model, _ = loading.load_model(flags, config, tokenizer, content["fingerprint"]["labels"], dtype, quantization)
    max_steps = content["fingerprint"].get("steps of the schedule", 1)
    model, report = make_trainable(model, flags, tokenizer, dtype, max_steps)
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True)
    if content["frozen_weights"] not in (None, frozen_checksum(alone, model, precision, report.never_learning(model))):
        raise UserError(f"{folder}: its frozen weights are others than {flags.model_name_or_path} has; give --model_name_or_path")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in saved.shapes:
                learned = torch.empty(parameter.numel())
                saved.fill(learned, WEIGHT, name)
                parameter.copy_(learned.view(parameter.shape))
        for name, buffer in persistent_buffers(model).items():
            for _, values in saved.parts(BUFFER, name):
                buffer.copy_(values.view(buffer.shape))
    return model, tokenizer


def export_saved(folder, content, flags, make_trainable, final):
    """Write the folder `final` from a verified checkpoint, as `export` does from an engine; on one process."""
    model, tokenizer = model_of(folder, content, flags, make_trainable)
    write(model, adapter_state(model) if flags.peft else model.state_dict(), tokenizer, final, flags)


def export_best(run, step, make_trainable):
    """Write final/ from the best evaluation's checkpoint, or from the engine, which is at `step`, and say which; a collective.

    run: train.py's. RunError, on every rank, if final/ cannot be written.
    """
    args, best, accelerator, say = run.args, run.best, run.accelerator, run.console.say
    final, folder, content, problems = Path(args.output_dir) / "final", None, None, []
    if accelerator.is_main_process and args.load_best_model_at_end:
        folder, content, problems = newest_whole(args.output_dir, best.kept, step)
    # Whether a checkpoint is whole is known where it was read, and an export from the engine is a collective.
    final_step = broadcast_object_list([content["step"] if folder else step])[0]
    for problem in problems:
        say(f"warning: the best model: {problem}")
    if best.used_up:
        say(f"early stopping: {best.metric} was no better in {best.patience} evaluations")
    if final_step == step:
        export(accelerator, run.model, run.tokenizer, final, args, run.cache.unread)
    else:
        by_main_process(accelerator, lambda: export_saved(folder, content, args, make_trainable, final))
    if accelerator.is_main_process:
        add_to_run(args.output_dir, {"final_step": final_step, "best": best.facts()})
    found = f"; the best {best.metric}, {best.value:.4g}, is of step {best.step}" if best.step else ""
    found += f", and the last evaluation and predictions are of step {step}" if final_step != step else ""
    say(f"final: {final} of step {final_step} loads with from_pretrained, weights compared{found}")


def newest_whole(output_dir, steps, last):
    """Return (folder, manifest, problems) of the best step whose checkpoint is whole; None for the last step, or without any.

    steps: the best last. problems: lines of why better ones cannot be had.
    """
    problems = []
    for step in reversed(steps):
        if step == last:
            return None, None, problems
        folder = Path(output_dir) / f"checkpoint-{step}"
        try:
            content, damage = manifest.verify(folder)
        except OSError as error:
            content, damage = None, [f"{error.filename}: {error.strerror}"]
        if not damage:
            return folder, content, problems
        problems.append(f"checkpoint-{step} is not whole ({'; '.join(damage[:3])})")
    return None, None, [*problems, f"no whole checkpoint of one; final/ is of the last step, {last}"]
