"""The computed numbers of docs/memory.md are those of the formulas: a line that is not there is
printed as it should be.
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.plan.memory import GIB, estimate, kept_layers_that_fit
from megatron_gkd.plan.parameters import base_parameters, lora_parameters
from megatron_gkd.plan.tower_memory import feature_bytes, tower_bytes, tower_lora_parameters
from megatron_gkd.plan.towers import read_towers
from megatron_gkd.plan.training_memory import layers_of_stage
from tests.plans import GUIDE_STEP, REAL
from tests.test_plan_memory import CARD, ONE

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
ROLLOUTS = dict(accumulation=8, completion_tokens=512, prefill_tokens=8192)
ARGS = REAL_SHAPE.model_args()


def gib(size):
    return f"{size / GIB:.1f}"


def has_lines(expected):
    page = PAGE.read_text()
    assert [line for line in expected if line not in page] == []


def test_the_parts_of_a_run():
    found = estimate(ARGS, ONE, replace(GUIDE_STEP, **ROLLOUTS), whole_card=False)
    parts = found.always | found.training | found.rollout
    kinds = [
        ("weights", "base"),
        ("LoRA: weights, gradients, AdamW's two moments in fp32", "LoRA, gradients, AdamW"),
        ("the experts' LoRA as training multiplies with it", "LoRA inside the experts' products"),
        ("LoRA as decoding reads it", "LoRA laid out"),
        ("*training:* inputs of 48 layers, 8,192 tokens", "inputs of layers"),
        ("activations of a layer that is run again: attention", "attention"),
        ("its experts", "experts"),
        ("its norms", "norms"),
        ("its backward beside them", "a layer's backward"),
        ("*rollouts, not at the same time:* keys and values", "keys and values"),
        ("prompts", "prompts"),
    ]
    assert set(found.training) | set(found.rollout) >= {kind for _, kind in kinds[4:]}
    has_lines([f"| {title} | {gib(parts[kind])} |" for title, kind in kinds])
    reserve = found.total - found.allocated
    has_lines([f"| reserve | {gib(reserve)} |", f"| all of it | {gib(found.total)} |"])


def test_what_fits_on_a_card():
    step, rollouts = GUIDE_STEP, replace(GUIDE_STEP, **ROLLOUTS)
    one_row = replace(step, batch_size=1, micro_batch_tokens=2048, recompute=False)
    lines = []
    for title, load in (
        ("4 x 2,048 tokens, `--recompute full`, no rollouts", step),
        ("the same with rollouts of 32 rows (`launch/qwen3_omni_30b_1gpu.sh`)", rollouts),
        ("4 x 2,048 tokens without recomputation", replace(step, recompute=False)),
        ("1 x 2,048 tokens without recomputation", one_row),
        ("rollouts of 128 rows", replace(rollouts, accumulation=32)),
    ):
        needed = estimate(ARGS, ONE, load, whole_card=False).total
        lines.append(f"| {title} | {gib(needed)} | {'fits' if needed <= CARD else 'refused'} |")
    has_lines(lines)
    kept = kept_layers_that_fit(ARGS, ONE, step, CARD, whole_card=False)
    has_lines([f"keep the activations of {kept} of the 48 layers"])


def test_beside_an_h100():
    """Without what that commit held, and as tests/test_plan_memory.py does with it."""
    columns = []
    for layers in (48, 8):
        args = replace(REAL_SHAPE, num_layers=layers).model_args()
        found = estimate(args, ONE, GUIDE_STEP)
        base, lora = base_parameters(args, ONE) * 2, lora_parameters(args, ONE, GUIDE_STEP)
        held = layers * 2 * GUIDE_STEP.micro_batch_tokens * args.hidden_size * 2
        inside = found.always["LoRA inside the experts' products"]
        peak = found.allocated
        columns.append(
            (base + 8 * lora, base + 16 * lora, base + 16 * lora + held, peak, peak - inside + held)
        )
    built, optimizer, with_held, peak, as_then = zip(*columns)
    lines = []
    for title, measured, today, then in (
        ("after building, gradients included", (60.0, 11.0), built, None),
        ("after a step, with AdamW's state", (66.5, 12.1), optimizer, with_held),
        ("peak of a step", (69.2, 14.8), peak, as_then),
    ):
        of_then = [gib(size) for size in then] if then else ["", ""]
        cells = [cell for of in zip(measured, map(gib, today), of_then) for cell in of]
        lines.append(f"| {title} | {' | '.join(map(str, cells))} |".replace("|  |", "| |"))
    has_lines(lines)


def test_what_a_layer_keeps():
    lines, load = [], replace(GUIDE_STEP, micro_batch_tokens=65536)
    for tp, ep in ((1, 1), (2, 2), (4, 8), (8, 8)):
        (layer, *_) = layers_of_stage(ARGS, ParallelConfig(tp, 1, ep, 1), load, 0)
        of_token = [round(size / load.micro_batch_tokens) for size in layer.kept.values()]
        cells = " | ".join(f"{size:,}" for size in (*of_token, sum(of_token)))
        lines.append(f"| TP {tp} EP {ep} | {cells} |")
    has_lines(lines)


def test_the_towers():
    lines, sound, pictures = [], read_towers(REAL, True, False), read_towers(REAL, False, True)
    for title, towers, tokens in (
        ("sound, 2,048 tokens", sound, 2048),
        ("8,192 tokens", sound, 8192),
        ("images or video, 2,048 tokens", pictures, 2048),
        ("8,192 tokens", pictures, 8192),
    ):
        load = replace(GUIDE_STEP, micro_batch_tokens=tokens, towers=towers, media_share=1.0)
        with_lora = replace(load, lora_towers=True)
        found = tower_bytes(with_lora)
        frozen = 2 * towers[0].numbers, tower_bytes(load).forward
        lora = 16 * tower_lora_parameters(with_lora), found.kept, found.forward_with_lora
        lines.append(f"| {title} | {' | '.join(map(gib, (*frozen, *lora)))} |")
    of_token = (feature_bytes(replace(GUIDE_STEP, towers=of), 1) for of in (sound, pictures))
    per_token = [size // 1024 for size in of_token]
    has_lines([*lines, f"{per_token[0]} KiB a token of sound, {per_token[1]} of an\nimage"])
