#!/usr/bin/env bash
# GKD LoRA self-distillation of Qwen3-Omni-30B-A3B on one node of 8 GPUs: TP 4, DP 2, EP 8.
#
#   MODEL=/models/Qwen3-Omni-30B-A3B-Instruct DATASET=train.jsonl bash launch/qwen3_omni_30b_8gpu_tp4.sh [flags]
#
# Like launch/qwen3_omni_30b_8gpu.sh, but with two model copies of 4 GPUs each: one key-value head per rank and
# collectives among 4 ranks, at the price of attention weights and vocabulary slices twice as large on each GPU. The
# experts, nearly all of the weights, are spread over the 8 GPUs in both. Better where memory is left and samples are many.
# That script explains the flags, and what rows without a teacher's view need.
set -euo pipefail

check=
if [ "${1-}" = --check ]; then # layout and memory alone: no data set is needed
    check=1 && DATASET=${DATASET:-none} && shift
fi

MODEL=${MODEL:?the folder of Qwen3-Omni-30B-A3B-Instruct}
DATASET=${DATASET:?a .jsonl or .parquet file, or a datasets name with the flag --download_datasets true; NAME#2000 takes 2000 samples}
OUTPUT=${OUTPUT:-output}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ -x "$repository/.venv/bin/python" ] || python=${PYTHON:-python3} # an active environment, a container
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# On SIGTERM a run finishes its step and saves; by default torchrun kills it after 30 s (settable with torch 2.12 or newer).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

flags=(
    --model "$MODEL" --torch_dtype bfloat16 --attn_impl flash_attention_2 --device "${DEVICE:-auto}"
    --tensor_model_parallel_size 4 --expert_model_parallel_size 8 --pipeline_model_parallel_size 1
    --train_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules ALL
    --lmbda 0.5 --temperature 2.0 --beta 0.5 --seq_kd false --max_completion_length 512
    --dataset "$DATASET" --split_dataset_ratio 0.01 --max_length 2048 --dataloader_num_workers 4 --dataset_num_proc 16
    # 4 samples x 4 micro-batches x 2 copies: the guide's 32 samples per step
    --num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4
    --learning_rate 1e-5 --warmup_ratio 0.05 --max_grad_norm 1.0
    --output_dir "$OUTPUT" --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --save_only_model true
)

[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus "$NPROC_PER_NODE" "${flags[@]}" "$@"
exec "$python" -m megatron_gkd.launch --check_plan "--gpus $NPROC_PER_NODE" --standalone --nproc_per_node "$NPROC_PER_NODE" \
    -m megatron_gkd.train "${flags[@]}" "$@"
