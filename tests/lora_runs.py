"""Decoders with LoRA on test ranks: built from a small folder, run through megatron-core's
schedule, gradients reduced.

B rows, S positions, V vocabulary.
"""

import contextlib

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_gkd import parallel
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.modules import lm_head
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, activate
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.model.packed_rows import PackedRows
from megatron_gkd.model.transformer_config import DTYPES
from megatron_gkd.optimizer import Optimizer
from tests.packed import pack, padded

VOCAB_SIZE = 401
SIZES = dict(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    head_dim=16,
    num_experts=8,
    moe_intermediate_size=32,
)
FOLDERS = {
    "4 KV heads": dict(SIZES, vocab_size=VOCAB_SIZE),
    "2 KV heads, odd sizes": dict(
        SIZES,
        num_key_value_heads=2,
        head_dim=24,
        moe_intermediate_size=20,
        vocab_size=VOCAB_SIZE,
        thinker_only=True,
    ),
    "text": dict(SIZES, family="qwen3_moe", num_key_value_heads=2, vocab_size=VOCAB_SIZE),
}


def initialize(tp, pp, ep, cp=1):
    return parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        context_parallel_size=cp,
    )


def build(place, folder, adapter=None, *, dtype="float32", recompute=False, **lora):
    """(shape, decoder) with the folder's weights, and LoRA as `add_lora` takes it; without adapter
    and settings there is none.
    """
    model_args = read_model_args(folder)
    model = build_decoder(model_args, place, DTYPES[dtype], recompute=recompute)
    load_weights(model, model_args, place, folder)
    if adapter or lora:
        add_lora(place, model_args, model, adapter, **lora)
    return model_args, model


def add_lora(place, model_args, model, adapter=None, *, dropout=0.0, **lora):
    """LoRA on `model`: what the folder `adapter` holds, or as `lora` (rank, alpha, targets, seed)
    says, or both: the adapter continued.
    """
    if adapter:
        opened = PeftAdapter(adapter, model_args)
        lora = dict(rank=opened.rank, alpha=opened.alpha, targets=opened.targets, seed=0) | lora
    apply_lora(model, model_args, place, dropout=dropout, **lora)
    if adapter:
        load_adapter(model, model_args, place, opened)


def in_reducer(model):
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config=model.config, ddp_config=settings, module=model)


def make_optimizer(ddp, parallel):
    return Optimizer(
        ddp,
        parallel,
        dtype=torch.float32,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        weight_decay=0.01,
        max_grad_norm=1e9,
    )


def gather(tensor, group, dim):
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


def run_schedule(
    place, model, batches, *, backward=True, forward_slot=STUDENT, backward_slot=STUDENT
):
    """Logits [B, S, V_padded] of this rank's micro-batches (on the last stage) from `model`, a
    DistributedDataParallel that reads them packed; zero behind the end of a row.

    With `backward` the gradient of sum(logits * cotangent) / tokens is in `main_grad`, reduced over
    all ranks. `forward_slot` is active during each forward pass of this stage and, as another
    context, `backward_slot` from its end to the next forward pass: the time of the backward passes.
    """
    decoder, logits, until_next_forward = model.module, [], contextlib.ExitStack()
    views = [pack(batch.input_ids, batch.lengths, batch.position_ids, place) for batch in batches]

    def loss_of(hidden, batch, view):
        if place.tp_size > 1:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=place.groups.tp
            )
        local = padded(lm_head(decoder, hidden)[:, 0], view, batch.input_ids.shape[1])
        width = local.shape[-1]
        cotangent = torch.nn.functional.pad(
            batch.cotangent(VOCAB_SIZE), (0, width * place.tp_size - VOCAB_SIZE)
        )
        logits.append(gather(local.detach(), place.groups.tp, -1))
        loss = (local * cotangent[..., place.tp_rank * width : (place.tp_rank + 1) * width]).sum()
        return loss, batch.real.sum().int(), {}

    def step(iterator, model):
        batch, view = next(iterator)
        until_next_forward.close()
        with activate(decoder, forward_slot):
            rows = PackedRows(starts=view.starts)
            hidden = model(view.input_ids, view.position_ids, None, packed_seq_params=rows)

        def loss(output):
            with activate(decoder, forward_slot):
                return loss_of(output, batch, view)

        until_next_forward.enter_context(activate(decoder, backward_slot))
        return hidden, loss

    with until_next_forward:
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=zip(batches, views),
            model=[model],
            num_microbatches=len(batches),
            seq_length=views[0].size,
            micro_batch_size=1,
            forward_only=not backward,
        )
    return logits


def share(batches, place):
    """This DP rank's micro-batches: two of them at DP 1, one each at DP 2 and 4."""
    return batches[: max(2, place.dp_size)][place.dp_rank :: place.dp_size]
