#!/usr/bin/env bash
# Set up and run the tests: `bash scripts/test.sh`; in under a minute, without training runs: `bash scripts/test.sh --quick`.
# Tests marked gpu run where there is CUDA, those marked nvme where there is libaio, browser where there is chromium. Further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
export HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
words=("$@")
if [[ ${1:-} == --quick ]]; then
    words=(-m "not launch" "${@:2}")
fi
exec .venv/bin/python -m pytest "${words[@]}"
