#!/bin/bash
# MI-TUNE on one node with eight GPUs, from the project's folder on a file system that all nodes see:
#
#     sbatch examples/slurm.sh                    # or PROFILE=paper sbatch examples/slurm.sh
#
# Interrupted or out of time: submit it again; it goes on from the last finished shard or checkpoint.
# Compute nodes rarely reach the network, so that before it: make env, make weights MODEL=sd21-base (its judges' weights too), make data-t2i-compbench.
#SBATCH --job-name=mitune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --output=mitune-%j.log
set -euo pipefail
export HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"

make repro PROFILE="${PROFILE:-gpu-day}" PROCESSES="${SLURM_GPUS_ON_NODE:-8}"

# Several nodes (--nodes=2, and no `make repro`): one stage at a time, of which `dvc repro --dry --force --single-item pool@color` tells the command, started on
# every node by accelerate; `dvc commit --force pool@color` then tells DVC that it is done.
#
#     head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
#     srun bash -c "accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $((8 * SLURM_NNODES)) --machine_rank \$SLURM_NODEID \
#         --main_process_ip $head --main_process_port 29500 -m mitune.runner notebooks/stages/pool.ipynb \
#         --to results/sd21-base/notebooks/pool-color.ipynb --params model models.sd21-base benchmark benchmarks.t2i-compbench device dtype seed pool --set category=color"
