#!/usr/bin/env bash
# Everything that needs a GPU, in one command and with a record: versions, the tests on CUDA, the demo in bf16, the loss
# benchmark, ragged rows, rollouts.
#
#   bash launch/gpu_checks.sh     writes docs/gpu.md with commit, versions and hardware, and the pages of docs/benchmarks/
#   EXTRAS=test,gpu bash launch/gpu_checks.sh     the same with Transformer Engine
#
# A failure is recorded and the remaining checks still run; the exit status is 1 if anything failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh
source .venv/bin/activate
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu_checks: error: torch sees no GPU here" >&2; exit 1; }

report=docs/gpu.md
failed=()

step() {  # step TITLE COMMAND...: writes the command's output to the report under that title
    local title=$1 status=0
    shift
    printf '\n## %s\n\n```\n' "$title" >>"$report"
    "$@" 2>&1 | tee -a "$report" || status=$?
    printf '```\n' >>"$report"
    [ "$status" -eq 0 ] && return
    printf '\nFailed with status %s.\n' "$status" | tee -a "$report"
    failed+=("$title")
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed (it comes with the CUDA toolkit)"; return 1; }
    compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 python -m pytest -q tests/test_loss_kernels.py
}

printf '# On a GPU: what `bash launch/gpu_checks.sh` saw\n\nCommit %s, %s.\n' "$(git rev-parse --short HEAD)" "$(date -u +%Y-%m-%d)" >"$report"
step "Machine" nvidia-smi -L
step "Versions" python -m megatron_gkd.doctor
step "Liger-Kernel, for the comparison" python -m pip --disable-pip-version-check install -q -e ".[benchmarks]"
step "Tests" python -m pytest -q tests/test_gpu.py tests/test_loss.py tests/test_loss_linear.py tests/test_loss_kernels.py \
    tests/test_benchmarks_loss.py tests/test_gpu_rollout.py tests/test_rollout_kernels.py tests/test_gpu_attention.py
step "Memory accesses of the kernels (compute-sanitizer)" sanitize
step "The demo in bf16 on one GPU" env DEMO=output/demo_gpu NPROC=1 DEVICE=cuda DTYPE=bfloat16 bash demo/run.sh
step "The loss (docs/benchmarks/loss_gpu.md)" python -m benchmarks.loss --device cuda
step "Memory of a whole step (docs/benchmarks/step_memory_gpu.md)" python -m benchmarks.step_memory --device cuda
step "Ragged rows at the 30B's sizes, 8 layers (docs/benchmarks/ragged_gpu.md)" python -m benchmarks.ragged --device cuda \
    --dtype bfloat16 --layers 8 --experts 128 --experts_per_token 8 --hidden 2048 --inter 768 --heads 32 --key_value_heads 4 \
    --head_dim 128 --vocab 152064 --rows 64 --budget 8192 --output docs/benchmarks/ragged_gpu.md
step "Rollouts at the 30B's sizes" python -m benchmarks.rollout_real --rows 32,8,16,64,4,128 --eager 32 --equal 8 --whole 32
step "Rollouts of a small model against transformers" python -m benchmarks.rollout --device cuda --dtype bfloat16

echo "written: $report, docs/benchmarks/loss_gpu.md, docs/benchmarks/step_memory_gpu.md"
[ ${#failed[@]} -eq 0 ] || { printf 'gpu_checks: failed: %s\n' "${failed[@]}" >&2; exit 1; }
