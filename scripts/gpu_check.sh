#!/usr/bin/env bash
# What only a GPU can show, within 9 minutes on one, without network: the tests marked gpu, what each flag spares at a size that
# fills the chip, rows beside Hugging Face's Trainer, and ZeRO's stages; most important first. A part that fails or runs out of time
# is a line of summary.md, and the others go on. Environment, with defaults:
#   OUT=runs/gpu_check      results, written as they come; at most 8 files
#   PYTHON=python3          .venv is taken if there is one
#   BUDGET_SECONDS=520      for all parts together
#   PARTS="tests gpu_ladder gpu_ladder_t5 gpu_peer gpu_llama_1b gpu_t5_700m"     in this order; two calls with two parts each have twice the time
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit 1
PYTHON="${PYTHON:-python3}"
[[ -x $ROOT/.venv/bin/python && $PYTHON == python3 ]] && PYTHON="$ROOT/.venv/bin/python"
OUT="$(realpath -m "${OUT:-runs/gpu_check}")"
BUDGET_SECONDS="${BUDGET_SECONDS:-520}"
read -ra PARTS <<<"${PARTS:-tests gpu_ladder gpu_ladder_t5 gpu_peer gpu_llama_1b gpu_t5_700m}"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch sees no CUDA device; run it where there is one" >&2
    exit 2
fi
mkdir -p "$OUT"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$scratch/huggingface" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
summary="$OUT/summary.md"
"$PYTHON" -c 'from zerotune.run.records import environment_facts as f; print(f())' >"$summary"
printf '\n| part | end | seconds |\n|---|---|---|\n' >>"$summary"

# part NAME SECONDS COMMAND...: run it with a limit, the rest of the budget at most, and write how it ended.
part() {
    local name="$1" limit="$2" begin="$SECONDS" status=0
    shift 2
    local left=$((BUDGET_SECONDS - SECONDS))
    if ((left < 20)); then
        echo "| $name | left out: the budget of $BUDGET_SECONDS s is used up | 0 |" >>"$summary"
        return
    fi
    timeout -s INT -k 15 "$((limit < left ? limit : left))" "$@" >"$scratch/log" 2>&1 || status=$?
    # A run has a process group of its own, which a time limit does not reach; what it left would fill the GPU of the next part.
    pkill -KILL -f -- "$scratch" && sleep 3
    tail -n 60 "$scratch/log" >>"$OUT/logs.txt"
    case $status in
        0) end=passed ;;
        124 | 137) end="out of time" ;;
        *) end="failed ($status)" ;;
    esac
    echo "| $name | $end | $((SECONDS - begin)) |" | tee -a "$summary"
}

# keep NAME: put a benchmark's results so far into the output folder, with its table.
keep() {
    if [[ -f $scratch/$1/results.json ]]; then
        cp "$scratch/$1/results.json" "$OUT/$1.json"
        printf '\n' >>"$OUT/tables.md"
        cat "$scratch/$1/table.md" >>"$OUT/tables.md"
    fi
}

# gpu_tests: every eighth test in a process of its own, side by side, as most of a test's time is a start of Python.
gpu_tests() {
    local number place ends=0 tests group
    mapfile -t tests < <("$PYTHON" -m pytest -m gpu --collect-only -q -p no:cacheprovider tests/test_gpu.py | grep ::)
    for number in 1 2 3 4 5 6 7 8; do
        group=()
        for ((place = number - 1; place < ${#tests[@]}; place += 8)); do group+=("${tests[place]}"); done
        "$PYTHON" -m pytest -v -rP --basetemp "$scratch/tests_$number" -p no:cacheprovider "${group[@]}" >"$scratch/tests_$number.txt" &
    done
    for number in 1 2 3 4 5 6 7 8; do wait -n || ends=1; done
    cat "$scratch"/tests_?.txt
    return "$ends"
}
export -f gpu_tests
export PYTHON scratch PYTHONUNBUFFERED=1
for name in "${PARTS[@]}"; do
    if [[ $name == tests ]]; then
        part "tests marked gpu" 240 bash -c gpu_tests
        cat "$scratch"/tests_?.txt >"$OUT/tests.txt"
        continue
    fi
    if [[ $name == gpu_ladder* ]]; then
        part "$name" 300 "$PYTHON" tests/gpu_ladder.py --matrix "benchmarks/$name.yaml" --out "$OUT/$name"
        continue
    fi
    options=()
    [[ $name == gpu_peer ]] && options=(--peer trainer)
    part "$name" 300 "$PYTHON" -m zerotune benchmark --matrix "benchmarks/$name.yaml" --out "$scratch/$name" "${options[@]}"
    keep "$name"
done
cat "$summary"
