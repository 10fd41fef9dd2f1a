"""Mistakes in flags that are right by themselves and wrong together: a line each, with what to do."""

import os
import tempfile
from pathlib import Path

from zerotune.errors import UserError, nearest
from zerotune.model.freeze_schedule import read_schedule
from zerotune.rows.sources import sources_of
from zerotune.run.best import known_metrics, metric_key, names_of_sources, writes_checkpoints


class Problems(list):
    """Lines of what is wrong."""

    def need(self, condition, problem):
        if not condition:
            self.append(problem)


def check_savers(args):
    """Return a line for each mistake in the flags of adapters and quantised bases."""
    problems = Problems()
    need = problems.need
    kind = args.peft
    for name in ("target_modules", "modules_to_save", "merge_adapter"):
        need(kind or not getattr(args, name), f"--{name}: is for adapters; give --peft as well")
    need(
        not args.target_modules or kind not in ("prefix", "prompt", "trainable_tokens"), f"--target_modules: --peft {kind} has none"
    )
    need(
        bool(args.trainable_tokens) == (kind == "trainable_tokens"),
        "--trainable_tokens and --peft trainable_tokens go together; give both or none",
    )
    need(
        kind != "trainable_tokens" or not (args.unfreeze or args.modules_to_save),
        "--peft trainable_tokens: nothing learns beside the tokens; leave out --unfreeze and --modules_to_save",
    )
    need(
        kind != "adalora" or args.mixed_precision != "fp16",
        "--peft adalora: in fp16 an overflow would spoil the importances by which it moves its ranks; use bf16",
    )
    need(
        kind != "adalora" or not args.deterministic,
        "--deterministic: --peft adalora picks its ranks by torch.kthvalue, which gives no promise of the same bits on a GPU; use "
        "--peft lora, or leave out --deterministic",
    )
    need(not (args.merge_adapter and kind in ("prefix", "prompt")), f"--merge_adapter: --peft {kind} cannot be merged into weights")
    need(
        not (args.gradient_checkpointing and kind == "prefix"),
        "--gradient_checkpointing: does not go with --peft prefix, which gives each block keys and values through the cache that "
        "recomputation switches off; use --peft lora, or train without checkpointing",
    )
    need(
        (args.optim == "muon") == (args.muon_learning_rate is not None),
        "--optim muon and --muon_learning_rate go together; give both or none",
    )
    need(
        args.optim != "muon" or not kind,
        f"--optim muon: steps the matrices of a model's blocks, and --peft {kind} has them frozen; use --optim adamw_torch_fused",
    )
    planned = args.auto_batch or args.probe_longest_batch or args.gradient_checkpointing == "auto"
    need(args.optim != "muon" or not planned, "--optim muon: its memory is not planned; leave out what goes by the plan")
    need(args.optim != "muon" or args.learning_rate > 0, "--optim muon: --learning_rate has to be above 0 with it")
    need(
        not (args.gradient_checkpointing == "auto" and args.auto_batch),
        "--gradient_checkpointing auto and --auto_batch are both given, and each would choose by the other; give one",
    )
    need(
        kind or args.unfreeze or not args.quantize,
        "--quantize: quantised weights cannot learn; give an adapter as well, such as --peft lora, or --unfreeze what is not "
        "quantised, such as head",
    )
    if args.freeze_schedule:
        try:
            read_schedule(args.freeze_schedule)
        except UserError as error:
            problems += error.problems
        for name in ("freeze", "unfreeze", "peft", "quantize", "cache_frozen"):
            need(not getattr(args, name), f"--freeze_schedule and --{name} are both given; give one")
        need(
            args.optim.startswith("adamw_torch"),
            f"--freeze_schedule: --optim {args.optim} keeps states in blocks that another set of parameters does not have; use "
            "--optim adamw_torch_fused",
        )
    need(
        args.frozen_eval or not args.cache_frozen,
        "--cache_frozen: with dropout, what is frozen gives other outputs each time; give --frozen_eval as well",
    )
    need(
        not args.cache_frozen or kind not in ("prefix", "prompt"),
        f"--cache_frozen: --peft {kind} gives what is frozen inputs that learn; leave one out",
    )
    need(
        not args.double_quant or args.quantize in ("nf4", "fp4"),
        f"--double_quant: is for --quantize nf4 and fp4 (given: {args.quantize})",
    )
    return problems


def check_best(args):
    """Return a line for each mistake in the flags of evaluations, of the best one, and of checkpoints."""
    problems = Problems()
    need = problems.need
    need(
        args.eval_strategy == "steps" or not args.eval_steps,
        f"--eval_steps {args.eval_steps}: is for --eval_strategy steps (given: {args.eval_strategy}); leave out one of them",
    )
    asks = {
        "--load_best_model_at_end": args.load_best_model_at_end,
        "--save_strategy best": args.save_strategy == "best",
        "--early_stopping_patience": args.early_stopping_patience,
        "--metric_for_best_model": args.metric_for_best_model,
    }
    asking = next((name for name, given in asks.items() if given), None)
    if asking is None:
        lone = "nothing compares evaluations; give --load_best_model_at_end or --early_stopping_patience as well"
        need(args.greater_is_better is None, f"--greater_is_better: {lone}")
        need(not args.early_stopping_threshold, f"--early_stopping_threshold: {lone}")
        return problems
    how = "give --eval_strategy epoch, or --eval_steps N"
    need(args.eval_strategy != "no", f"{asking}: compares evaluations, and --eval_strategy no makes none; {how}")
    need(
        args.eval_strategy != "steps" or args.eval_steps,
        f"{asking}: compares evaluations, and --eval_steps 0 makes one, at the end; {how}",
    )
    need(
        args.validation_file or not args.train_file,
        f"{asking}: compares evaluations, and there are no rows for them; give --validation_file",
    )
    try:
        known, metric = known_metrics(args), metric_key(args.metric_for_best_model or "loss", names_of_sources(args))
    except UserError:  # of the files, whose own check says it
        return problems
    need(
        known is None or metric in known,
        f"--metric_for_best_model {args.metric_for_best_model}: no number of an evaluation under these flags"
        f"{nearest(metric, known or [])}; allowed: {', '.join(known or [])}, or one of a --metric",
    )
    need(
        not args.load_best_model_at_end or writes_checkpoints(args),
        "--load_best_model_at_end: the best model is kept in a checkpoint, and --save_strategy no (or --save_steps 0) writes none; "
        "give --save_strategy best",
    )
    need(
        not args.early_stopping_threshold or args.early_stopping_patience,
        f"--early_stopping_threshold {args.early_stopping_threshold:g}: is for --early_stopping_patience N; give both or none",
    )
    return problems


REQUIRED = {  # flag: (what it is, another that may stand for it)
    "model_name_or_path": ("a folder with a saved model, or a hub name", None),
    "output_dir": ("the folder of this run", None),
    "train_file": ("the rows to learn from", "dataset_name"),
}


def check_rows(args):
    """Return a line for each mistake in the flags of what a row is."""
    problems = Problems()
    need = problems.need
    chats = args.messages_column is not None
    need(not chats or args.task == "causal", f"--messages_column: conversations are for --task causal (given: {args.task})")
    need(not (chats and args.text_column), "--messages_column and --text_column are both given; give one")
    for name, default in (("chat_template", None), ("train_on", "assistant"), ("truncation", "oldest_turns")):
        need(chats or getattr(args, name) == default, f"--{name}: is for conversations; give --messages_column as well")
    for name in ("source_prefix", "source_suffix"):
        need(not (chats and getattr(args, name)), f"--{name}: the chat template decides what stands around a turn; leave it out")
    need(args.targets == "first" or args.task != "classification", "--targets all: a class is no list of texts")
    need(args.targets == "first" or not (chats or args.text_column), "--targets all: is for rows of source and target")
    need(not args.packing or args.task != "classification", "--packing: a classifier reads a row at one place; leave it out")
    need(
        not args.packing or args.peft not in ("prefix", "prompt"),
        f"--packing: does not go with --peft {args.peft}, which puts positions of its own before each line of a batch",
    )
    by_row = args.attn_implementation == "sdpa_by_row"
    need(
        args.packing or not by_row,
        "--attn_implementation sdpa_by_row: is for rows in one line; give --packing as well, or use sdpa",
    )
    need(
        not (args.torch_compile and by_row),
        "--attn_implementation sdpa_by_row: --torch_compile would compile it for each row's length anew; use sdpa",
    )
    need(not args.loss_chunks or args.task != "classification", "--loss_chunks: a classifier has no logits of a vocabulary")
    need(bool(args.source_lang) == bool(args.target_lang), "--source_lang and --target_lang go together; give both or none")
    return problems


def check_files(args, required):
    """Return a line for each of `required` that is not given, and for each file, folder and pair of flags that cannot be."""
    problems = Problems()
    need = problems.need
    for name in required:
        what, other = REQUIRED[name]
        given = getattr(args, name) or (other and getattr(args, other))
        need(given, f"--{name}{f' (or --{other})' * bool(other)} is required: {what}")
    need(not (args.train_file and args.dataset_name), "--train_file and --dataset_name are both given; give one")
    for name in ("model_name_or_path", "tokenizer_name"):
        path = getattr(args, name)
        if path and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            need(Path(path).is_dir(), f"--{name} {path}: no such folder")
    for name in ("train_file", "validation_file", "test_file"):
        try:
            sources_of(getattr(args, name), name)
        except UserError as error:
            problems += error.problems
    if path := args.chat_template:
        need(os.access(path, os.R_OK) and Path(path).is_file(), f"--chat_template {path}: no such file, or not readable")
    need(
        (args.save_steps == "auto") == (args.mean_hours_between_failures is not None),
        "--save_steps auto and --mean_hours_between_failures go together; give both or none",
    )
    need(not (args.warmup_ratio and args.warmup_steps), "--warmup_ratio and --warmup_steps are both given; give one")
    for name in ("output_dir", "cache_frozen"):
        if not getattr(args, name):
            continue
        out = Path(getattr(args, name))
        if out.exists() and not out.is_dir():
            problems.append(f"--{name} {out}: is a file; give a folder")
            continue
        parent = next(p for p in (out, *out.resolve().parents) if p.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()  # os.access says yes to root where nothing can be made, in /proc for one
        except OSError as error:
            problems.append(f"--{name} {out}: {parent} is not writable ({error.strerror})")
    return problems
