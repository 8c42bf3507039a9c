#!/usr/bin/env bash
# The main job on two CPU cores: distil a system prompt into LoRA. The teacher reads "Answer in Chinese, in reverse
# order."; the student does not, and learns to answer as if it had.
#
#   bash demo/run.sh [training flags, which override those below]     everything is written to output/demo
#
# 1. finds an environment (launch/environment.sh), or sets up .venv
# 2. builds a small whole Qwen3-Omni and teaches it a toy language (kept for the next time)
# 3. writes the data
# 4. trains LoRA with torchrun: 2 gloo ranks, TP 2, EP 2
# 5. prints before and after, computed with transformers and peft alone, and compares their logits with the Megatron
#    model's
#
# NPROC (ranks), DEVICE (cpu, cuda) and DTYPE (float32, bfloat16) change the run; for one GPU: NPROC=1 DEVICE=cuda.
# MIN_OBEYED is the share of held-out answers that must obey the prompt. A run of a few steps needs MIN_OBEYED=0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEMO=${DEMO:-output/demo}
NPROC=${NPROC:-2}
DEVICE=${DEVICE:-cpu}
DTYPE=${DTYPE:-float32}
MIN_OBEYED=${MIN_OBEYED:-0.8}
export OMP_NUM_THREADS=1

echo "[1/5] environment"
source launch/environment.sh

echo "[2/5] small Qwen3-Omni in $DEMO/model"
if [ -d "$DEMO/model" ]; then # renamed into place only when complete
    echo "already there; remove it to build it again"
else
    "$python" -m checkpoint_tools.make_tiny_model --output "$DEMO/model"
fi

echo "[3/5] data in $DEMO/data"
"$python" -m demo.data --output "$DEMO/data"
head -n 1 "$DEMO/data/train.jsonl"

echo "[4/5] training in $DEMO/run: $NPROC ranks on $DEVICE, TP $NPROC, EP $NPROC, $DTYPE"
rm -rf "$DEMO/run"
layout=(--tensor_model_parallel_size "$NPROC" --expert_model_parallel_size "$NPROC" --device "$DEVICE")
"$python" -m megatron_gkd.launch --standalone --nproc_per_node "$NPROC" -m megatron_gkd.train "${layout[@]}" --torch_dtype "$DTYPE" \
    --model "$DEMO/model" --dataset "$DEMO/data/train.jsonl" --val_dataset "$DEMO/data/heldout.jsonl" --max_length 64 \
    --lmbda 0.5 --temperature 1.0 --beta 0.5 \
    --max_completion_length 12 --rollout_temperature 1.0 --top_p 0.9 --top_k 50 --repetition_penalty 1.0 \
    --lora_rank 16 --lora_alpha 32 --lora_dropout 0.0 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 32 \
    --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --max_steps 150 \
    --eval_steps 25 --save_steps 150 --save_only_model true --logging_steps 1 --output_dir "$DEMO/run" "$@"

echo "[5/5] before and after"
tolerance=$([ "$DTYPE" = float32 ] && echo 1e-4 || echo 1e-3) # JSD of Megatron to that of transformers in fp32
adapter=$(ls -d "$DEMO"/run/checkpoint-* | sort -V | tail -n 1)
"$python" -m demo.report --model "$DEMO/model" --heldout "$DEMO/data/heldout.jsonl" --run "$DEMO/run" \
    --adapter "$adapter" --temperature 1.0 --tolerance "$tolerance" --min_obeyed "$MIN_OBEYED"
PYTHONWARNINGS=ignore "$python" -m megatron_gkd.launch --standalone --nproc_per_node "$NPROC" -m checkpoint_tools.verify "${layout[@]}" \
    --hf_model "$DEMO/model" --adapter "$adapter"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; adapter: $adapter, curves: $DEMO/run/curves.png"
