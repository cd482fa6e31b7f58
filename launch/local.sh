#!/usr/bin/env bash
# Starts a stage wherever this is: NPROC processes on this machine, or one process a GPU of a Slurm job.
#
#   launch/local.sh stage3 configs/demo/stage3.toml --train.steps 4          one process
#   NPROC=2 launch/local.sh stage3 configs/demo/stage3.toml --parallel.tp 2  two, through torchrun
#   sbatch launch/stage3.sh configs/stage3.toml                              a job, through srun (stage3.sh ends here)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${NPR_PYTHON:-$root/.venv/bin/python}
read -ra wrap <<<"${NPR_WRAP:-}" # a profiler in front of every process, see profile.sh
[[ -x $python ]] || { echo "no $python: run 'make setup' in $root, or set NPR_PYTHON" >&2; exit 2; }

# A stage started again continues: `scontrol requeue`, or a node's failure, runs the same command once more. Under a profiler,
# and where the command line says what becomes of a run that is there, it is as it says.
if [[ ${1:-} =~ ^(stage[123]|sample|eval)$ && -z ${NPR_WRAP:-} && " $*" != *" --run.resume"* && " $*" != *" --run.overwrite"* ]]; then
    set -- "$@" --run.resume auto
fi

if [[ -n ${NPR_SLURM_TASK:-} ]]; then # one of the processes that srun started below
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec "${wrap[@]}" "$python" -m megatron_npr "$@"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then # the batch script: the first node is where all processes meet
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # no pipe into head: it would break scontrol's, and end the job
    export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) NPR_SLURM_TASK=1
    exec srun --kill-on-bad-exit=1 "$root/launch/local.sh" "$@"
elif [[ ${NPROC:-1} -gt 1 ]]; then
    # torchrun's --standalone by number: a machine may not know its own name, nor "localhost".
    exec "$python" -m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
        --nproc-per-node "$NPROC" --no-python "${wrap[@]}" "$python" -m megatron_npr "$@"
else
    exec "${wrap[@]}" "$python" -m megatron_npr "$@"
fi
