#!/usr/bin/env bash
# A student that hears and a teacher that reads, on two CPU cores. The small model can repeat words that it reads; of
# sound it understands nothing, although its audio tower tells the words apart. The teacher reads the transcript of what
# the student hears, and their divergence teaches the student to hear. Plain fine-tuning on the same answers follows for
# comparison.
#
#   bash demo/run_speech.sh [training flags for both runs, which override those below]
#                                                                     everything is written to output/demo_speech
#
# 1. finds an environment (launch/environment.sh), or sets up .venv
# 2. builds the small whole Qwen3-Omni, unless demo/run.sh has
# 3. writes sounds and rows
# 4. trains LoRA with torchrun: 2 gloo ranks, TP 2, EP 2
# 5. trains as many steps of plain SFT
# 6. prints the table and draws a picture, computed with transformers and peft alone, and compares them with the Megatron
#    model's numbers
#
# SOUND=voices uses synthetic human voices (needs espeak-ng) instead of tones, and builds another model that knows them.
# NPROC (ranks), DEVICE (cpu, cuda) and DTYPE (float32, bfloat16) change the runs; for one GPU: NPROC=1 DEVICE=cuda.
# NUM_TRAIN and NUM_HELDOUT are numbers of sounds.
# MIN_EXACT is the share of held-out sounds that must be heard exactly. A run of a few steps needs MIN_EXACT=0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SOUND=${SOUND:-tones}
DEMO=${DEMO:-output/demo_speech}
MODEL=${MODEL:-$([ "$SOUND" = tones ] && echo output/demo/model || echo "$DEMO/model_$SOUND")}
NPROC=${NPROC:-2}
DEVICE=${DEVICE:-cpu}
DTYPE=${DTYPE:-float32}
NUM_TRAIN=${NUM_TRAIN:-2400}
NUM_HELDOUT=${NUM_HELDOUT:-128}
MIN_EXACT=${MIN_EXACT:-$([ "$SOUND" = tones ] && echo 0.8 || echo 0.5)}
export OMP_NUM_THREADS=1

echo "[1/6] environment"
source launch/environment.sh

echo "[2/6] small Qwen3-Omni in $MODEL"
if [ ! -d "$MODEL" ]; then # renamed into place only when complete
    "$python" -m checkpoint_tools.make_tiny_model --output "$MODEL" --tower_sound "$SOUND"
elif grep -qs "\"tower_sound\": \"$SOUND\"" "$MODEL/lessons.json"; then
    echo "already there; remove it to build it again"
else
    echo "demo_speech: error: the audio tower of $MODEL never heard $SOUND: remove it or name another, MODEL=..." >&2
    exit 1
fi

echo "[3/6] data in $DEMO/data"
rm -rf "$DEMO/data"
"$python" -m demo.speech_data --output "$DEMO/data" --sound "$SOUND" --num_train "$NUM_TRAIN" \
    --num_heldout "$NUM_HELDOUT"
head -n 1 "$DEMO/data/train.jsonl"

layout=(--tensor_model_parallel_size "$NPROC" --expert_model_parallel_size "$NPROC" --device "$DEVICE")
temperature=2.0
train() { # FOLDER FLAGS...
    rm -rf "$1"
    "$python" -m megatron_gkd.launch --standalone --nproc_per_node "$NPROC" -m megatron_gkd.train "${layout[@]}" --torch_dtype "$DTYPE" \
        --model "$MODEL" --dataset "$DEMO/data/train.jsonl" --val_dataset "$DEMO/data/heldout.jsonl" --max_length 96 \
        --temperature "$temperature" --beta 0.5 \
        --lora_rank 16 --lora_alpha 32 --lora_dropout 0.0 \
        --per_device_train_batch_size 32 --per_device_eval_batch_size 64 \
        --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --max_steps 200 \
        --eval_steps 25 --save_steps 200 --save_only_model true --logging_steps 1 --output_dir "$@"
}

echo "[4/6] GKD in $DEMO/gkd: $NPROC ranks on $DEVICE, TP $NPROC, EP $NPROC, $DTYPE"
train "$DEMO/gkd" --lmbda 0.5 --max_completion_length 12 \
    --rollout_temperature 1.0 --top_p 0.9 --top_k 50 --repetition_penalty 1.0 "$@"

echo "[5/6] SFT in $DEMO/sft: the same rows and steps, cross-entropy on the answers"
train "$DEMO/sft" --lmbda 0.0 --sft_alpha 1.0 "$@"

echo "[6/6] before and after"
tolerance=$([ "$DTYPE" = float32 ] && echo 1e-4 || echo 1e-3) # JSD of Megatron to that of transformers in fp32
"$python" -m demo.speech_report --model "$MODEL" --heldout "$DEMO/data/heldout.jsonl" --gkd "$DEMO/gkd" \
    --sft "$DEMO/sft" --picture "$DEMO/speech.png" --temperature "$temperature" --tolerance "$tolerance" \
    --min_exact "$MIN_EXACT"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; picture: $DEMO/speech.png"
