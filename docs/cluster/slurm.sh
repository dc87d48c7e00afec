#!/usr/bin/env bash
# Pretraining on several machines under Slurm: sbatch docs/cluster/slurm.sh [STAGE [--cell CELL]]
# Submit it in the clone, which all nodes must see under the same path (see docs/cluster.md).
#SBATCH --job-name=trunkline
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

stage=(pretrain)
[ $# -gt 0 ] && stage=("$@")
processes=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck source=/dev/null
[ -f .venv/bin/activate ] && . .venv/bin/activate

# one agent per node; what is in single quotes is filled in there
export first port processes
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --wait=120 bash -c '
    export TRUNKLINE_TORCHRUN="--nnodes $SLURM_NNODES --node-rank $SLURM_NODEID \
        --nproc-per-node $processes --master-addr $first --master-port $port"
    exec python -m flows.launch "$@"' agent "${stage[@]}"
code=$?

# srun gives the largest code of all nodes, so that 75 may hide another node's mistake: not for ever
case $code in
    0) dvc commit --force "${stage[0]}${stage[2]:+@${stage[2]}}" ;; # the pipeline will find this stage done
    75 | 137 | 143)
        [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && echo "interrupted; queued again" && scontrol requeue "$SLURM_JOB_ID"
        ;;
esac
exit $code
