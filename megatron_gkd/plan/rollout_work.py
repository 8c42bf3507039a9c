"""What a rank does in a rollout: the prompts' forward, and one token of every row.

Legend: R rows that a rank writes, H hidden size, E experts of a layer, K a token.
"""

import math
from dataclasses import replace

from megatron_gkd.plan.layer_work import Layer, forward
from megatron_gkd.plan.step_work import Step
from megatron_gkd.plan.work import (
    PAIR_MATRICES,
    Collective,
    Launches,
    Moved,
    Product,
    Work,
    repeated,
)

# Launches of a token, by docs/rollout.md: of a layer, and beside the layers 744 - 48 x 13.
TOKEN_LAYER_LAUNCHES, TOKEN_LAUNCHES = 13, 120
# More of them where ranks share the experts (the parts of a sum are added up before it goes to the
# others, places of other ranks' rows are zeroed), where they share attention, and where they share
# the vocabulary. On a CPU 12 or 13 operations more than the 58 of a layer, and 21 than 128 beside.
EXPERTS_LAUNCHES, ATTENTION_LAUNCHES, VOCABULARY_LAUNCHES = 2, 1, 20
CANDIDATES = 50  # of a rank's columns for each row: the default of --top_k
SAMPLER_PASSES = 4  # over the logits in fp32
LOOK = 16  # tokens between two looks of the host at what was written (rollout/cache.py)


def prompt_tokens(step: Step) -> float:
    """Of a mean prompt."""
    return max(step.load.row_tokens - step.load.response_tokens, 1)


def prefill(step: Step) -> tuple[Work, int]:
    """(a chunk of prompts through the training forward, how many of them); each prompt once,
    whatever the number of its samples.
    """
    load, prompts = step.load, step.load.prompts_of_rank(step.layout)
    length = prompt_tokens(step)
    chunks = max(math.ceil(prompts * length / max(load.prefill_tokens, length)), 1)
    tokens = prompts * length / chunks
    # each context-parallel rank reads its prompts whole
    alone = replace(step, layout=replace(step.layout, context_parallel_size=1))
    work: Work = [
        *alone.through_layers(forward, tokens, length, with_lora=True),
        *alone.around_layers(tokens, backward=False),
        *alone.messages(tokens),
    ]
    return work, chunks


def experts_hit(num_experts: int, chosen: int, rows: float) -> float:
    """Of num_experts that see `rows` tokens, each of which takes `chosen` at random: the expected
    number that any of them takes.
    """
    return num_experts * (1 - (1 - chosen / num_experts) ** rows)


def token(step: Step) -> Work:
    """One token of every row through a stage's layers, with the keys of half the response."""
    load, length = step.load, step.args.num_layers // step.stages
    keys = prompt_tokens(step) + load.completion_tokens / 2
    kinds = step.layers(0, 0, with_lora=True)
    work = [
        item
        for layer, number in kinds
        for item in repeated(_token_of_layer(step, layer, keys), number)
    ]
    kind = "eager" if step.stages > 1 else "graph"
    tp, ep = step.layout.tensor_model_parallel_size, step.layout.expert_model_parallel_size
    launches = (
        TOKEN_LAYER_LAUNCHES + EXPERTS_LAUNCHES * (tp * ep > 1) + ATTENTION_LAUNCHES * (tp > 1)
    )
    work.append(Launches(kind=kind, times=launches * length))
    if step.stages > 1:
        size = step.load.written_rows(step.layout) * step.args.hidden_size * load.number_bytes
        part = "messages between stages"
        work.append(Collective(part=part, kind="send", group="pp", num_bytes=size))
    return work


def _token_of_layer(step: Step, of: Layer, keys: float) -> Work:
    """Weights are read once, those of experts where a row has chosen them: few rows are bound by
    memory.
    """
    args, load, rows = step.args, step.load, step.load.written_rows(step.layout)
    (queries, groups), hidden = of.widths, args.hidden_size
    inner, width = args.moe_intermediate_size, queries + 2 * groups
    product = lambda part, rows, columns, inner, groups=0: Product(
        part=part,
        rows=rows,
        columns=columns,
        inner=inner,
        groups=groups,
        number_bytes=load.number_bytes,
    )
    # ranks of one tensor-parallel group have the same rows, those of other replicas bring theirs
    shares = of.tp / of.ep if of.tp % of.ep == 0 else 1
    seen = rows / shares if of.tp % of.ep == 0 else rows * of.ep / of.tp
    hit = experts_hit(args.num_experts, args.num_experts_per_tok, seen) / of.ep
    pairs = max(seen * args.num_experts_per_tok / of.ep, hit)
    work: Work = [
        product("attention's weights", rows, width, hidden),
        product("attention's weights", rows, hidden, queries),
        Moved(
            part="keys and values",
            kernel="keys",
            num_bytes=rows * keys * 2 * groups * load.number_bytes,
        ),
        product("experts' weights", pairs, 2 * inner, hidden, hit),
        product("experts' weights", pairs, hidden, inner, hit),
    ]
    ranks = [  # groups, columns and inner numbers of W_down and W_up
        ("LoRA's weights", 0, of.qkv_rank, width, hidden, rows),
        ("LoRA's weights", 0, of.output_rank, hidden, queries, rows),
        ("LoRA's weights", hit, of.gate_up_rank, 2 * inner, hidden, pairs),
        ("LoRA's weights", hit, of.down_rank, hidden, inner, pairs),
    ]
    for part, number, rank, columns, inputs, of_rows in ranks:
        if rank:
            work.append(product(part, of_rows, rank, inputs, number))
            work.append(product(part, of_rows, columns, rank, number))
    # on a CPU of every pair of the rows that a rank has, also of other ranks' experts
    low = of.gate_up_rank * (hidden + 2 * inner) + of.down_rank * (inner + hidden)
    copied = 2 * seen * shares * args.num_experts_per_tok * low * load.number_bytes
    work.append(Moved(part="LoRA's weights", kernel=PAIR_MATRICES, num_bytes=copied))
    size = rows * hidden * load.number_bytes
    sums = lambda kind, group, num_bytes: Collective(
        part="sums over ranks", kind=kind, group=group, num_bytes=num_bytes
    )
    if of.tp > 1:
        work.append(sums("all_reduce", "tp", size))
    if of.tp % of.ep:
        gathered = size * of.ep / of.tp
        work += [sums("all_gather", "ep", gathered), sums("reduce_scatter", "ep", gathered)]
        if of.tp > 1:
            work.append(sums("all_gather", "tp", size))
    elif of.tp > 1:
        work.append(sums("all_reduce", "tp", size))
    return work


def token_head(step: Step) -> Work:
    """The lm_head and the draw, on the last stage, and what all stages need of it."""
    args, load, tp = step.args, step.load, step.layout.tensor_model_parallel_size
    rows, columns = step.load.written_rows(step.layout), args.padded_vocab_size(tp) // tp
    kind = "eager" if step.stages > 1 else "graph"
    work: Work = [
        Product(
            part="lm_head",
            rows=rows,
            columns=columns,
            inner=args.hidden_size,
            number_bytes=load.number_bytes,
        ),
        Moved(part="sampler", kernel="copy", num_bytes=SAMPLER_PASSES * rows * columns * 4),
        Launches(kind=kind, times=TOKEN_LAUNCHES + VOCABULARY_LAUNCHES * (tp > 1)),
    ]
    part = "sums over ranks"
    if tp > 1:  # of each candidate score, logit and column, in fp64; the row's log-sum
        size = rows * (3 * CANDIDATES + 1) * 8 * tp
        work.append(Collective(part=part, kind="all_gather", group="tp", num_bytes=size))
        size = rows * args.hidden_size * load.number_bytes
        work.append(Collective(part=part, kind="all_reduce", group="tp", num_bytes=size))
    if step.stages > 1:
        work.append(Collective(part=part, kind="broadcast", group="pp", num_bytes=rows * 16))
    if step.layout.expert_model_parallel_size > tp:
        times = 1 / LOOK
        work.append(Collective(part=part, kind="all_reduce", group="ep", num_bytes=16, times=times))
    return work
