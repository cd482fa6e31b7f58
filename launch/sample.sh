#!/usr/bin/env bash
#SBATCH --job-name=npr-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# Rejection sampling with stage 1's model: right and valid responses become stage 2's data. TERM keeps what it has.
#   sbatch launch/sample.sh configs/sample.toml
#   NPROC=2 launch/sample.sh configs/sample.toml   (without Slurm)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -x $here/local.sh ]] || here=$SLURM_SUBMIT_DIR/launch # Slurm runs a copy of this file in its spool folder
exec "$here/local.sh" sample "$@"
