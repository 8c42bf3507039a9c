#!/usr/bin/env bash
# GKD LoRA self-distillation of Qwen3-Omni-30B-A3B on long audio, on one node of 8 GPUs: TP 4, CP 2, EP 8.
#
#   MODEL=/models/Qwen3-Omni-30B-A3B-Instruct DATASET=meetings.jsonl bash launch/qwen3_omni_30b_8gpu_long_audio.sh [flags]
#
# An hour of sound is about 45,000 tokens. Every row is cut over two context-parallel ranks of four tensor-parallel ranks
# each, so that a GPU holds an eighth of a row between the layers; each layer's activations are computed again in backward.
# Rows are packed: short clips share micro-batches of at most 49,152 tokens, an hour is one by itself. When TP and when CP:
# docs/long_rows.md. launch/qwen3_omni_30b_8gpu.sh explains the other flags, and what rows without a teacher's view need.
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
    --model "$MODEL" --torch_dtype bfloat16 --attn_impl sdpa --device "${DEVICE:-auto}"
    --tensor_model_parallel_size 4 --context_parallel_size 2 --expert_model_parallel_size 8
    --train_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules ALL
    --lmbda 0.5 --temperature 2.0 --beta 0.5 --seq_kd false --max_completion_length 512
    # an hour, a prompt and an answer; the features of the sound are kept for the next epoch
    --dataset "$DATASET" --split_dataset_ratio 0.01 --max_length 49152 --media_cache "$OUTPUT/media"
    --dataloader_num_workers 4 --dataset_num_proc 16
    # one model copy: 8 rows a step, however many micro-batches they make
    --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8
    --max_tokens_per_micro_batch 49152 --rollout_prefill_tokens 49152 --recompute full
    --learning_rate 1e-5 --warmup_ratio 0.05 --max_grad_norm 1.0
    --output_dir "$OUTPUT" --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --save_only_model true
)

[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus "$NPROC_PER_NODE" --media audio "${flags[@]}" "$@"
exec "$python" -m megatron_gkd.launch --check_plan "--gpus $NPROC_PER_NODE --media audio" --standalone --nproc_per_node "$NPROC_PER_NODE" \
    -m megatron_gkd.train "${flags[@]}" "$@"
