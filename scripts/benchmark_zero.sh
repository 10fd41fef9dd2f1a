#!/usr/bin/env bash
# Measure every ZeRO strategy on this node with your own model and rows, in one line:
#   bash scripts/benchmark_zero.sh --model_name_or_path ... --train_file rows.jsonl --mixed_precision bf16
# Words are train.py's flags. Without any: the quickstart's T5. A second call goes on with what is missing. Environment, with defaults:
#   OUT=runs/benchmark      results.json, table.md, memory.png, speed.png, pareto.png
#   STRATEGIES              "ddp zero1 zero2 zero2_offload zero3 zero3_offload"
#   REPEATS=1               ratios are quoted from 5 on
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
[[ -x $ROOT/.venv/bin/python && $PYTHON == python3 ]] && PYTHON="$ROOT/.venv/bin/python"
read -ra strategies <<<"${STRATEGIES:-ddp zero1 zero2 zero2_offload zero3 zero3_offload}"
measure=("$PYTHON" -m zerotune benchmark --out "${OUT:-runs/benchmark}" --repeats "${REPEATS:-1}")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if (($# == 0)); then
    exec "${measure[@]}" --matrix "$ROOT/benchmarks/quickstart.yaml" --strategies "${strategies[@]}"
fi
exec "${measure[@]}" --strategies "${strategies[@]}" -- "$@"
