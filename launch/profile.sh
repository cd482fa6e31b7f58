#!/usr/bin/env bash
#SBATCH --job-name=npr-profile
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%x-%j.log
# A stage under Nsight Systems: kernels, NCCL and the spans of each step (NVTX), one report a process.
#   sbatch launch/profile.sh stage3 configs/stage3.toml --train.steps 6 --run.dir runs/profiled
#   NPROC=2 launch/profile.sh stage3 configs/stage3.toml --train.steps 6 --run.dir runs/profiled   (without Slurm)
# The first NPR_PROFILE_DELAY seconds (default 120: compiling, first steps) are left out, NPR_PROFILE_SECONDS are kept
# (default 60). Look at it with: nsys stats runs/profile/*.nsys-rep, or nsys-ui.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -x $here/local.sh ]] || here=$SLURM_SUBMIT_DIR/launch # Slurm runs a copy of this file in its spool folder
nsys=${NPR_NSYS:-nsys}
command -v "$nsys" >/dev/null || { echo "no $nsys: install Nsight Systems, or set NPR_NSYS" >&2; exit 2; }
out=${NPR_PROFILE_DIR:-runs/profile}
mkdir -p "$out"
export NPR_WRAP="$nsys profile --trace=cuda,nvtx,cublas,cudnn,nccl --sample=none --cuda-graph-trace=node \
--delay=${NPR_PROFILE_DELAY:-120} --duration=${NPR_PROFILE_SECONDS:-60} --kill=none --force-overwrite=true \
--output=$out/%h-%p"
exec "$here/local.sh" "$@"
