#!/usr/bin/env bash
# Everything that needs a GPU, in one command, for the record: what is installed, the tests on CUDA, the demo in bf16, the loss benchmark.
#
#   bash launch/gpu_checks.sh            writes docs/gpu.md with commit, versions and hardware
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh
source .venv/bin/activate
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu_checks: error: torch sees no GPU here" >&2; exit 1; }

report=docs/gpu.md
{
    echo "# On a GPU: what \`bash launch/gpu_checks.sh\` saw"
    echo
    echo "Commit $(git rev-parse --short HEAD), $(date -u +%Y-%m-%d)."
    echo '```'
    nvidia-smi -L
    python -m megatron_gkd.doctor
    echo '```'
    echo "## Tests"
    echo '```'
} >"$report"
python -m pytest -q tests/test_gpu.py tests/test_loss.py tests/test_loss_kernels.py | tee -a "$report"
{
    echo '```'
    echo "## The demo in bf16 on one GPU"
    echo '```'
} >>"$report"
DEMO=output/demo_gpu NPROC=1 DEVICE=cuda DTYPE=bfloat16 bash launch/demo.sh | tee -a "$report"
echo '```' >>"$report"
python -m benchmarks.loss --device cuda
echo "written: $report, docs/benchmarks/loss.md"
