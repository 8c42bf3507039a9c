"""`[torchrun ...] -m checkpoint_tools.verify --hf_model DIR [--checkpoint DIR] [--adapter DIR]`: is
it the same model?

First tensor by tensor (bits of the checkpoint, names, shapes, types, padding, the adapter's own
records), then logits in fp32 on text, audio and image rows: our towers and Megatron decoder, read
from the checkpoint (or the folder) at the given layout, against transformers and peft (in memory on
the CPU, 4 bytes a parameter). Prints a table, names the first layer that parts; the exit status is
1 on any mismatch, 2 when there is nothing to compare. Without torchrun it is one process.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.command import parse_flags, refusals_in_one_line
from megatron_gkd import parallel as parallel_layout
from megatron_gkd.flags import setting
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.formats.sources import is_converted
from megatron_gkd.formats.torch_dist import find_checkpoint
from megatron_gkd.lora import apply_lora, as_student, as_teacher
from megatron_gkd.lora.adapter_sum import open_adapters
from megatron_gkd.lora.peft_folder import PeftAdapter, load_adapter
from megatron_gkd.media.towers import build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.verify.logits import Trace, compare, megatron_trace, transformers_trace
from megatron_gkd.verify.reference import load_peft, load_thinker
from megatron_gkd.verify.rows import Rows, make_rows
from megatron_gkd.verify.tensors import (
    Comparison,
    check_adapter,
    compare_checkpoint,
    compare_manifests,
    compare_merged,
)

_MOST_LINES = 20
_TIMEOUT = timedelta(
    hours=6
)  # the other ranks wait while rank 0 runs transformers' model on the CPU


@dataclass
class VerifyConfig:
    hf_model: str = field(metadata={"help": "Hugging Face folder of Qwen3-Omni: the reference."})
    checkpoint: str | None = setting(None, "Megatron checkpoint that should hold the same model.")
    adapter: str | None = setting(None, "PEFT adapter folder.")
    merged: str | None = setting(
        None, "Hugging Face folder that should be --hf_model with --adapter added."
    )
    quick: bool = setting(
        False, "Compare manifests, headers and small files only; no tensor is read."
    )
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    device: str = setting("auto", "auto, cuda or cpu.")
    tolerance: float = setting(1e-4, "Largest difference of a logit that passes.")
    tensor_tolerance: float = setting(
        0.0,
        "Largest difference of a weight that passes, in fp32, whatever the types. 0: the same bits.",
    )

    def __post_init__(self):
        for flag in ("tolerance", "tensor_tolerance"):
            if not getattr(self, flag) >= 0:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be 0 or more")
        if self.merged and not self.adapter:
            raise ValueError("--merged is compared with --hf_model and --adapter: name the adapter")
        if self.quick and (self.merged or self.tensor_tolerance):
            flag = "merged" if self.merged else "tensor_tolerance"
            raise ValueError(
                f"--{flag} needs the tensors, and --quick reads none: leave one of them out"
            )
        if self.quick and not (self.checkpoint or self.adapter):
            raise ValueError("--quick: there is nothing to compare, name --checkpoint or --adapter")


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


def verify_tensors(config: VerifyConfig) -> bool:
    """The part that needs no model. Prints; returns whether all is as it should be. Raises
    ValueError where --quick has nothing to compare.
    """
    hf_model, tolerance = Path(config.hf_model), config.tensor_tolerance
    bits = f"to {tolerance:g}" if tolerance else "bit by bit"
    found = []
    if config.checkpoint:
        checkpoint, what = Path(config.checkpoint), f"{config.checkpoint} to {hf_model}"
        if config.quick:
            found.append(
                _report(f"{what}, manifests", lambda: compare_manifests(hf_model, checkpoint))
            )
        else:
            find = lambda: compare_checkpoint(hf_model, checkpoint, tolerance)
            found.append(_report(f"{what}, tensors, {bits}", find))
    if config.adapter:
        found.append(
            _report(f"{config.adapter}, its records", lambda: check_adapter(Path(config.adapter)))
        )
    if config.merged:
        adapters = open_adapters([config.adapter], [], read_model_args(hf_model))
        find = lambda: compare_merged(hf_model, adapters, Path(config.merged), tolerance)
        found.append(_report(f"{config.merged} to base + adapter, tensors, {bits}", find))
    if config.quick and all(passed is None for passed in found):
        raise ValueError("--quick: there is nothing to compare, the adapter has no records")
    return all(passed is not False for passed in found)


def _report(what: str, compare_both: Callable[[], Comparison | None]) -> bool | None:
    """Print the outcome and what differs; None where there was nothing to compare."""
    try:
        comparison = compare_both()
    except (ValueError, FileNotFoundError) as error:
        comparison = Comparison([str(error)])
    if comparison is None:
        print(f"{what}: no records to compare with")
        return None
    problems = comparison.problems
    print(f"{what}: {f'{len(problems)} DIFFER' if problems else 'ok'}")
    for problem in problems[:_MOST_LINES]:
        print(f"  {problem}")
    if len(problems) > _MOST_LINES:
        print(f"  and {len(problems) - _MOST_LINES} more")
    for line in comparison.table():
        print(f"    {line}")
    return not problems


def expected_of_transformers(config: VerifyConfig) -> list[Expected]:
    """Of every model that the flags name, on every row."""
    model = load_thinker(config.hf_model)
    all_rows = make_rows(model.config)
    found = _expected(BASE, model, all_rows)
    if config.adapter:
        found += [replace(expected, model=ADAPTER_OFF) for expected in found]
        found += _expected(ADAPTER, load_peft(model, config.adapter).eval(), all_rows)
    if config.merged:
        del model
        found += _expected(MERGED, load_thinker(config.merged), all_rows)
    return found


def _expected(name: str, model, all_rows: list[Rows]) -> list[Expected]:
    traces = ((rows, *transformers_trace(model, rows)) for rows in all_rows)
    return [Expected(name, rows, positions, trace) for rows, trace, positions in traces]


def verify_logits(config: VerifyConfig, parallel) -> bool:
    """Every rank calls it, rank 0 prints. Returns on every rank whether all logits agree."""
    broadcast = [expected_of_transformers(config) if parallel.rank == 0 else None]
    torch.distributed.broadcast_object_list(broadcast)
    model_args = read_model_args(config.hf_model)
    if parallel.rank == 0:
        layout = f"TP {parallel.tp_size} PP {parallel.pp_size} DP {parallel.dp_size} EP {parallel.ep_size}"
        peft = " + peft" if config.adapter else ""
        print(f"Largest difference of a logit, Megatron ({layout}) to transformers{peft}, fp32:")
    all_passed, logits, models = True, {}, {}
    for expected in broadcast[0]:
        which = ADAPTER if expected.model == ADAPTER_OFF else expected.model
        if which not in models:
            models = {which: _megatron_model(which, config, model_args, parallel)}  # one at a time
        model = models[which]
        toggle = as_student if expected.model == ADAPTER else as_teacher
        with toggle(model):
            ours = megatron_trace(model, model_args, parallel, expected.rows, expected.positions)
        logits[expected.name] = ours.logits[expected.rows.real]
        line, passed = compare(
            expected.name, ours, expected.trace, expected.rows.real, config.tolerance
        )
        all_passed &= passed
        if parallel.rank == 0:
            print(line)
    if parallel.rank == 0:
        for what, model, other in (
            ("adapter", ADAPTER, BASE),
            ("merge's rounding", MERGED, ADAPTER),
        ):
            if f"{model}, text" in logits and f"{other}, text" in logits:
                rows = [name.split(", ")[1] for name in logits if name.startswith(f"{model}, ")]
                changes = [
                    (logits[f"{model}, {row}"] - logits[f"{other}, {row}"]).abs().max().item()
                    for row in rows
                ]
                print(f"  the {what} moves a logit by up to {max(changes):.1e}")
    return all_passed


def _megatron_model(name: str, config: VerifyConfig, model_args, parallel):
    """As read from the checkpoint where there is one (or from the merged folder), with LoRA for
    ADAPTER. The towers are those of `hf_model` where a checkpoint holds the decoder alone.
    """
    folder = config.merged if name == MERGED else config.checkpoint or config.hf_model
    # Torch's own attention and experts: Transformer Engine's attention has no fp32.
    model = build_decoder(
        model_args, parallel, torch.float32, attn_impl="sdpa", experts_impl="grouped_mm"
    )
    load_weights(model, model_args, parallel, folder)
    found = find_checkpoint(folder)
    if found:
        folder = found.parent if is_converted(found) else config.hf_model
    model.towers = build_towers(
        folder, model_args, parallel, torch.float32, audio=True, visual=True
    )
    if name == ADAPTER:
        adapter = PeftAdapter(config.adapter, model_args)
        settings = dict(
            rank=adapter.rank, alpha=adapter.alpha, dropout=0.0, targets=adapter.targets, seed=0
        )
        apply_lora(model, model_args, parallel, **settings, towers=bool(adapter.towers))
        load_adapter(model, model_args, parallel, adapter)
    return model.eval()


def verify(config: VerifyConfig) -> bool:
    """The whole comparison, on every rank. Raises ValueError where there is nothing to compare, or
    no such layout.
    """
    if config.quick:
        return verify_tensors(config) if os.environ.get("RANK", "0") == "0" else True
    parallel = parallel_layout.initialize(
        parallel_layout.resolve_device(config.device),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        timeout=_TIMEOUT,
    )
    passed = [verify_tensors(config) if parallel.rank == 0 else None]
    torch.distributed.broadcast_object_list(passed)
    try:
        return verify_logits(config, parallel) and passed[0]
    except (ValueError, FileNotFoundError) as error:
        if parallel.rank == 0:
            print(f"the logits cannot be compared: {error}")
        return False


def main() -> None:
    with refusals_in_one_line():
        config = parse_flags(VerifyConfig, __doc__)
        passed = verify(config)
    if torch.distributed.is_initialized():
        parallel_layout.destroy()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
