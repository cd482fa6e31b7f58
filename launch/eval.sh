#!/usr/bin/env bash
#SBATCH --job-name=npr-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# Evaluation on held-out problems.
#   sbatch launch/eval.sh configs/eval.toml
#   NPROC=2 launch/eval.sh configs/eval.toml   (without Slurm)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -x $here/local.sh ]] || here=$SLURM_SUBMIT_DIR/launch # Slurm runs a copy of this file in its spool folder
exec "$here/local.sh" eval "$@"
