#!/usr/bin/env bash
# GKD LoRA self-distillation of Qwen3-Omni-30B-A3B on several nodes of 8 GPUs: TP 8 and EP 8 inside a node.
# Start it on every node with the same variables, except NODE_RANK (0, 1, ...):
#
#   MASTER_ADDR=node0 NNODES=2 NODE_RANK=0 MODEL=... DATASET=... bash launch/multi_node.sh [flags, which override these]
#
# MODEL, DATASET and OUTPUT must be on a file system that all nodes share. launch/qwen3_omni_30b_8gpu.sh explains the
# flags, and what rows without a teacher's view need.
set -euo pipefail

check=
if [ "${1-}" = --check ]; then # layout and memory alone, on any machine: no data set, no other node is needed
    check=1 && DATASET=${DATASET:-none} && MASTER_ADDR=${MASTER_ADDR:-none} && NODE_RANK=${NODE_RANK:-0} && shift
fi

# The one line to change. With 8 every node holds all experts, and only LoRA gradients go between nodes. With as many as there
# are GPUs each holds the fewest experts (on two nodes 8 of 128), and tokens are exchanged between the nodes, which costs more
# time than anything else there (modelled: docs/scaling.md).
EXPERT_PARALLEL=${EXPERT_PARALLEL:-8}

MASTER_ADDR=${MASTER_ADDR:?the address of the node with NODE_RANK=0}
MASTER_PORT=${MASTER_PORT:-29500}
NNODES=${NNODES:?the number of nodes}
NODE_RANK=${NODE_RANK:?the number of this node, from 0}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
MODEL=${MODEL:?the folder of Qwen3-Omni-30B-A3B-Instruct}
DATASET=${DATASET:?a .jsonl or .parquet file, or a datasets name with the flag --download_datasets true; NAME#2000 takes 2000 samples}
OUTPUT=${OUTPUT:-output}
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
    --tensor_model_parallel_size 8 --expert_model_parallel_size "$EXPERT_PARALLEL" --pipeline_model_parallel_size 1
    --train_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules ALL
    --lmbda 0.5 --temperature 2.0 --beta 0.5 --seq_kd false --max_completion_length 512
    --dataset "$DATASET" --split_dataset_ratio 0.01 --max_length 2048 --dataloader_num_workers 4 --dataset_num_proc 16
    --num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 4
    --learning_rate 1e-5 --warmup_ratio 0.05 --max_grad_norm 1.0
    --output_dir "$OUTPUT" --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5
    --save_only_model false # so that a stopped run can be resumed
)

[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus "$((NNODES * NPROC_PER_NODE))" "${flags[@]}" "$@"
exec "$python" -m megatron_gkd.launch --check_plan "--gpus $((NNODES * NPROC_PER_NODE))" \
    --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NPROC_PER_NODE" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m megatron_gkd.train "${flags[@]}" "$@"
