#!/usr/bin/env bash
# T5 with LoRA under ZeRO-3: the frozen base is sharded over the GPUs, gradients and optimizer states exist for the adapter alone, and
# final/ holds the adapter, some tens of megabytes. --merge_adapter writes the whole model beside it.
#   TRAIN_FILE=rows.jsonl [MODEL=google/flan-t5-xl] [STRATEGY=zero3] bash scripts/t5_lora.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-zero3}" exec bash scripts/launch.sh \
    --task seq2seq --model_name_or_path "${MODEL:-google/flan-t5-xl}" --output_dir "${OUT:-runs/t5_lora}" \
    --train_file "${TRAIN_FILE:?a file of rows}" --source_column "${SOURCE:-question}" --target_column "${TARGET:-answer}" \
    --max_source_length 512 --max_target_length 256 \
    --peft lora --lora_r 16 --lora_alpha 32 --target_modules all-linear \
    --mixed_precision "${PRECISION:-bf16}" --gradient_checkpointing \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
    --num_train_epochs 3 --learning_rate 3e-4 --lr_scheduler_type cosine --warmup_ratio 0.03 "$@"
