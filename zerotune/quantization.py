"""A base in 4 or 8 bits, by bitsandbytes: frozen, with an adapter on it that learns (QLoRA, Dettmers et al. 2023).

--quantize nf4 --double_quant --peft lora --lora_r 16 --lora_alpha 32 --target_modules all-linear
"""

import torch


def quantization_config(args, precision, zero_stage):
    """Return transformers' configuration for the flags, or None. precision: the dtype that products are computed in."""
    if args.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if args.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quantize,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=precision,
        # ZeRO-3 shards tensors of one floating type; the four-bit codes can be stored in any.
        bnb_4bit_quant_storage=precision if zero_stage == 3 else torch.uint8,
    )


def prepare_quantized(model):
    """Freeze a quantised model and bring what is not quantised (norms, head) to float32, as peft advises."""
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if set(getattr(model, "hf_device_map", {}).values()) == {"cpu"}:
        del model.hf_device_map  # accelerate takes any mention of the CPU for offloading, and refuses
    return model
