"""Mistakes in flags that are right by themselves and wrong together: a line each, with what to do."""

from zerotune.errors import nearest
from zerotune.run.best import known_metrics, metric_key, writes_checkpoints


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
        kind or args.unfreeze or not args.quantize,
        "--quantize: quantised weights cannot learn; give an adapter as well, such as --peft lora, or --unfreeze what is not "
        "quantised, such as head",
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
    known, metric = known_metrics(args), metric_key(args.metric_for_best_model or "loss")
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
