#!/usr/bin/env bash
#SBATCH --job-name=npr-stage1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# Format RL (DAPO). TERM, five minutes before the time limit, leaves a checkpoint; started again, it continues.
#   sbatch launch/stage1.sh configs/stage1.toml
#   NPROC=2 launch/stage1.sh configs/stage1.toml   (without Slurm)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -x $here/local.sh ]] || here=$SLURM_SUBMIT_DIR/launch # Slurm runs a copy of this file in its spool folder
exec "$here/local.sh" stage1 "$@"
