#!/usr/bin/env bash
# Launch train.py under a strategy:
#   STRATEGY=zero3_offload NUM_PROCESSES=4 bash scripts/launch.sh --model_name_or_path ... --train_file ... --output_dir ...
# The flags, files and the DeepSpeed JSON are checked first: a mistake costs a second and a line, and exit code 2.
# DRY_RUN=1 prints the command instead of running it. Environment, with defaults:
#   STRATEGY=zero2         a file of accelerate_configs/ without .yaml
#   NUM_PROCESSES          GPUs here, or 2 processes on the CPU; with several machines: over all of them
#   NUM_MACHINES=1         with MACHINE_RANK, MAIN_PROCESS_IP and MAIN_PROCESS_PORT=29500 for more, the same line on each; machine
#                          0 waits MACHINES_TIMEOUT=300 seconds for the others (docs/clusters.md). Under srun, mpirun or a PyTorchJob
#                          these are taken from its variables
#   HOSTFILE               a file of host names: starts itself on each over ssh (scripts/hosts.sh)
#   OMP_NUM_THREADS        cores divided by the processes of this machine
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

PYTHON="${PYTHON:-python3}"
[[ -x $ROOT/.venv/bin/python && $PYTHON == python3 ]] && PYTHON="$ROOT/.venv/bin/python"
STRATEGY="${STRATEGY:-zero2}"
if [[ -n ${HOSTFILE:-} ]]; then
    exec bash "$ROOT/scripts/hosts.sh" "$@"
fi

# Started by another launcher: one of this a machine, of which the machines' numbers are taken. An interactive shell of Slurm's (--pty)
# is a machine of its own.
if [[ -z ${NUM_MACHINES:-} ]]; then
    starter="" here=1
    if [[ -n ${LOCAL_RANK:-} ]]; then
        starter=torchrun here="${LOCAL_WORLD_SIZE:-$WORLD_SIZE}"
        echo "launch.sh: $starter has started $here of it here, but it starts the ranks itself; start it alone, or train.py by $starter" >&2
        exit 2
    elif [[ -n ${SLURM_STEP_NUM_NODES:-} && -z ${SLURM_PTY_PORT:-} ]]; then
        starter=srun here="$(((SLURM_STEP_NUM_TASKS + SLURM_STEP_NUM_NODES - 1) / SLURM_STEP_NUM_NODES))"
        NUM_MACHINES="$SLURM_STEP_NUM_NODES" MACHINE_RANK="$SLURM_NODEID"
        MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-${SLURM_LAUNCH_NODE_IPADDR:-}}"               # where srun runs: in a batch job on node 0
        MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}" # jobs on one node want different ones
    elif [[ -n ${OMPI_COMM_WORLD_SIZE:-} ]]; then # Open MPI; nothing tells the address
        starter=mpirun here="${OMPI_COMM_WORLD_LOCAL_SIZE:-1}" NUM_MACHINES="$OMPI_COMM_WORLD_SIZE" MACHINE_RANK="$OMPI_COMM_WORLD_RANK"
    elif [[ -n ${PMI_SIZE:-} ]]; then # MPICH, Intel MPI
        starter=mpirun here="${MPI_LOCALNRANKS:-1}" NUM_MACHINES="$PMI_SIZE" MACHINE_RANK="$PMI_RANK"
    elif [[ -n ${WORLD_SIZE:-} && -n ${RANK:-} && -n ${MASTER_ADDR:-} ]]; then # a pod of a PyTorchJob
        NUM_MACHINES="$WORLD_SIZE" MACHINE_RANK="$RANK" MAIN_PROCESS_IP="$MASTER_ADDR"
        MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-${MASTER_PORT:-29500}}"
    fi
    if ((here > 1)); then
        echo "launch.sh: $starter has started $here of it a machine, but one starts all ranks of a machine; tell $starter to start one" >&2
        exit 2
    fi
    unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK PMI_SIZE PMI_RANK # the ranks' are others
fi
NUM_MACHINES="${NUM_MACHINES:-1}"
config="$ROOT/accelerate_configs/$STRATEGY.yaml"
if [[ ! -f $config ]]; then
    allowed="$(basename -s .yaml "$ROOT"/accelerate_configs/*.yaml | tr '\n' ' ')"
    echo "launch.sh: STRATEGY=$STRATEGY is not known; allowed: $allowed" >&2
    exit 2
fi

for name in NUM_MACHINES NUM_PROCESSES; do
    if [[ -n ${!name:-} && ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "launch.sh: $name=${!name} is not a whole number; give one" >&2
        exit 2
    fi
done

if [[ $STRATEGY == cpu ]]; then
    gpus=0
elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # empty: none
    gpus="$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")"
else
    gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
fi
if [[ $STRATEGY == single ]]; then
    NUM_PROCESSES="${NUM_PROCESSES:-1}"
else
    NUM_PROCESSES="${NUM_PROCESSES:-$((gpus > 0 ? gpus * NUM_MACHINES : 2))}"
fi
if ((gpus == 0)); then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # DeepSpeed would warn that it finds no GPU
fi
here=$((NUM_PROCESSES / NUM_MACHINES))
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > here ? cores / here : 1))}"

# accelerate-launch is `accelerate launch` without the import of accelerate's other commands, which takes a second.
accelerate="$(dirname "$(command -v "$PYTHON")")/accelerate-launch"
launch=("$accelerate")
[[ -x $accelerate ]] || launch=("$PYTHON" -m accelerate.commands.launch)
launch+=(--config_file "$config" --num_processes "$NUM_PROCESSES")
if ((NUM_MACHINES > 1)); then
    launch+=(--num_machines "$NUM_MACHINES" --machine_rank "${MACHINE_RANK:=}")
    launch+=(--main_process_ip "${MAIN_PROCESS_IP:=}" --main_process_port "${MAIN_PROCESS_PORT:=29500}")
    launch+=(--rdzv_conf "timeout=${MACHINES_TIMEOUT:-300}") # else the launchers wait 900 seconds for each other
    [[ $STRATEGY == zero* ]] && launch+=(--deepspeed_multinode_launcher standard)
elif [[ -n ${MAIN_PROCESS_PORT:-} ]]; then
    launch+=(--main_process_port "$MAIN_PROCESS_PORT")
fi
if [[ $STRATEGY == single ]]; then
    launch=("$PYTHON") # one process needs no launcher, which would not pass signals on
fi
launch+=("$ROOT/train.py" "$@")

out="" previous=""
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then
        exec "$PYTHON" "$ROOT/train.py" --help
    fi
    [[ $previous == __output_dir ]] && out="$word"
    previous="${word//-/_}" # train.py takes a flag's name with either
    [[ $previous == __output_dir=* ]] && out="${word#*=}"
done
export NUM_MACHINES # hpZ is for several
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m zerotune check "$config" "$NUM_PROCESSES" "$@"
if ((NUM_MACHINES > 1)) && [[ $STRATEGY != single ]]; then
    # The other machines have to answer, and to be alike; gloo and NCCL get the interface that leads to machine 0.
    export STRATEGY NUM_MACHINES MACHINE_RANK MAIN_PROCESS_IP MAIN_PROCESS_PORT
    network="$(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m zerotune machines "$config" "$NUM_PROCESSES" "$@")"
    while IFS='=' read -r name value; do
        [[ -z $name ]] || export "$name=$value"
    done <<<"$network"
fi
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf 'OMP_NUM_THREADS=%s %s' "$OMP_NUM_THREADS" "${DS_ACCELERATOR:+DS_ACCELERATOR=$DS_ACCELERATOR }"
    for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
        [[ -z ${!name:-} ]] || printf '%s=%s ' "$name" "${!name}"
    done
    printf '%q ' "${launch[@]}"
    echo
    exit 0
fi

# How many processes the kernel has killed on this machine for want of memory.
oom_kills() {
    awk '$1 == "oom_kill" { print $2 }' /proc/vmstat 2>/dev/null || true
}

# A signal (a scheduler's SIGTERM or SIGUSR1, Ctrl-C) is passed on to the ranks; they save and leave their exit code, 128 + signal, in a
# file, because the launcher itself ends with 1 whatever they say. The launcher ignores the signals: Slurm sends them to every process of
# a job, again from here, and torchrun's own handler gives the ranks up at the second one. A session of their own keeps a terminal's
# Ctrl-C from reaching the ranks twice; a second one ends everything at once.
ZEROTUNE_EXIT_CODE_FILE="$(mktemp)"
export ZEROTUNE_EXIT_CODE_FILE
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
export PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT # torchrun's --signals-to-handle
oom_kills_before="$(oom_kills)"
begin="$(date -u +%FT%T)"
(
    trap '' TERM INT USR1
    exec setsid "${launch[@]}"
) &
child=$!
# Send the ranks a signal: the launcher's children, or the process itself. One that is just starting may not hear it.
# shellcheck disable=SC2329  # called by the traps, as the next two
signal_ranks() {
    if [[ $STRATEGY == single ]]; then
        kill "-$1" "$child" || true
    else
        pkill "-$1" -P "$child" || true
    fi
}
# Until they have ended; a rank takes note of the first one.
# shellcheck disable=SC2329
keep_signalling() {
    while kill -0 "$child"; do
        signal_ranks "$1"
        sleep 1 || true
    done >/dev/null 2>&1
}
interrupts=0
# shellcheck disable=SC2329
interrupt() {
    interrupts=$((interrupts + 1))
    if ((interrupts > 1)); then
        echo 130 >"$ZEROTUNE_EXIT_CODE_FILE"
        pkill -KILL -P "$child" || true
        kill -KILL "$child" || true
    else
        signal_ranks INT
    fi
}
trap interrupt INT
trap 'keep_signalling TERM &' TERM
trap 'keep_signalling USR1 &' USR1
status=0
while kill -0 "$child" 2>/dev/null; do
    wait "$child" && status=0 || status=$?
done
if [[ -s $ZEROTUNE_EXIT_CODE_FILE ]]; then
    status="$(cat "$ZEROTUNE_EXIT_CODE_FILE")"
fi
rm -f "$ZEROTUNE_EXIT_CODE_FILE"
if ((status != 0)) && [[ $(oom_kills) != "$oom_kills_before" ]]; then
    echo "launch.sh: the kernel's OOM killer ended a process while this run went on: the memory of the host ran out" >&2
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m zerotune plan --num_gpus "$NUM_PROCESSES" --strategy "$STRATEGY" "$@" >&2 ||
        true
    status=2
fi
# Each machine's log knows its own ranks alone; the notes that failing ranks leave are named by the time. Their first line says which
# rank, their second why.
if ((status != 0 && NUM_MACHINES > 1)) && [[ ${MACHINE_RANK:-} == 0 && -n $out ]]; then
    for note in "$out"/failures/*.txt; do
        if [[ -r $note && ! ${note##*/} < $begin ]]; then
            { read -r who && read -r why; } <"$note" || true
            echo "launch.sh: the first to fail: ${who:-}: ${why:-}" >&2
            break
        fi
    done
fi
exit "$status"
