#!/usr/bin/env bash
# GKD LoRA self-distillation of Qwen3-Omni-30B-A3B on one GPU of 80 GB: the guide's settings, every layer on it.
#
#   MODEL=/models/Qwen3-Omni-30B-A3B-Instruct DATASET=train.jsonl bash launch/qwen3_omni_30b_1gpu.sh [flags]
#
# Flags on the command line override those below. launch/qwen3_omni_30b_8gpu.sh explains them, and what rows without a
# teacher's view need.
#
# 56.9 GiB are the model's weights and 6.3 LoRA of rank 8 on all linears with AdamW's state; of the rest, 4.5 GiB are a
# micro-batch of 4 x 2048 tokens with recomputation, or a rollout of 32 rows needs 7.3. What fits and what does not:
# docs/memory.md. Before the weights are read the run compares what it needs with what the GPU has, and says which flags
# make it fit. A lower --lora_rank or --lora_target_modules q_proj,k_proj,v_proj,o_proj frees up to 6 GiB,
# --max_tokens_per_micro_batch 4096 about 2, a smaller --gradient_accumulation_steps makes rollouts smaller.
set -euo pipefail

check=
if [ "${1-}" = --check ]; then # layout and memory alone: no data set is needed
    check=1 && DATASET=${DATASET:-none} && shift
fi

MODEL=${MODEL:?the folder of Qwen3-Omni-30B-A3B-Instruct}
DATASET=${DATASET:?a .jsonl or .parquet file, or a datasets name with the flag --download_datasets true; NAME#2000 takes 2000 samples}
OUTPUT=${OUTPUT:-output}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ -x "$repository/.venv/bin/python" ] || python=${PYTHON:-python3} # an active environment, a container
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # ragged batches fragment less
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# On SIGTERM a run finishes its step and saves; by default torchrun kills it after 30 s (settable with torch 2.12 or newer).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

flags=(
    # model; auto: the activations of as many layers are kept as memory is left for
    --model "$MODEL" --torch_dtype bfloat16 --attn_impl flash_attention_2 --device "${DEVICE:-auto}" --recompute auto
    --train_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules ALL
    --lmbda 0.5 --temperature 2.0 --beta 0.5 --seq_kd false --max_completion_length 512
    --dataset "$DATASET" --split_dataset_ratio 0.01 --max_length 2048 --dataloader_num_workers 4 --dataset_num_proc 8
    # 4 samples x 8: the guide's 32 samples per step, in micro-batches of at most 4 x 2048 tokens
    --num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
    --learning_rate 1e-5 --warmup_ratio 0.05 --max_grad_norm 1.0
    --output_dir "$OUTPUT" --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5 --save_only_model true
)

[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus 1 "${flags[@]}" "$@"
exec "$python" -m megatron_gkd.launch --check_plan "--gpus 1" --standalone --nproc_per_node 1 \
    -m megatron_gkd.train "${flags[@]}" "$@"
