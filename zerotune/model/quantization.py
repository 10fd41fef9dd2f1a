"""A base in 4 or 8 bits, by bitsandbytes: frozen, while an adapter on it (QLoRA, Dettmers et al. 2023) or its head learns.

--quantize nf4 --double_quant --peft lora --lora_r 16 --lora_alpha 32 --target_modules all-linear
--quantize int8 --unfreeze head
"""

import torch

from zerotune.errors import UserError
from zerotune.model.freezing import HEAD_NAMES

# Found by trying every encoder-decoder kind of transformers 5.23 with bitsandbytes 0.50.
NARROWED = "its feed-forward layers convert activations to the type of their weights, which are codes then"
UNSUPPORTED = {
    ("longt5", "nf4"): NARROWED,
    ("longt5", "fp4"): NARROWED,
    ("switch_transformers", "nf4"): NARROWED,
    ("switch_transformers", "fp4"): NARROWED,
    ("prophetnet", "int8"): "its attention hands linear layers a shape that bitsandbytes' 8-bit product loses",
}


def quantization_config(args, model_type, precision, zero_stage):
    """Return transformers' configuration for the flags, or None. precision: the dtype that products are computed in.

    Raises UserError for a model type that does not work in these bits.
    """
    if args.quantize is None:
        return None
    if reason := UNSUPPORTED.get((model_type, args.quantize)):
        other = "nf4" if args.quantize == "int8" else "int8"
        raise UserError(f"--quantize {args.quantize}: not for a {model_type} model: {reason}; use --quantize {other}")
    from transformers import BitsAndBytesConfig

    # transformers leaves the last layer alone, but takes a classifier's bias for it.
    kept = {"llm_int8_skip_modules": sorted(HEAD_NAMES)} if args.task == "classification" else {}
    if args.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(
        **kept,
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quantize,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=precision,
        # ZeRO-3 shards tensors of one floating type; the four-bit codes can be stored in any.
        bnb_4bit_quant_storage=precision if zero_stage == 3 else torch.uint8,
    )


def prepare_quantized(model):
    """Freeze a quantised model and bring what is not quantised (norms, head) to float32, as peft advises."""
    from bitsandbytes.nn import Linear4bit
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On some CPUs bitsandbytes packs the codes anew for evaluation, with other scales and a product without a gradient,
            # and keeps them so afterwards.
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if set(getattr(model, "hf_device_map", {}).values()) == {"cpu"}:
        del model.hf_device_map  # accelerate takes any mention of the CPU for offloading, and refuses
    return model
