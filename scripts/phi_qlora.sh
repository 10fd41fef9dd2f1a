#!/usr/bin/env bash
# QLoRA of a Phi-3 or Phi-4-mini on conversations, on one consumer GPU: the base in 4 bits (NF4, scales quantised as well), LoRA on
# all linear layers, the loss in pieces, since 200,000 words make logits and their gradients nearly as large as the model.
#   TRAIN_FILE=chats.jsonl [MESSAGES=messages] [MODEL=microsoft/Phi-4-mini-instruct] bash scripts/phi_qlora.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-single}" exec bash scripts/launch.sh \
    --task causal --model_name_or_path "${MODEL:-microsoft/Phi-4-mini-instruct}" --output_dir "${OUT:-runs/phi_qlora}" \
    --train_file "${TRAIN_FILE:?a file of conversations}" --messages_column "${MESSAGES:-messages}" --max_source_length 2048 \
    --quantize nf4 --double_quant --peft lora --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --target_modules all-linear \
    --loss_chunks 8 --mixed_precision "${PRECISION:-bf16}" --gradient_checkpointing \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
    --num_train_epochs 1 --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_ratio 0.03 "$@"
