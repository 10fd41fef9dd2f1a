#!/usr/bin/env bash
# Collect, on a machine with network, the wheels of requirements.txt and their dependencies that an air-gapped machine lacks:
#   HAVE=have.txt bash scripts/wheelhouse.sh PYTHON_VERSION PLATFORM DIR
#   HAVE=have.txt bash scripts/wheelhouse.sh 3.12 manylinux_2_28_x86_64 wheels
# It prints the one command to run there. PLATFORM is pip's name of the target: manylinux_2_28_x86_64 is Linux with glibc 2.28 or
# later (`getconf GNU_LIBC_VERSION` says). What has no wheel is built into one here; DeepSpeed without its operators: it builds them
# where it runs. A second run takes what is in DIR already; one run at a time. DIR is complete when it has its requirements.txt.
# Environment, with defaults:
#   HAVE                   a file: the output of `pip freeze` there; what it names is not collected, whatever its version
#   REQUIREMENTS           the list to collect; default: the repository's requirements.txt
#   ONLY                   names of that list, for less than all of it: ONLY="deepspeed datasets"
#   MAX_MIB=0              fail if the wheels in DIR are more than this; 0: no limit
#   PYTHON=python3         3.11 or later, with pip; .venv is taken if there is one
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

PYTHON="${PYTHON:-python3}"
[[ -x $ROOT/.venv/bin/python && $PYTHON == python3 ]] && PYTHON="$ROOT/.venv/bin/python"
if ! "$PYTHON" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "wheelhouse: PYTHON=$PYTHON is no Python 3.11 or later with pip; install it (Debian: apt install python3-pip)" >&2
    exit 2
fi
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m zerotune wheelhouse "$@"
