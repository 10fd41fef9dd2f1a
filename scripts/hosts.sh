#!/usr/bin/env bash
# Start scripts/launch.sh over ssh on each machine of a file; launch.sh calls this itself when it is given one:
#   HOSTFILE=hosts STRATEGY=zero2 bash scripts/launch.sh --task causal ... --output_dir runs/first
# A line of the file is a name for ssh, which must ask for no password; the first is machine 0. The repository is in the same folder on
# all. Signals are passed on; when one machine ends with an error, or this script is killed, the others end. Environment, with defaults:
#   MAIN_PROCESS_IP        the first line's host
#   SSH="ssh -o BatchMode=yes -o ServerAliveInterval=15"
#   END_SECONDS=60         what the other machines get when one has failed
# and what launch.sh and the libraries read, which goes along: see `passed`.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
passed='STRATEGY|NUM_PROCESSES|PYTHON|DRY_RUN|OMP_NUM_THREADS|MAIN_PROCESS_PORT|MACHINES_(TIMEOUT|SHARED_TIMEOUT)|NVME_PATH|DS_ACCELERATOR'
passed+='|CUDA_VISIBLE_DEVICES|TOKENIZERS_PARALLELISM|HF_(HOME|HUB_OFFLINE|DATASETS_CACHE|MODULES_CACHE)|(NCCL|GLOO|UCX|FI|TORCH)_[A-Z0-9_]+'
END_SECONDS="${END_SECONDS:-60}"
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"

if [[ ! -r $HOSTFILE ]]; then
    echo "launch.sh: HOSTFILE=$HOSTFILE: no such file, or not readable" >&2
    exit 2
fi
mapfile -t hosts < <(sed 's/#.*//; s/^[[:space:]]*//; s/[[:space:]]*$//; /^$/d' "$HOSTFILE")
for host in "${hosts[@]}"; do
    if [[ ! $host =~ ^[A-Za-z0-9][A-Za-z0-9_.@-]*$ ]]; then
        echo "launch.sh: HOSTFILE=$HOSTFILE: '$host': give a name for ssh a line, and the processes of all machines as NUM_PROCESSES" >&2
        exit 2
    fi
done
if ((${#hosts[@]} < 2)) || [[ -n $(printf '%s\n' "${hosts[@]}" | sort | uniq -d) ]]; then
    echo "launch.sh: HOSTFILE=$HOSTFILE: needs two lines at least, each another machine" >&2
    exit 2
fi
variables=("NUM_MACHINES=${#hosts[@]}" "MAIN_PROCESS_IP=${MAIN_PROCESS_IP:-${hosts[0]#*@}}")
while read -r name; do
    [[ ! $name =~ ^($passed)$ ]] || variables+=("$name=${!name}")
done < <(compgen -e)

# What a machine's bash reads: the launch, and after it the names of signals. Their end is the end of this script, or of the connection.
# In a process group of its own (set -m) a launch hears SIGINT, and its checks end with it.
orders() {
    printf '{ cd %q && export MACHINE_RANK=%q' "$ROOT" "$1"
    printf ' %q' "${variables[@]}"
    printf ' || exit 2; unset HOSTFILE; set -m; exec 3<&0 </dev/null; bash scripts/launch.sh'
    printf ' %q' "${@:2}"
    # shellcheck disable=SC2016  # the other machine's variables
    printf '%s\n' ' 3<&- & launch=$!
        { while read -r name; do kill "-$name" -- "-$launch"; done; kill -TERM -- "-$launch"; } <&3 2>/dev/null & listener=$!
        status=0; while kill -0 "$launch" 2>/dev/null; do wait "$launch" && status=0 || status=$?; done
        kill "$listener" 2>/dev/null; exit "$status"; }'
}

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
left=() pipes=()
for rank in "${!hosts[@]}"; do
    mkfifo "$folder/$rank"
    # A session of its own keeps a terminal's Ctrl-C from ssh.
    { setsid "${ssh[@]}" "${hosts[rank]}" bash -s <"$folder/$rank" 2>&1 | sed -u "s/^/$rank: /"; } &
    left[rank]=$!
done
for rank in "${!hosts[@]}"; do # once all are started, or they would hold each other's pipes open
    exec {pipe}<>"$folder/$rank"
    pipes+=("$pipe")
    orders "$rank" "$@" >&"$pipe"
done
tell() {
    local pipe
    for pipe in "${pipes[@]}"; do
        echo "$1" >&"$pipe"
    done
}
trap 'tell INT' INT
trap 'tell TERM' TERM
trap 'tell USR1' USR1

status=0
while ((${#left[@]} > 0)); do
    for rank in "${!left[@]}"; do
        kill -0 "${left[rank]}" 2>/dev/null && continue
        wait "${left[rank]}" && code=0 || code=$?
        unset "left[$rank]"
        if ((code != 0 && status == 0)); then
            status=$code until=$((SECONDS + END_SECONDS))
            ((${#left[@]} == 0)) ||
                echo "launch.sh: machine $rank (${hosts[rank]}) has ended with exit code $code; the others get $END_SECONDS s" >&2
        fi
    done
    if ((status != 0 && SECONDS > until)); then # twice: a second one ends a launch at once
        until=$((SECONDS + 2))
        tell INT
    fi
    sleep 0.3 || true
done
exit "$status"
