#!/usr/bin/env bash
# BART as a classifier: everything is frozen but the classification head, so that any GPU will do; the classes are those found in the
# training rows. Then unfreeze the top: add --unfreeze "decoder.layers[-1]" and a smaller --learning_rate.
#   TRAIN_FILE=train.csv VALIDATION_FILE=dev.csv [MODEL=facebook/bart-large] bash scripts/bart_classifier.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STRATEGY="${STRATEGY:-ddp}" exec bash scripts/launch.sh \
    --task classification --model_name_or_path "${MODEL:-facebook/bart-large}" --output_dir "${OUT:-runs/bart_classifier}" \
    --train_file "${TRAIN_FILE:?a file of rows}" --validation_file "${VALIDATION_FILE:?a file of rows}" \
    --text_column "${TEXT:-text}" --label_column "${LABEL:-label}" --max_source_length 256 \
    --freeze backbone \
    --mixed_precision "${PRECISION:-bf16}" \
    --per_device_train_batch_size 32 --per_device_eval_batch_size 64 \
    --num_train_epochs 3 --eval_steps 200 --learning_rate 1e-3 --warmup_steps 50 "$@"
