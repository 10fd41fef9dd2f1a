#!/usr/bin/env bash
# T5 on question/answer pairs with a frozen encoder: only the last decoder block learns, so that gradients and optimizer states are
# a fraction of the model's, and the encoder is never run backwards, not even for gradient checkpointing.
#   TRAIN_FILE=rows.jsonl [MODEL=google/flan-t5-large] [STRATEGY=zero2] bash scripts/t5_frozen_encoder.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-zero2}" exec bash scripts/launch.sh \
    --task seq2seq --model_name_or_path "${MODEL:-google/flan-t5-large}" --output_dir "${OUT:-runs/t5_frozen_encoder}" \
    --train_file "${TRAIN_FILE:?a file of rows}" --source_column "${SOURCE:-question}" --target_column "${TARGET:-answer}" \
    --max_source_length 512 --max_target_length 256 \
    --freeze encoder decoder --unfreeze "decoder.layers[-1]" \
    --mixed_precision "${PRECISION:-bf16}" --gradient_checkpointing \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
    --num_train_epochs 3 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.03 "$@"
