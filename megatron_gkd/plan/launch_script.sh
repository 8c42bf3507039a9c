#!/usr/bin/env bash
# @TITLE@
# @MODELLED@
#
#   @VARIABLES@bash @NAME@ [flags, which override those below]
#   bash @NAME@ --check [flags]    # layout and memory alone, without a data set or another node
set -euo pipefail

check=
if [ "${1-}" = --check ]; then
    check=1 && shift
fi
repository=@REPOSITORY@
model=@MODEL@
output=@OUTPUT@
python=${PYTHON:-$repository/.venv/bin/python}
[ -x "$repository/.venv/bin/python" ] || python=${PYTHON:-python3} # an active environment, a container
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # ragged batches fragment less
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@THREADS@}
# On SIGTERM a run finishes its step and saves; by default torchrun kills it after 30 s (settable with torch 2.12 or newer).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

flags=(
    --model "${MODEL:-$model}"
    --output_dir "${OUTPUT:-$output}"
@FLAGS@
)
@DATA@
[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus @OF_PLAN@ "${flags[@]}" "$@"
@START@ \
    -m megatron_gkd.train "${flags[@]}" "$@"
