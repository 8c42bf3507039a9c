#!/usr/bin/env bash
# GKD LoRA self-distillation of Qwen3-Omni-30B-A3B on one node of 8 GPUs: TP 8, EP 8, the guide's settings.
#
#   MODEL=/models/Qwen3-Omni-30B-A3B-Instruct DATASET=train.jsonl bash launch/qwen3_omni_30b_8gpu.sh [flags]
#
# Flags on the command line override those below. With --check as the first, layout and memory are checked and nothing starts.
#
# In the rows the teacher must see more than the student (teacher_messages or teacher_prompt): with the same view the
# student with fresh LoRA equals the teacher, nothing can be learned, and the run is refused. For plain rows, such as the
# guide's 'AI-ModelScope/alpaca-gpt4-data-zh#2000', add --sft_alpha 0.3.
#
# TP 8 shards attention, vocabulary and activations over all GPUs (each of the 4 key-value heads is shared by two ranks),
# and EP 8 gives each GPU 16 of the 128 experts: the layout with the least memory per GPU.
# launch/qwen3_omni_30b_8gpu_tp4.sh keeps two model copies, with collectives among 4 ranks instead of 8.
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

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # ragged batches fragment less
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# On SIGTERM a run finishes its step and saves; by default torchrun kills it after 30 s (settable with torch 2.12 or newer).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

flags=(
    # model
    --model "$MODEL"
    --torch_dtype bfloat16
    --attn_impl flash_attention_2
    --device "${DEVICE:-auto}"
    # layout
    --tensor_model_parallel_size 8
    --expert_model_parallel_size 8
    --pipeline_model_parallel_size 1
    # LoRA
    --train_type lora
    --lora_rank 8
    --lora_alpha 16
    --lora_dropout 0.05
    --lora_target_modules ALL
    # distillation: half of the steps on-policy, temperature 2, M = 0.5 student + 0.5 teacher
    --lmbda 0.5
    --temperature 2.0
    --beta 0.5
    --seq_kd false
    --max_completion_length 512
    # data
    --dataset "$DATASET"
    --split_dataset_ratio 0.01
    --max_length 2048
    --dataloader_num_workers 4
    --dataset_num_proc 16
    # training: one model copy, so 4 samples x 8 micro-batches make the guide's 32 samples per step (there 8 copies)
    --num_train_epochs 1
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 4
    --gradient_accumulation_steps 8
    --learning_rate 1e-5
    --warmup_ratio 0.05
    --max_grad_norm 1.0
    # run folder; --save_only_model false also saves what --resume_from_checkpoint latest needs
    --output_dir "$OUTPUT"
    --eval_steps 50
    --save_steps 50
    --save_total_limit 2
    --logging_steps 5
    --save_only_model true
)

[ -z "$check" ] || exec "$python" -m megatron_gkd.plan --check --gpus "$NPROC_PER_NODE" "${flags[@]}" "$@"
exec "$python" -m megatron_gkd.launch --check_plan "--gpus $NPROC_PER_NODE" --standalone --nproc_per_node "$NPROC_PER_NODE" \
    -m megatron_gkd.train "${flags[@]}" "$@"
