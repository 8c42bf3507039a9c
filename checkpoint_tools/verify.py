"""`[torchrun ...] -m checkpoint_tools.verify --hf_model DIR [--checkpoint DIR] [--adapter DIR]`: is it the same model?

First tensor by tensor (bits of the checkpoint, names, shapes, types, padding, the adapter's own records), then logits
in fp32 on text, audio and image rows: the Megatron decoder, read from the checkpoint (or the folder) at the given
layout, against transformers and peft. Prints a table, names the first layer that parts; the exit status is 1 on any
mismatch.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, Qwen3OmniMoeThinkerForConditionalGeneration

from checkpoint_tools.adapters import open_adapters
from checkpoint_tools.command import setting
from checkpoint_tools.thinker import load_peft
from checkpoint_tools.verify_logits import DecoderInput, Trace, compare, megatron_trace, transformers_trace
from checkpoint_tools.verify_rows import Rows, make_rows
from checkpoint_tools.verify_tensors import check_adapter, compare_checkpoint, compare_manifests, compare_merged
from megatron_gkd import parallel as parallel_layout
from megatron_gkd.forward import eval_mode
from megatron_gkd.lora import apply_lora, lora_enabled
from megatron_gkd.lora.peft_folder import PeftAdapter, load_adapter
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.model.shape import read_model_shape
from megatron_gkd.model.weights import load_weights

_MOST_LINES = 20


@dataclass
class VerifyConfig:
    hf_model: str = field(metadata={"help": "Hugging Face folder of Qwen3-Omni: the reference."})
    checkpoint: str | None = setting(None, "Megatron checkpoint that should hold the same model.")
    adapter: str | None = setting(None, "PEFT adapter folder.")
    merged: str | None = setting(None, "Hugging Face folder that should be --hf_model with --adapter added.")
    quick: bool = setting(False, "Compare manifests, headers and small files only; no tensor is read.")
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    device: str = setting("auto", "auto, cuda or cpu.")
    tolerance: float = setting(1e-4, "Largest difference of a logit that passes.")


@dataclass(frozen=True)
class Expected:
    """What transformers makes of some rows. `lora`: without adapter (None), with it, or with it switched off."""

    rows: Rows
    given: DecoderInput
    trace: Trace
    lora: bool | None = None

    @property
    def name(self) -> str:
        what = {None: "base", True: "base + adapter", False: "adapter off"}[self.lora]
        return f"{what}, {self.rows.name}"


def verify_tensors(config: VerifyConfig) -> bool:
    """The part that needs no model. Prints; returns whether all is as it should be."""
    hf_model, passed = Path(config.hf_model), True
    if config.checkpoint:
        compare_both = compare_manifests if config.quick else compare_checkpoint
        what = "manifests" if config.quick else "tensors, bit by bit"
        passed &= _report(
            f"{config.checkpoint} to {hf_model}, {what}", lambda: compare_both(hf_model, Path(config.checkpoint))
        )
    if config.adapter:
        passed &= _report(f"{config.adapter}, its records", lambda: check_adapter(Path(config.adapter)))
    if config.merged:
        adapters = open_adapters([config.adapter], [], read_model_shape(hf_model))
        passed &= _report(
            f"{config.merged}, base + adapter", lambda: compare_merged(hf_model, adapters, Path(config.merged))
        )
    return passed


def _report(what: str, find_problems) -> bool:
    try:
        problems = find_problems()
    except (ValueError, FileNotFoundError) as error:
        problems = [str(error)]
    print(f"{what}: {f'{len(problems)} DIFFER' if problems else 'ok'}")
    for problem in problems[:_MOST_LINES]:
        print(f"  {problem}")
    if len(problems) > _MOST_LINES:
        print(f"  and {len(problems) - _MOST_LINES} more")
    return not problems


def expected_of_transformers(config: VerifyConfig) -> list[Expected]:
    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(config.hf_model, dtype=torch.float32).eval()
    all_rows = make_rows(model.config)
    found = []
    for rows in all_rows:
        trace, given = transformers_trace(model, rows)
        found.append(Expected(rows, given, trace))
    if config.adapter:
        base_text = found[0]
        model = load_peft(model, config.adapter).eval()
        trace, given = transformers_trace(model, base_text.rows)
        found.append(Expected(base_text.rows, given, trace, lora=True))
        found.append(Expected(base_text.rows, base_text.given, base_text.trace, lora=False))
    return found


def verify_logits(config: VerifyConfig, parallel) -> bool:
    """Every rank calls it, rank 0 prints. Returns on every rank whether all logits agree."""
    broadcast = [expected_of_transformers(config) if parallel.rank == 0 else None]
    torch.distributed.broadcast_object_list(broadcast)
    shape = read_model_shape(config.hf_model)
    model = build_decoder(shape, parallel, torch.float32)
    load_weights(model, shape, parallel, config.checkpoint or config.hf_model)
    if parallel.rank == 0:
        layout = f"TP {parallel.tp_size} PP {parallel.pp_size} DP {parallel.dp_size} EP {parallel.ep_size}"
        peft = " + peft" if config.adapter else ""
        print(f"Largest difference of a logit, Megatron ({layout}) to transformers{peft}, fp32:")
    all_passed, logits = True, {}
    with eval_mode(model):
        for expected in broadcast[0]:
            if expected.lora:
                _add_adapter(model, shape, parallel, config.adapter)
            with lora_enabled(model, expected.lora is not False):
                ours = megatron_trace(model, shape, parallel, expected.rows, expected.given)
            logits[expected.name] = ours.logits
            line, passed = compare(expected.name, ours, expected.trace, expected.rows.real, config.tolerance)
            all_passed &= passed
            if parallel.rank == 0:
                print(line)
    if config.adapter and parallel.rank == 0:
        change = (logits["base + adapter, text"] - logits["base, text"]).abs().max().item()
        print(f"  the adapter moves a logit by up to {change:.2f}")
    return all_passed


def _add_adapter(model, shape, parallel, folder: str) -> None:
    adapter = PeftAdapter(folder, shape)
    settings = dict(rank=adapter.rank, alpha=adapter.alpha, dropout=0.0, targets=adapter.targets, seed=0)
    apply_lora(model, shape, parallel, **settings)
    load_adapter(model, shape, parallel, adapter)
    model.eval()


def verify(config: VerifyConfig) -> bool:
    """The whole comparison, on every rank."""
    if config.merged and not config.adapter:
        raise ValueError("--merged is compared with --hf_model and --adapter: name the adapter")
    parallel = parallel_layout.initialize(
        parallel_layout.resolve_device(config.device),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
    )
    passed = [verify_tensors(config) if parallel.rank == 0 else None]
    torch.distributed.broadcast_object_list(passed)
    if config.quick:
        return passed[0]
    try:
        return verify_logits(config, parallel) and passed[0]
    except (ValueError, FileNotFoundError) as error:
        if parallel.rank == 0:
            print(f"the logits cannot be compared: {error}")
        return False


def main() -> None:
    (config,) = HfArgumentParser(VerifyConfig, description=__doc__).parse_args_into_dataclasses()
    try:
        passed = verify(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"verify: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    parallel_layout.destroy()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
