#!/usr/bin/env bash
# Train under Slurm, one launcher a node. Copy this file, edit the lines marked EDIT, and from the repository's folder
#   STRATEGY=zero2 sbatch my_slurm.sh --task causal ... --output_dir runs/first        (sbatch's own options come before my_slurm.sh)
# Before the time limit and when it is preempted the ranks save, and the job requeues itself; so it does when a node or a rank dies. It
# goes on from the newest checkpoint. It is not requeued when it is done (exit code 0), after a mistake (2), when it is cancelled, and
# after MAX_TRIES=3 starts in a row that left no new checkpoint; the code that Slurm shows is then the run's. docs/clusters.md
#SBATCH --job-name=zerotune
#SBATCH --nodes=2                    # EDIT
#SBATCH --gpus-per-node=8            # EDIT: ranks of a node; some clusters want --gres=gpu:8
#SBATCH --cpus-per-task=64           # EDIT: cores of a node, shared by its ranks
#SBATCH --mem=0                      # EDIT: 0 is all that a node has
#SBATCH --time=24:00:00              # EDIT
#SBATCH --output=slurm-%j.out        # EDIT
##SBATCH --partition=X --account=Y   # EDIT, and one # less
#SBATCH --signal=USR1@120            # EDIT: seconds that a step and a save take at most. No "B:": the ranks are to get it
#SBATCH --ntasks-per-node=1
#SBATCH --requeue --open-mode=append
set -uo pipefail
if [[ -z ${SLURM_SUBMIT_DIR:-} ]]; then
    echo "slurm.sh: is for Slurm: sbatch $0 ...; without it, bash scripts/launch.sh ..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit 2 # Slurm runs a copy of this file, in a folder of its own

# EDIT: what Python needs on the nodes. .venv of the repository is found by itself; for another one: export PYTHON=/path/bin/python
# module load ...
# EDIT, a matrix as a job array: `sbatch --array=0-2 my_slurm.sh ...` and
# strategies=(ddp zero2 zero3); export STRATEGY="${strategies[SLURM_ARRAY_TASK_ID]}"; set -- "$@" --output_dir "runs/$STRATEGY"

out="" previous=""
for word in "$@"; do
    [[ $previous == __output_dir ]] && out="$word"
    previous="${word//-/_}" # train.py takes a flag's name with either
    [[ $previous == __output_dir=* ]] && out="${word#*=}"
    if [[ $previous == __overwrite_output_dir* ]]; then
        echo "slurm.sh: $word would start over at each requeue; remove the folder by hand instead" >&2
        exit 2
    fi
done
if [[ -z $out ]]; then
    echo "slurm.sh: no --output_dir on the command line; give it there, not in --config" >&2
    exit 2
fi
MAX_TRIES="${MAX_TRIES:-3}"
mkdir -p "$out" || exit 2

# The step of the newest checkpoint, 0 if there is none.
newest() {
    local path step=0
    for path in "$out"/checkpoint-*; do
        [[ $path =~ /checkpoint-([0-9]+)$ ]] && ((10#${BASH_REMATCH[1]} > step)) && step=$((10#${BASH_REMATCH[1]}))
    done
    echo "$step"
}

# Of this job's starts, also those after requeues of Slurm's own, how many in a row found no checkpoint newer than the start before.
counter="$out/slurm-tries" step="$(newest)" tries=1
if [[ -f $counter ]]; then
    read -r job last count <"$counter"
    [[ $job == "$SLURM_JOB_ID" && $last == "$step" ]] && tries=$((count + 1))
fi
if ((tries > MAX_TRIES)); then
    echo "slurm.sh: Slurm has requeued this job, but MAX_TRIES=$MAX_TRIES starts left no checkpoint after step $step; it ends" >&2
    exit 1
fi
echo "$SLURM_JOB_ID $step $tries" >"$counter"
echo "slurm.sh: start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, from step $step"

# srun does not take this from sbatch (22.05 and later), and all ranks of a node would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
ended=0
trap 'ended=1' TERM
trap : USR1
status=0
# When a node's launcher has ended, or the node has died, the others get END_SECONDS to end as well.
srun --label --kill-on-bad-exit=0 --wait="${END_SECONDS:-60}" bash scripts/launch.sh "$@" || status=$?

case $status in
    0 | 2 | 130) exit "$status" ;;
esac
# This script itself gets SIGTERM at the end of everything: cancelled, or preempted, after which Slurm requeues it; or the time was up
# before the ranks had saved, after which Slurm does not.
if ((ended)) && [[ $(scontrol show job "$SLURM_JOB_ID") != *Reason=TimeLimit* ]]; then
    exit "$status"
fi
now="$(newest)"
if ((now <= step && tries >= MAX_TRIES)); then
    echo "slurm.sh: exit code $status, and MAX_TRIES=$MAX_TRIES starts left no checkpoint after step $step; not requeued" >&2
    exit "$status"
fi
echo "slurm.sh: exit code $status, newest checkpoint of step $now; requeueing"
scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: Slurm does not requeue this job; submit the same command again" >&2
exit "$status"
