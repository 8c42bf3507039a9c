"""One layer of experts on test ranks, and its float64 reference: router, experts, LoRA on both
linears, with values and gradients.

T tokens of a rank, H hidden size, I width of an expert, E experts of all ranks, r rank of LoRA.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional as F

from megatron_gkd import parallel
from megatron_gkd.lora.dropout import Drop, keep_mask
from megatron_gkd.lora.grouped import DOWN, GATE_UP, LoraGrouped
from megatron_gkd.lora.slots import STUDENT
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.dispatcher import use_dispatcher
from megatron_gkd.model.experts import GroupedExperts
from megatron_gkd.model.transformer_config import transformer_config

SEEDS = {"gate_up": 0x1234_5678_9ABC_DEF0, "down": 0x0FED_CBA9_8765_4321}  # of dropout


@dataclass(frozen=True)
class Case:
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    targets: tuple = (*GATE_UP, *DOWN)
    num_tokens: int = 11  # of each rank
    num_experts: int = 8
    hidden: int = 32
    intermediate: int = 16
    rank: int = 3
    alpha: float = 5.0
    shunned: tuple = ()  # experts that no token chooses
    dropout: float = 0.0

    @property
    def renormalize(self):
        """Softmax over the chosen experts; over one it would have no gradient."""
        return self.top_k > 1

    spare_columns: tuple = (0, 0)


def _draw(name, *size, scale=1.0):
    """Numbers that depend on the name alone, exact in bfloat16."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + len(name))
    return (torch.randn(*size, generator=generator) * scale).bfloat16().float()


def weights(case):
    """Of all experts, fp32."""
    num, hidden, width, rank = case.num_experts, case.hidden, case.intermediate, case.rank
    router = _draw("router", num, hidden)
    for expert in case.shunned:
        router[expert, 0] = -1000.0  # of a column that is 1
    found = SimpleNamespace(
        router=router,
        gate_up=_draw("gate_up", num, 2 * width, hidden, scale=hidden**-0.5),
        down=_draw("down", num, hidden, width, scale=width**-0.5),
        lora={},
    )
    for name in case.targets:
        d_in, d_out = (width, hidden) if name == "down_proj" else (hidden, width)
        found.lora[name] = (
            _draw(f"{name} A", num, rank, d_in, scale=d_in**-0.5),
            _draw(f"{name} B", num, d_out, rank, scale=rank**-0.5),
        )
    return found


def tokens(case, rank):
    """(x [T, H], the gradient of the layer's output)"""
    x, cotangent = (
        _draw(f"{name} {rank}", case.num_tokens, case.hidden) for name in ("x", "cotangent")
    )
    x[:, 0] = 1.0
    return x, cotangent


def make_layer(place, case):
    """The layer with this rank's experts, frozen, LoRA on it; in training mode."""
    model_args = ModelArgs(
        model_type="qwen3_moe",
        num_layers=1,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        hidden_size=case.hidden,
        moe_intermediate_size=case.intermediate,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        vocab_size=64,
        norm_topk_prob=case.renormalize,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(2, 1, 1),
        tie_word_embeddings=False,
    )
    config = transformer_config(model_args, place, case.dtype)
    experts = ModuleSpec(GroupedExperts, params={"spare_columns": case.spare_columns})
    layer = MoELayer(config, MoESubmodules(experts=experts), 1, place.groups)
    use_dispatcher(layer, place.groups)
    layer.to(place.device).requires_grad_(False)  # the router's weight starts on the CPU
    values, own = weights(case), layer.local_expert_indices
    layer.router.weight.copy_(values.router)
    layer.experts.gate_up.weight.copy_(values.gate_up[own])
    layer.experts.down.weight.copy_(values.down[own])
    for name, names in (("gate_up", GATE_UP), ("down", DOWN)):
        chosen = [target for target in names if target in case.targets]
        if chosen:
            wrapped = LoraGrouped(getattr(layer.experts, name), names)
            setattr(layer.experts, name, wrapped)
            add_slot(wrapped, STUDENT, chosen, case, values, own)
    return layer.train()


@torch.no_grad()
def add_slot(wrapped, slot, names, case, values, own, rank=None):
    settings = dict(rank=rank or case.rank, alpha=case.alpha, dropout=case.dropout)
    wrapped.add_slot(slot, names, **settings)
    for name in names:
        for matrices, value in zip(
            (wrapped.slots[slot].down, wrapped.slots[slot].up), values.lora[name]
        ):
            matrices[name].copy_(value[own])


def lora_parameters(layer):
    """(name, side) -> parameter of the student."""
    found = {}
    for linear in (layer.experts.gate_up, layer.experts.down):
        if isinstance(linear, LoraGrouped):
            slot = linear.slots[STUDENT]
            for name in slot.down:
                found[name, "A"], found[name, "B"] = slot.down[name], slot.up[name]
    return found


def run(layer, case, rank):
    """(output [T, H], gradient of the tokens, of LoRA's parameters by name)"""
    device = layer.router.weight.device
    x, cotangent = (value.to(device, case.dtype)[:, None] for value in tokens(case, rank))
    x.requires_grad_()
    output, _ = layer(x)
    parameters = lora_parameters(layer)
    of_x, *of_lora = torch.autograd.grad(output, (x, *parameters.values()), cotangent)
    assert of_x.dtype == case.dtype and all(g.dtype == torch.float32 for g in of_lora)
    gradients = {name: value.cpu() for name, value in zip(parameters, of_lora)}
    return output.detach()[:, 0].cpu(), of_x[:, 0].cpu(), gradients


def run_cases(rank, world_size, tp, ep, cases, device="cpu"):
    """Results of `run` and the experts of this rank, of each case; with dropout that of SEEDS."""
    place = parallel.initialize(
        parallel.resolve_device(device),
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
    )
    results = []
    for case in cases:
        layer = make_layer(place, case)
        if case.dropout:
            for name, seed in SEEDS.items():
                drop = Drop(case.dropout, seed)
                getattr(layer.experts, name).drop_of = lambda slot, drop=drop: drop
        kind = type(layer.token_dispatcher).__name__
        results.append((*run(layer, case, rank), layer.local_expert_indices, kind))
    return results


def reference(case, num_ranks):
    """(outputs and gradients of the tokens of each rank, {(name, side): gradient [E, ...]} summed
    over the ranks), token by token in float64. With dropout of one rank: the masks of SEEDS, whose
    rows are the pairs sorted by expert.
    """
    values = weights(case)
    lora = {name: [m.double().requires_grad_() for m in pair] for name, pair in values.lora.items()}
    router, scale = values.router.double(), case.alpha / case.rank

    num_pairs = case.num_tokens * case.top_k
    factors = {
        name: keep_mask(num_pairs, size, Drop(case.dropout, SEEDS[name]), torch.device("cpu"))
        / (1 - case.dropout)
        for name, size in (("gate_up", case.hidden), ("down", case.intermediate))
        if case.dropout
    }

    def product(name, expert, base, x, row):
        result = base.double() @ x
        if name in lora:
            down, up = lora[name]
            if factors:
                x = x * factors["down" if name == "down_proj" else "gate_up"][row]
            result = result + scale * up[expert] @ (down[expert] @ x)
        return result

    outputs, of_tokens, total = [], [], 0.0
    for rank in range(num_ranks):
        x, cotangent = (value.double() for value in tokens(case, rank))
        x.requires_grad_()
        rows = []
        chosen = (x.detach() @ router.T).topk(case.top_k).indices.tolist()
        pairs = sorted((expert, token) for token, ids in enumerate(chosen) for expert in ids)
        row_of = {pair: row for row, pair in enumerate(pairs)}
        for number, token in enumerate(x):
            logits = router @ token
            top, ids = logits.topk(case.top_k)
            of_chosen = top.softmax(dim=0) if case.renormalize else logits.softmax(dim=0)[ids]
            found = 0.0
            for p, expert in zip(of_chosen, ids.tolist()):
                (gate, up), row = values.gate_up[expert].chunk(2), row_of[expert, number]
                h = F.silu(product("gate_proj", expert, gate, token, row))
                h = h * product("up_proj", expert, up, token, row)
                # p lies in the activation, before LoRA's dropout of it
                found = found + product("down_proj", expert, values.down[expert], p * h, row)
            rows.append(found)
        output = torch.stack(rows)
        outputs.append(output.detach())
        loss = (output * cotangent).sum()
        of_tokens.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
        total = total + loss
    parameters = [m for pair in lora.values() for m in pair]
    of_lora = torch.autograd.grad(total, parameters) if parameters else ()
    names = [(name, side) for name in lora for side in "AB"]
    return outputs, of_tokens, dict(zip(names, of_lora))
