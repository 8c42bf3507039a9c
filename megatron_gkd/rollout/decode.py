"""One new token a row through this rank's pipeline stage: nothing waits for the device, every shape
is that of the batch.

The rows are the same on the tensor-parallel ranks, so a layer adds up its parts over them twice:
after attention, and after the experts. Where experts are spread over replicas, each rank brings its
share of the replica's rows to the ranks that share experts, and gets their sums back.

Legend: B rows, H hidden size, T tensor-parallel ranks, N ranks that share the experts.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.kernels import runs_triton
from megatron_gkd.lora.slots import lora_modules
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel
from megatron_gkd.rollout.cache import CacheTable, KeyValueCache, Rows
from megatron_gkd.rollout.weights import Delta, LayerWeights, StageWeights


def misfit(model_args: ModelArgs, parallel: Parallel) -> str:
    """Why triton_kernels do not take this rank's sizes; empty where they do."""
    heads = model_args.num_attention_heads // parallel.tp_size
    queries = heads // max(1, model_args.num_key_value_heads // parallel.tp_size)
    sizes = {
        "hidden_size": model_args.hidden_size,
        "moe_intermediate_size": model_args.moe_intermediate_size,
        "head_dim times a rank's heads": heads * model_args.head_dim,
    }
    for name, size in sizes.items():
        if size % 16:
            return f"{name} is {size}, no multiple of 16"
    if model_args.head_dim not in (32, 64, 128, 256):
        return f"head_dim is {model_args.head_dim}, not 32, 64, 128 or 256"
    return f"{queries} query heads share a key, more than 16" if queries > 16 else ""


def select_kernels(model_args: ModelArgs, parallel: Parallel) -> ModuleType:
    """triton_kernels on CUDA where Triton is installed and the sizes fit (`misfit`), otherwise
    torch_kernels.
    """
    if runs_triton(parallel.device) and not misfit(model_args, parallel):
        from megatron_gkd.rollout import triton_kernels

        return triton_kernels
    from megatron_gkd.rollout import torch_kernels

    return torch_kernels


def slow_kernels_note(model_args: ModelArgs, parallel: Parallel) -> str:
    """That a GPU goes without them, and why; empty where it has them, and on a CPU."""
    if parallel.device.type != "cuda":
        return ""
    reason = misfit(model_args, parallel)
    if not reason and not runs_triton(parallel.device):
        reason = "Triton is not installed"
    without = "rollouts go without Triton's kernels and CUDA graphs, and are slower"
    return f"Note: {without}: {reason}" if reason else ""


def replicas_share_experts(parallel: Parallel) -> bool:
    """Otherwise each tensor-parallel group holds all experts."""
    return parallel.tp_size % parallel.ep_size != 0


class Decoder:
    """The stage's layers, whichever adapter is active."""

    def __init__(self, model: Any, model_args: ModelArgs, parallel: Parallel):
        self.model, self.model_args, self.parallel = model, model_args, parallel
        self.kernels = select_kernels(model_args, parallel)
        self.dtype = model.config.params_dtype
        self.table = CacheTable.on(parallel.device, self.dtype)
        self._weights: dict[str | None, StageWeights] = {}

    def weights(self) -> tuple[str | None, StageWeights]:
        """The active adapter's name and the weights with its newest values. Collectives: those of
        `StageWeights`.
        """
        modules = lora_modules(self.model)
        active = modules[0].active if modules else None
        if active not in self._weights:
            self._weights[active] = StageWeights(self.model, self.model_args, self.parallel)
        self._weights[active].refresh()
        return active, self._weights[active]

    def forward(
        self,
        weights: StageWeights,
        rows: Rows,
        cache: KeyValueCache,
        num_written: int,
        key_mask: Tensor | None,
    ) -> Tensor:
        """The rows' newest tokens -> [B, H]: on the last stage the final norm's output, on others
        what the next stage takes. Their keys and values go into the cache.

        num_written: `rows.step` as the host knows it; key_mask: for torch_kernels.attend.
        Collectives: with T > 1 an all-reduce of [B, H] for the embedding and two a layer; with
        experts spread over replicas, in place of the second, an all-gather of [B / T, H] to N
        ranks, a reduce-scatter, and with T > 1 an all-gather. Between stages a receive and a send.
        """
        parallel, kernels, sizes = self.parallel, self.kernels, weights.sizes
        x = self._embed(weights, rows.tokens) if parallel.is_first_stage else self._receive(rows)
        rotation = self._rotation(weights, rows)
        normed = F.rms_norm(x, x.shape[1:], weights.layers[0].input_norm, sizes.eps)
        for index, layer in enumerate(weights.layers):
            query = kernels.qkv(normed, layer, rotation, rows, cache, index, num_written, sizes)
            context = kernels.attend(query, rows, cache, index, num_written, key_mask, sizes)
            delta = self._add_over_ranks(kernels.output(context, layer))
            normed = kernels.add_norm(x, delta, layer.mlp_norm, sizes.eps)
            delta = self._experts(normed, layer, weights)
            following = (
                weights.layers[index + 1].input_norm
                if index + 1 < len(weights.layers)
                else weights.final_norm
            )
            # a later stage norms what it receives
            norm = layer.input_norm if following is None else following
            normed = kernels.add_norm(x, delta, norm, sizes.eps)
        if parallel.is_last_stage:
            return normed
        dist.send(x, self._peer(1), group=parallel.groups.pp)
        return x

    def _embed(self, weights: StageWeights, tokens: Tensor) -> Tensor:
        """[B] -> [B, H]; a negative token is read as 0."""
        table, parallel = weights.embedding, self.parallel
        assert table is not None
        tokens = tokens.clamp(min=0)
        if parallel.tp_size == 1:
            return table[tokens]
        local = tokens - parallel.tp_rank * len(table)
        is_local = (local >= 0) & (local < len(table))
        x = table[local.where(is_local, 0)] * is_local[:, None]
        dist.all_reduce(x, group=parallel.groups.tp)
        return x

    def _rotation(self, weights: StageWeights, rows: Rows) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, D] of the newest tokens' positions; the sines of the first half of
        D are negative.
        """
        positions = rows.positions + rows.step
        rotation = weights.rotary(positions[..., None], list(self.model_args.mrope_section))
        cos, sin = rotation[0].to(self.dtype).unbind(1)
        return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)

    def _experts(self, normed: Tensor, layer: LayerWeights, weights: StageWeights) -> Delta:
        kernels, parallel, sizes = self.kernels, self.parallel, weights.sizes
        if not replicas_share_experts(parallel):
            # T / N groups of ranks hold all experts: each takes its share of the rows.
            num_shares = parallel.tp_size // parallel.ep_size
            share = (parallel.tp_rank // parallel.ep_size, num_shares)
            routing = kernels.route(normed, layer, sizes, share)
            return self._add_over_ranks(kernels.experts(normed, layer, routing, sizes))
        group = parallel.groups.ep
        own = normed.chunk(parallel.tp_size)[parallel.tp_rank]
        gathered = own.new_empty(group.size() * len(own), sizes.hidden)
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        routing = kernels.route(gathered, layer, sizes, (0, 1))
        delta = kernels.experts(gathered, layer, routing, sizes)
        sums = kernels.whole(delta, sizes.hidden, self.dtype)
        result = torch.empty_like(own)
        dist.reduce_scatter_tensor(result, sums, group=group)
        if parallel.tp_size > 1:
            whole = torch.empty_like(normed)
            dist.all_gather_into_tensor(whole, result, group=parallel.groups.tp)
            result = whole
        return Delta(result[:, None], None)

    def _add_over_ranks(self, delta: Delta) -> Delta:
        if self.parallel.tp_size == 1:
            return delta
        total = self.kernels.whole(delta, self.model_args.hidden_size, self.dtype).contiguous()
        dist.all_reduce(total, group=self.parallel.groups.tp)
        return Delta(total[:, None], None)

    def _receive(self, rows: Rows) -> Tensor:
        x = torch.empty(
            len(rows.tokens),
            self.model_args.hidden_size,
            dtype=self.dtype,
            device=self.parallel.device,
        )
        dist.recv(x, self._peer(-1), group=self.parallel.groups.pp)
        return x

    def _peer(self, distance: int) -> int:
        """Global rank of this rank's peer so many stages on."""
        return dist.get_global_rank(self.parallel.groups.pp, self.parallel.pp_rank + distance)
