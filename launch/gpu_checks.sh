#!/usr/bin/env bash
# Everything that needs a GPU, in stages, the most valuable first, in at most seven minutes; --from goes on with what is left.
#
#   bash launch/gpu_checks.sh                     all stages
#   bash launch/gpu_checks.sh --list              their names, time limits and titles
#   bash launch/gpu_checks.sh --from STAGE        from this one on
#   bash launch/gpu_checks.sh --only STAGE,STAGE  these
#   WHEELS=DIR bash launch/gpu_checks.sh          on a machine without a network (launch/fetch_wheels.sh fills DIR)
#
# docs/gpu.md is rewritten after every stage, with commit, versions and hardware: a run that is cut short leaves what was
# done, and a stage that is run again replaces its section. Logs, profiles and records (jsonl) go to $OUT
# (output/gpu_checks), the pages of the benchmarks to docs/benchmarks/. A stage that fails or runs into its limit does not stop
# the others; the exit status is 1 if one did.
#
# PAGE         the page, docs/gpu.md by default; PAGES: the folder of the benchmarks' pages
# SECONDS_LEFT stages begin only within so many seconds (420); the last gets what is left. SLOWER multiplies the limits
# COMMIT       names the commit where there is no .git
# EXTRAS       test,gpu installs Transformer Engine, too
# DEVICE=cpu   with small sizes (SIZE=small) runs every stage where there is no GPU, to try this script; tests of CUDA are
#              skipped there
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-output/gpu_checks}
PAGE=${PAGE:-docs/gpu.md}
PAGES=${PAGES:-docs/benchmarks}
DEVICE=${DEVICE:-cuda}
SIZE=${SIZE:-$([ "$DEVICE" = cuda ] && echo real || echo small)}
SECONDS_LEFT=${SECONDS_LEFT:-420}
NOT_RUN=75 # the status of a stage whose tool is not there

# --- the stages: name, limit in seconds, title; a function of that name is the command ---
STAGES="
doctor      30 what is installed, and what will be used
kernels    120 the kernels of the loss, LoRA, experts, attention and rollouts against torch
parity     150 steps, logits, towers and resume against the CPU
attention   90 attention of packed rows, and how fast each way to it is; rollouts against transformers
step        90 a training step at the 30B's sizes, and a rollout of 32 rows
peers       75 the same against transformers + peft + TRL, 8 layers
loss        60 the loss against TRL and the bare GEMMs
ragged      45 rows of ragged lengths
demo       120 the demo in bf16
determinism 45 two equal backward passes with --deterministic true
sanitizer   90 memory accesses of the kernels of the loss and of an expert layer (compute-sanitizer)
decode     100 tokens of a rollout by batch size, graph against eager
rollout     75 rollouts of a small model against transformers
rates       75 what the GPU does in a second, and what the planner makes of it
"
names() { awk 'NF { print $1 }' <<<"$STAGES"; }
field() { awk -v name="$1" -v from="$2" '$1 == name { if (from == 2) print $2; else { $1 = $2 = ""; sub(/^ +/, ""); print } }' <<<"$STAGES"; }

if [ "$SIZE" = small ]; then
    shape="--experts 8 --hidden 64 --inter 32 --heads 4 --head_dim 16 --vocab 1000"
    step="--layers 2 $shape --batch 2 --length 32 --response 8 --rollout 2 --keys 32 --tokens 8"
    peers="--layers 1 $shape --batch 2 --length 32 --response 8 --rows 2 --prompt 8 --tokens 4 --dtype float32"
    decode="--layers 2 $shape --rows 2 --keys 32 --tokens 8 --eager 2 --equal 2"
    ragged="--layers 1 $shape --experts_per_token 2 --rows 8 --budget 900 --rounds 1 --lengths alpaca"
    equal="--layers 2 $shape --batch 2 --length 32 --response 8 --steps 1"
    rollout="--batches 2 --tokens 4 --prompt 4 --experts 8 --experts_per_token 2 --rounds 1"
    demo="--max_steps 1"
    rates="--seconds 4"
    ways="--dtype float32 --heads 4 --groups 2 --head_dim 16 --rounds 1 --calls 2 --lengths 16x2 --lengths 7,20"
else
    step="--layers 48 --recompute --rollout 32"
    peers="--layers 8"
    decode="--rows 8,16,64,128 --equal 8"
    ragged="--dtype bfloat16 --layers 8 --experts 128 --experts_per_token 8 --hidden 2048 --inter 768 --heads 32"
    ragged="$ragged --key_value_heads 4 --head_dim 128 --vocab 152064 --rows 64 --budget 8192"
    equal="--layers 8 --recompute --batch 1 --steps 1"
    rollout="--dtype bfloat16"
    demo=""
    rates="--seconds 30"
    ways=""
fi
pytest() { "$python" -m pytest -q -p no:cacheprovider --tb=short "$@"; }

doctor() { "$python" -m megatron_gkd.doctor; }
kernels() {
    pytest -n 3 --dist loadfile tests/test_loss_kernels.py tests/test_lora_low_product.py tests/test_model_expert_kernels.py \
        tests/test_model_norm_rotary.py tests/test_rollout_kernels.py \
        tests/test_model_experts.py::test_dropout_is_that_of_its_masks
}
# With Transformer Engine's attention, too, where that is installed. -s: what the cases gave so far, if the time runs out.
parity() { pytest -s tests/test_gpu.py; }
attention() {
    local status=0
    pytest -n 2 --dist loadfile tests/test_gpu_attention.py tests/test_gpu_rollout.py || status=$?
    "$python" -m benchmarks.attention --device "$DEVICE" $ways --output "$PAGES/attention.md" && return "$status"
}
step() {
    "$python" -m benchmarks.real_shape --device "$DEVICE" $step --profile "$OUT/step_profile.txt" \
        --output "$PAGES/real_shape.md" --records "$OUT/real_shape.jsonl"
}
peers() { "$python" -m benchmarks.peers --device "$DEVICE" $peers --output "$PAGES/peers.md" --records "$OUT/peers.jsonl"; }
loss() { "$python" -m benchmarks.loss --device "$DEVICE" $([ "$SIZE" = small ] && echo --small --output "$PAGES/loss_small.md"); }
ragged() { "$python" -m benchmarks.ragged --device "$DEVICE" $ragged --output "$PAGES/ragged_gpu.md"; }
decode() { "$python" -m benchmarks.rollout_real --device "$DEVICE" $decode --profile "$OUT/token_profile.txt" --records "$OUT/rollout.jsonl"; }
rollout() {
    "$python" -m benchmarks.rollout --device "$DEVICE" $rollout
}
rates() {
    "$python" -m benchmarks.rates --device "$DEVICE" $rates --output "$OUT/rates.json" &&
        "$python" -m megatron_gkd.plan --model docs/qwen3_omni_30b --gpus 1 --gpu "$OUT/rates.json" --gpu_memory 79 \
            --recompute full --max_tokens_per_micro_batch 8192 --lmbda 0
}
demo() {
    # torchrun would wait longer for its ranks than a stopped stage waits for torchrun
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3
    # shellcheck disable=SC2086  # flags
    env DEMO="$OUT/demo" NPROC=1 DEVICE="$DEVICE" DTYPE=bfloat16 PYTHON="$python" \
        MIN_OBEYED="$([ "$SIZE" = small ] && echo 0 || echo 0.8)" bash demo/run.sh $demo
}
determinism() { "$python" -m benchmarks.real_shape --device "$DEVICE" $equal --equal --deterministic --records "$OUT/determinism.jsonl"; }
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here (it comes with the CUDA toolkit)"; return "$NOT_RUN"; }
    # its allocator's expandable segments would be reported as an invalid access
    env PYTORCH_ALLOC_CONF= PYTORCH_CUDA_ALLOC_CONF= compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
        "$python" -c "$sanitized"
}
sanitized='
import torch
from megatron_gkd.loss import linear_jsd, vocab_parallel_jsd
draw = lambda *size, dtype: torch.randn(*size, device="cuda", dtype=dtype).requires_grad_()
vocab_parallel_jsd(draw(37, 1003, dtype=torch.float32), draw(37, 1003, dtype=torch.float32)).sum().backward()
hidden = [draw(37, 64, dtype=torch.bfloat16) for _ in range(2)]
linear_jsd(*hidden, draw(1003, 64, dtype=torch.bfloat16).detach()).loss.sum().backward()
from tests.expert_layers import Case, run_cases
run_cases(0, 1, 1, 1, [Case(top_k=4, num_tokens=70, rank=8, shunned=(0, 5), dropout=0.1, dtype=torch.bfloat16)], "cuda")
torch.cuda.synchronize()
print("all cases ran")
'

# --- which of them ---
chosen=$(names)
while [ $# -gt 0 ]; do
    case $1 in
    --list) sed '/^$/d' <<<"$STAGES" && exit 0 ;;
    --from | --only)
        for name in $(tr , ' ' <<<"${2:-}"); do
            names | grep -qx "$name" || { echo "gpu_checks: error: no stage $name; --list has their names" >&2; exit 2; }
        done
        [ -n "${2:-}" ] || { echo "gpu_checks: error: $1 needs the name of a stage" >&2; exit 2; }
        if [ "$1" = --from ]; then chosen=$(names | sed -n "/^$2\$/,\$p"); else chosen=$(tr , '\n' <<<"$2"); fi
        shift
        ;;
    *) echo "gpu_checks: error: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done

if [ "$DEVICE" = cuda ] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu_checks: error: nvidia-smi sees no GPU here (DEVICE=cpu tries the script without one)" >&2
    exit 1
fi
extras=${EXTRAS-test}
export ANY_VERSION=${ANY_VERSION-yes} # a machine without a network has what it has; the page names the versions
source launch/environment.sh || exit 1
if [ "$DEVICE" = cuda ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_checks: error: torch of $python sees no GPU: another one with PYTHON=, or remove a .venv that was made without one" >&2
    exit 1
fi
SECONDS=0 # set-up has no part in the limit
mkdir -p "$OUT" "$PAGES"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

failed=()
not_run=()
run() { # run STAGE: its command under its limit, then its section
    local name=$1 limit left status=0 begin
    limit=$(($(field "$name" 2) * ${SLOWER:-1}))
    left=$((SECONDS_LEFT - SECONDS))
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$left" -lt 10 ]; then # an earlier section of it stays
        not_run+=("$name")
        return
    fi
    begin=$(date +%s.%N)
    # In a process group of its own, so that what a stage starts ends with it.
    export python OUT PAGES DEVICE SIZE NOT_RUN step peers decode ragged equal rollout demo ways sanitized
    export -f pytest "$name"
    timeout -k 5 "$limit" bash -c "$name" >"$OUT/$name.log" 2>&1 || status=$?
    local seconds
    seconds=$(awk -v from="$begin" -v to="$(date +%s.%N)" 'BEGIN { print to - from }')
    "$python" -m benchmarks.gpu_page "$PAGE" --stages "$(names | paste -sd,)" --stage "$name" --title "$(field "$name" 3)" \
        --status "$status" --seconds "$seconds" --log "$OUT/$name.log" --command "bash launch/gpu_checks.sh --only $name"
    printf '=== %s: status %s in %.0f s, %s s since the start\n' "$name" "$status" "$seconds" "$SECONDS"
    tail -n 12 "$OUT/$name.log" | cut -c1-200
    [ "$status" = 0 ] || [ "$status" = "$NOT_RUN" ] || failed+=("$name")
}
for name in $chosen; do run "$name"; done

echo "written: $PAGE; logs: $OUT"
[ ${#not_run[@]} -eq 0 ] || echo "no time was left for ${not_run[*]}; to go on: bash launch/gpu_checks.sh --from ${not_run[0]}"
[ ${#failed[@]} -eq 0 ] || { printf 'gpu_checks: failed: %s\n' "${failed[*]}" >&2; exit 1; }
