#!/usr/bin/env bash
# A decoder-only model on prompt/target pairs, loss on the target alone, all weights, under ZeRO-3: weights, gradients and optimizer
# states are shared out over the GPUs. Does it not fit? STRATEGY=zero3_offload, then zero3_nvme.
#   TRAIN_FILE=rows.jsonl [MODEL=meta-llama/Llama-3.2-1B] [STRATEGY=zero3] bash scripts/causal_pairs.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-zero3}" exec bash scripts/launch.sh \
    --task causal --model_name_or_path "${MODEL:-meta-llama/Llama-3.2-1B}" --output_dir "${OUT:-runs/causal_pairs}" \
    --train_file "${TRAIN_FILE:?a file of rows}" --source_column "${SOURCE:-question}" --target_column "${TARGET:-answer}" \
    --source_prefix "Question: " --source_suffix " Answer: " --max_source_length 512 --max_target_length 512 \
    --mixed_precision "${PRECISION:-bf16}" --gradient_checkpointing \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --num_train_epochs 2 --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0.1 "$@"
