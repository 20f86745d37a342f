#!/usr/bin/env bash
# Several machines by SLURM, one task a GPU:
#
#     sbatch --nodes=2 configs/slurm.sh train_sft.py --config configs/3b_sft.py --output_dir output/video_lora
#
# Code, data and output_dir lie on a file system that all nodes see. It always resumes: after a lost node, or the end of
# its time, the same command continues the run, with fewer or more nodes too.
#SBATCH --job-name=qwen25vl-r1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Each task sees all GPUs of its node and takes the one of its number. SIGTERM comes 300 seconds before the end of the
# time: the step ends, a checkpoint is written, exit code 143. After a lost node SLURM queues the job again by itself.
set -euo pipefail
: "${1:?usage: sbatch configs/slurm.sh train_sft.py or train_grpo.py, and its flags}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((29500 + SLURM_JOB_ID % 1000)) # jobs that share a node have their own
export WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=${SLURM_NTASKS_PER_NODE:-1}
# shellcheck disable=SC2016 (each task's own variables)
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "${PYTHON:-python}" -u "$@"'
exec srun --kill-on-bad-exit=1 bash -c "$task" task "$1" --resume "${@:2}"
