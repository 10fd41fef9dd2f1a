#!/usr/bin/env bash
# Make .venv from requirements.txt, once: a second call only compares a checksum. Sourced by the other scripts, or run by hand.
# Environment: PYTHON (default python3) makes the environment; nothing outside the repository is touched.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NEEDED_MIB=6000

fail() {
    echo "setup: $1" >&2
    exit 2
}

setup() {
    local stamp="$ROOT/.venv/.requirements.sha256" wanted free_mib
    wanted="$(sha256sum "$ROOT/requirements.txt")"
    if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || fail "no $python; install Python 3.11 or later (Debian: apt install python3 python3-venv)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11; set PYTHON=/path/to/a/newer/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv is missing (Debian: apt install python3-venv)"
    "$python" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
        fail "Python's headers are missing, with which DeepSpeed builds its operators (Debian: apt install python3-dev)"
    command -v g++ >/dev/null || fail "no C++ compiler, with which DeepSpeed builds its operators (Debian: apt install g++)"
    free_mib="$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')"
    ((free_mib >= NEEDED_MIB)) || fail "$free_mib MiB are free in $ROOT, but the packages need $NEEDED_MIB MiB; make room"
    echo "setup: installing requirements.txt into .venv (some minutes, once)"
    [[ -x $ROOT/.venv/bin/python ]] || "$python" -m venv "$ROOT/.venv"
    "$ROOT/.venv/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check -r "$ROOT/requirements.txt" ||
        fail "pip could not install requirements.txt; its message is above"
    echo "$wanted" >"$stamp"
}

setup
