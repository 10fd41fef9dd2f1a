"""Tensor parallel layers (DeepSpeed's AutoTP): which models and flags can have them, and which ranks then share their rows.

The ranks of a group follow each other (deepspeed/utils/groups.py, _init_tp_mesh_device), hold a piece of each matrix and see the
same rows: rows are dealt to groups, and what is counted over all ranks is counted once for each of a group.
"""

from zerotune.engine.deepspeed_config import section
from zerotune.engine.sequence_parallel import launched_size

# Seen to do what a plain loop does: Llama and Qwen 2 in tests/test_big_machines.py, the others by hand. Their transformers plans
# cut by columns and rows alone. Phi-3's has a style that DeepSpeed 0.19.8 does not know (module_inject/tp_plan_converter.py:45); a
# model without a plan (GPT-2, T5, BART) is left to a guess by names.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KEYS = {"autotp_size", "vocab_parallel_lm_head"}
# Flags that reach into layers which AutoTP replaces, or read checkpoints by whole parameters.
UNSEEN = (
    "peft quantize loss_chunks freeze_schedule cache_frozen torch_compile liger auto_batch probe_longest_batch "
    "load_best_model_at_end packing activation_offload"
).split()


def group_size(config):
    """Return how many ranks share the rows and the layers of a DeepSpeed JSON (None: no DeepSpeed); 1 without tensor parallel."""
    return section(config or {}, "tensor_parallel").get("autotp_size") or 1


def flag_problems(config, name, args):
    """Return problems of a JSON's tensor_parallel section: its values, and flags that have not been seen to go with it."""
    given, zero = config.get("tensor_parallel"), section(config, "zero_optimization")
    if not isinstance(given, dict):
        return []
    size, problems = given.get("autotp_size"), []
    if type(size) is not int or size < 2:
        return [f"{name}: tensor_parallel.autotp_size is {size!r}; give a number of ranks above 1, or remove tensor_parallel"]
    if given.get("vocab_parallel_lm_head") is not False:
        problems.append(f"{name}: tensor_parallel.vocab_parallel_lm_head must be false: train.py's loss wants whole logits")
    if zero.get("stage") == 3:
        problems.append(
            f"{name}: tensor_parallel at stage 3: transformers 5.23 loads no model into layers that are cut twice; use "
            "ds_configs/zero2_tp.json"
        )
    if section(zero, "offload_optimizer").get("device", "none") != "none":
        problems.append(f"{name}: tensor_parallel has not been seen to go with offload_optimizer; remove one of them")
    on = [flag for flag in UNSEEN if getattr(args, flag)]
    problems += [f"--{flag}: has not been seen to go with tensor_parallel; leave it out, or use zero3" for flag in on]
    if args.optim not in ("adamw_torch_fused", "adamw_torch"):
        problems.append(f"--optim {args.optim}: has not been seen to go with tensor_parallel; use adamw_torch_fused")
    if args.task != "causal":
        problems.append(f"--task {args.task}: tensor_parallel is for causal models ({', '.join(FAMILIES)}); use zero3")
    return problems


def model_problems(config, name, model_config, num_processes, num_machines, freezes):
    """Return why a model cannot have its layers cut over so many ranks.

    model_config: transformers'; freezes: whether a part of it is to be frozen.
    """
    if (size := group_size(config)) == 1:
        return []
    text = model_config.get_text_config()
    given = f"{name}: tensor_parallel.autotp_size {size}"
    if (num_processes // num_machines) % size:
        return [f"{given}: does not divide the {num_processes // num_machines} processes of a machine; give a number that does"]
    if model_config.model_type not in FAMILIES:
        return [f"{given}: {model_config.model_type} has not been seen to train so; allowed: {', '.join(FAMILIES)}; use zero3"]
    if freezes and model_config.model_type == "qwen3":  # a hook for the gradients of its norms (module_inject/auto_tp.py:961)
        return [
            f"{given} and --freeze: DeepSpeed 0.19.8 cannot cut qwen3 where norms are frozen; leave one of them out, or use zero3"
        ]
    heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    sizes = {"attention heads": heads[0], "key-value heads": heads[1], "intermediate_size": text.intermediate_size}
    sizes["vocabulary"] = text.vocab_size
    return [f"{given}: does not divide the model's {what} ({number})" for what, number in sizes.items() if number % size]


def place(accelerator, evaluating=False):
    """Return (into how many shares a step's rows are dealt, which of them is this rank's, its stretch of each row).

    A stretch is (into how many a row is cut, which of them). evaluating: where rows are not cut.
    """
    parts = 1 if evaluating else launched_size()
    size, rank = copies(accelerator) * parts, accelerator.process_index
    return accelerator.num_processes // size, rank // size, (parts, rank % parts)


def copies(accelerator):
    """Return how many ranks see each row."""
    plugin = accelerator.state.deepspeed_plugin
    return group_size(plugin.deepspeed_config) if plugin else 1


def piece_words(model):
    """Return words for which piece of each layer an engine holds, for names in a checkpoint; '' where layers are whole."""
    size = model.autotp_size() if hasattr(model, "autotp_size") else 0
    if size <= 1:
        return ""
    import torch.distributed  # takes a second, which scripts/launch.sh's check need not

    return f" [piece {torch.distributed.get_rank() % size} of {size}]"


def num_pieces(name):
    """Return into how many pieces the layer of a name in a checkpoint was cut."""
    return int(name.rpartition(" ")[2].rstrip("]")) if " [piece " in name else 1
