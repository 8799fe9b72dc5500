#!/usr/bin/env bash
# One run as a SLURM job, from the root of the repository, with the environment activated:
#
#     sbatch scripts/slurm.sh loss=triplet miner=semihard
#     sbatch --partition=gpu --gpus-per-node=2 --ntasks-per-node=2 scripts/slurm.sh trainer=ddp
#
# What sbatch is told on the command line goes before these lines. A task for each device: the run takes both numbers from here.
#SBATCH --job-name=siamese
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
# Two minutes before the time is over the run saves, queues itself again under the same number, and goes on in its directory.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.out

srun python train.py resume=auto trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES" "$@"
