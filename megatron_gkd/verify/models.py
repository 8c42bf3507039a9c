"""transformers' model (and peft's around it) and ours, built from the folders that are compared:
the table of their differences.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.formats.loading import load_weights
from megatron_gkd.formats.sources import is_converted
from megatron_gkd.formats.torch_dist import find_torch_dist
from megatron_gkd.lora import apply_lora, as_student, as_teacher
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.lower_rank import approximate, write_files
from megatron_gkd.lora.peft_folder import PeftAdapter, merge_only_message
from megatron_gkd.lora_targets import ROUTER
from megatron_gkd.media.towers import build_towers
from megatron_gkd.model.args import ModelArgs, read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.parallel import Parallel
from megatron_gkd.verify.logits import Trace, compare, megatron_trace, transformers_trace
from megatron_gkd.verify.reference import load_model, load_peft
from megatron_gkd.verify.rows import Rows, make_rows
from megatron_gkd.verify.tensors import Folders

BASE, ADAPTER, ADAPTER_OFF, MERGED = "base", "base + adapter", "adapter off", "merged"


@dataclass(frozen=True)
class Expected:
    """What transformers makes of some rows; `model` is BASE, ADAPTER, ADAPTER_OFF or MERGED."""

    model: str
    rows: Rows
    positions: Tensor
    trace: Trace

    @property
    def name(self) -> str:
        return f"{self.model}, {self.rows.name}"


def expected_of_transformers(folders: Folders) -> list[Expected]:
    """What transformers gives for every model that the folders make up, on every row."""
    model = load_model(folders.hf_model)
    all_rows = make_rows(model.config)
    found = _expected(BASE, model, all_rows)
    if folders.adapter:
        found += [replace(expected, model=ADAPTER_OFF) for expected in found]
        with TemporaryDirectory() as rewritten:
            adapter = _for_peft(folders, Path(rewritten))
            found += _expected(ADAPTER, load_peft(model, adapter).eval(), all_rows)
    if folders.merged:
        del model
        found += _expected(MERGED, load_model(folders.merged), all_rows)
    return found


def _for_peft(folders: Folders, rewritten: Path) -> Path:
    """The adapter's folder, or `rewritten` with the same adapter where the installed peft would not
    find its linears, or read it in another way than the one that it was trained with.
    """
    assert folders.adapter is not None
    model_args = read_model_args(folders.hf_model)
    adapter = PeftAdapter(folders.adapter, model_args)
    if adapter.is_as_peft_writes_it:
        return folders.adapter
    same = approximate(adapter, model_args, adapter.rank)
    write_files(same, adapter, model_args, str(folders.hf_model), adapter.rank, rewritten)
    print(
        f"{folders.adapter}: its names, or its experts' LoRA, are of another program or of an "
        "earlier peft or transformers; rewritten for the installed ones"
    )
    return rewritten


def _expected(name: str, model: Any, all_rows: list[Rows]) -> list[Expected]:
    traces = ((rows, *transformers_trace(model, rows)) for rows in all_rows)
    return [Expected(name, rows, positions, trace) for rows, trace, positions in traces]


def report_logits(folders: Folders, tolerance: float, parallel: Parallel) -> bool:
    """Every rank calls it, rank 0 prints the table. Returns on every rank whether all logits agree.

    Collectives: a broadcast of what transformers makes of the rows, those of `megatron_trace`.
    """
    broadcast = [expected_of_transformers(folders) if parallel.rank == 0 else None]
    torch.distributed.broadcast_object_list(broadcast)
    all_expected: list[Expected] = broadcast[0] or []
    model_args = read_model_args(folders.hf_model)
    if parallel.rank == 0:
        layout = (
            f"TP {parallel.tp_size} PP {parallel.pp_size} "
            f"DP {parallel.dp_size} EP {parallel.ep_size}"
        )
        peft = " + peft" if folders.adapter else ""
        print(f"Largest difference of a logit, Megatron ({layout}) to transformers{peft}, fp32:")
    merges = folders.adapter and PeftAdapter(folders.adapter, model_args).merge_only
    all_passed = True
    logits: dict[str, Tensor] = {}
    models: dict[str, Any] = {}
    for expected in all_expected:
        which = expected.model
        if which == ADAPTER_OFF:
            which = BASE if merges else ADAPTER
        if which not in models:  # one at a time
            models = {which: _megatron_model(which, folders, model_args, parallel)}
        model = models[which]
        role = as_student if expected.model == ADAPTER else as_teacher
        with role(model):
            ours = megatron_trace(model, model_args, parallel, expected.rows, expected.positions)
        real = expected.rows.real
        logits[expected.name] = ours.logits[real]
        line, passed = compare(expected.name, ours, expected.trace, real, tolerance)
        all_passed &= passed
        if parallel.rank == 0:
            print(line)
    if parallel.rank == 0:
        for line in _changes(logits):
            print(line)
    return all_passed


def _changes(logits: dict[str, Tensor]) -> list[str]:
    """How much the adapter, and rounding its sum, moves our logits. `logits`: by Expected.name."""
    lines = []
    for what, model, other in (("adapter", ADAPTER, BASE), ("merge's rounding", MERGED, ADAPTER)):
        if f"{model}, text" in logits and f"{other}, text" in logits:
            rows = [name.split(", ")[1] for name in logits if name.startswith(f"{model}, ")]
            moved = [logits[f"{model}, {row}"] - logits[f"{other}, {row}"] for row in rows]
            largest = max(difference.abs().max().item() for difference in moved)
            lines.append(f"  the {what} moves a logit by up to {largest:.1e}")
    return lines


def _megatron_model(name: str, folders: Folders, model_args: ModelArgs, parallel: Parallel) -> Any:
    """As read from the checkpoint where there is one (or from the merged folder), with LoRA for
    ADAPTER. The towers are those of `hf_model` where a checkpoint holds the decoder alone.
    """
    folder = folders.checkpoint or folders.hf_model
    if name == MERGED and folders.merged:
        folder = folders.merged
    # Torch's own attention and experts: Transformer Engine's attention has no fp32.
    model = build_decoder(
        model_args, parallel, torch.float32, attn_impl="sdpa", experts_impl="grouped_mm"
    )
    load_weights(model, model_args, parallel, folder)
    found = find_torch_dist(folder)
    if found:
        folder = found.parent if is_converted(found) else folders.hf_model
    has_towers = bool(model_args.family.towers)
    model.towers = build_towers(
        folder, model_args, parallel, torch.float32, audio=has_towers, visual=has_towers
    )
    if name == ADAPTER and folders.adapter:
        adapter = PeftAdapter(folders.adapter, model_args)
        apply_lora(
            model,
            model_args,
            parallel,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=0.0,
            targets=adapter.targets,
            seed=0,
            towers=bool(adapter.towers),
        )
        load_adapter(model, model_args, parallel, adapter)
        _add_rest(model, adapter)
    return model.eval()


@torch.no_grad()
def _add_rest(model: Any, adapter: PeftAdapter) -> None:
    """Add the adapter's LoRA on linears that carry none beside them to this stage's fp32 weights:
    the router and the towers' ends. Raises ValueError for the embedding.
    """
    family = adapter.model_args.family
    routers = {
        f"{family.inner_roots[0]}layers.{layer.layer_number - 1}.{ROUTER}": layer.mlp.router.weight
        for layer in model.decoder.layers
    }
    in_towers = dict(model.towers.named_parameters()) if model.towers is not None else {}
    for linear in adapter.merge_only:
        if linear.endswith(".embed_tokens"):
            raise ValueError(merge_only_message(adapter, [linear]))
        weight = routers.get(linear, in_towers.get(f"{linear}.weight"))
        if weight is not None:
            root = f"{family.adapter_root}{linear}"
            (down, scale), (up, _) = (adapter.tensor(f"{root}.lora_{s}.weight") for s in "AB")
            change = scale * up.flatten(1) @ down.flatten(1)
            weight += change.view(weight.shape).to(weight.device)
