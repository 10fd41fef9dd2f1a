#!/usr/bin/env bash
# GPT-2 with prefix tuning: 20 learned keys and values in front of each block, nothing else. Small enough for any GPU; it wants a high
# learning rate, and goes without gradient checkpointing.
#   TRAIN_FILE=rows.jsonl [MODEL=gpt2-large] [STRATEGY=ddp] bash scripts/gpt2_prefix.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-ddp}" exec bash scripts/launch.sh \
    --task causal --model_name_or_path "${MODEL:-gpt2-large}" --output_dir "${OUT:-runs/gpt2_prefix}" \
    --train_file "${TRAIN_FILE:?a file of rows}" --source_column "${SOURCE:-question}" --target_column "${TARGET:-answer}" \
    --max_source_length 256 --max_target_length 256 \
    --peft prefix --num_virtual_tokens 20 \
    --mixed_precision "${PRECISION:-bf16}" \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --num_train_epochs 3 --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_ratio 0.03 "$@"
