#!/bin/bash
# PCL v2 on several nodes under Slurm:
#
#     sbatch --nodes=2 --gpus-per-node=8 examples/slurm.sh /data/imagenet/train /shared/runs/v2
#
# The second folder, the run's, must be on a file system that all nodes share. Before the time limit the run saves, and
# the job queues up again and goes on; so it does after a node has failed. `scancel --signal=TERM JOBID` saves and ends it.
#
#SBATCH --job-name=pcl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -euo pipefail
data=${1:?the folder of the images} output=${2:?the folder of the run}
shift 2
# Where sbatch was called; on V100s .venv-v100.
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"

# Since 22.05 srun does not take over the cores of a task.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
meeting=${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))

# The step is signalled, not srun, which would kill it. torchrun passes the signal on and leaves its processes half a
# minute to save.
requeue=
trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1

# One torchrun per node; they meet on the first. If one fails all end, so that none waits for it.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$meeting" --rdzv-id="$SLURM_JOB_ID" \
    -m pcl_fast.train pcl_v2 --data "$data" --output "$output" "$@" &
status=0
wait $! || status=$?
if [ -n "$requeue" ]; then
    # A trap interrupts the first wait; this one is for srun.
    wait || true
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
