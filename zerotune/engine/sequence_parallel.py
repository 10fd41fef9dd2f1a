"""Sequences cut over ranks (Ulysses, arXiv:2309.14509): which models and flags can have it, and what each rank of a group sees.

The ranks of a group follow each other and see the same rows, each its own stretch of every row; in attention each has all positions
of some heads. Losses, targets and tokens of the stretches add up to those of the rows. accelerate's YAML says how many.
Evaluations have whole rows on each rank, without it.
"""

import contextlib
import os

from zerotune.engine.deepspeed_config import section

# Seen to do what a plain loop does: Llama and Qwen 3 in tests/test_big_machines.py, Qwen 2 by hand. DeepSpeed's attention drops
# every mask, and a sliding window would be lost with it.
FAMILIES = ("llama", "qwen2", "qwen3")
UNSEEN = (
    "peft quantize freeze_schedule frozen_eval cache_frozen torch_compile liger auto_batch probe_longest_batch packing "
    "activation_offload max_tokens_per_micro_batch"
).split()
SIZE = "PARALLELISM_CONFIG_SP_SIZE"  # of accelerate launch
OTHERS = ("DP_SHARD", "TP", "CP")  # its other kinds, which are not for DeepSpeed


def launched_size():
    """Return over how many ranks `accelerate launch` wants sequences cut; 1: not at all."""
    return int(os.environ.get(SIZE, 1))


def launch_problems(yaml, config, name, args):
    """Return problems of an accelerate YAML's parallelism_config, and of what has not been seen to go with it.

    yaml: {"SP" or one of OTHERS: number of ranks}.
    """
    size = yaml.get("SP", 1)
    problems = [
        f"the accelerate YAML's parallelism_config_{kind.lower()}_size is {yaml[kind]}; train.py knows "
        "parallelism_config_sp_size alone"
        for kind in OTHERS
        if yaml.get(kind, 1) != 1
    ]
    if size == 1:
        return problems
    zero = section(config or {}, "zero_optimization")
    given = f"parallelism_config_sp_size {size}"
    if zero.get("stage") != 3:
        problems.append(f"{given}: has been seen to work at stage 3 alone; use accelerate_configs/zero3_sp.yaml")
    for key in ("zero_hpz_partition_size", "offload_param", "offload_optimizer"):
        if key in zero:
            problems.append(f"{name}: {key} has not been seen to go with {given}; remove one of them")
    if section(config or {}, "tensor_parallel"):
        problems.append(f"{name}: tensor_parallel has not been seen to go with {given}; remove one of them")
    on = [flag for flag in UNSEEN if getattr(args, flag)]
    problems += [f"--{flag}: has not been seen to go with {given}; leave it out, or use zero3" for flag in on]
    if args.task != "causal":
        problems.append(f"--task {args.task}: {given} is for causal models ({', '.join(FAMILIES)}), as no mask is left; use zero3")
    if args.attn_implementation not in (None, "sdpa"):
        problems.append(f"--attn_implementation {args.attn_implementation}: has not been seen to go with {given}; use sdpa")
    return problems


def model_problems(size, model_config, num_processes):
    """Return why sequences of a model cannot be cut over so many ranks; model_config: transformers'."""
    if size == 1:
        return []
    text, given = model_config.get_text_config(), f"parallelism_config_sp_size {size}"
    if num_processes % size:
        return [f"{given}: does not divide the {num_processes} processes; give a number that does"]
    if model_config.model_type not in FAMILIES:
        return [f"{given}: {model_config.model_type} has not been seen to train so; allowed: {', '.join(FAMILIES)}; use zero3"]
    if getattr(text, "use_sliding_window", False):
        return [f"{given}: the model's attention has a sliding window, which DeepSpeed's drops; use zero3"]
    heads = {"attention heads": text.num_attention_heads, "key-value heads": text.num_key_value_heads}
    return [f"{given}: does not divide the model's {what} ({number})" for what, number in heads.items() if number % size]


def tell_accelerate(num_processes):
    """Have accelerate's ParallelismConfig know of the groups, by whose number DeepSpeed counts a step's rows."""
    os.environ["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(num_processes // launched_size())


@contextlib.contextmanager
def whole_rows():
    """Around evaluations: attention as it is without DeepSpeed's, which drops the mask of a batch that is padded on the left."""
    if launched_size() == 1:
        yield
        return
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    cut = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = cut
