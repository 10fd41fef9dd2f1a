#!/usr/bin/env bash
# Set up and run the tests: `bash scripts/test.sh`, or a part of them: `bash scripts/test.sh -m "not launch"` (under a minute).
# Tests marked gpu run where there is CUDA. Further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
export HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
exec .venv/bin/python -m pytest "$@"
