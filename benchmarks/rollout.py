"""Tokens a second of a rollout against `transformers.generate` with peft: the same small model, the
same adapter on all linears, the same prompts, greedy, in turn.

    python -m benchmarks.rollout [--batches 1,8,32] [--tokens 128] [--prompt 32] [--rounds 3]
                                 [--experts 128] [--experts_per_token 8]
                                 [--device auto] [--dtype float32]

The small model is the one of checkpoint_tools.make_tiny_model (3 layers, random weights) with the
real model's router: 128 experts, of which a token takes 8. The column of equal tokens compares the
two texts; in float32 other texts end it with status 1. Peak memory is what a rollout takes above
what stood before it. For the real sizes: benchmarks.rollout_real.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
from peft import PeftModel
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from benchmarks.meter import Meter
from benchmarks.report import MIB, commit, machine, table
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.peft_config import peft_config
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.peft_writer import save_tensors
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.parallel import destroy, initialize, resolve_device
from megatron_gkd.rollout.engine import Engine, GenerationSettings
from megatron_gkd.rollout.generate import generate
from megatron_gkd.rollout.sampling import Sampling

RANK, ALPHA = 8, 16.0
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
Text = list[list[int]]


def write_adapter(folder: Path, model_folder: str) -> None:
    """A PEFT adapter on all linears with random matrices that matter."""
    model_args = read_model_args(model_folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator) * size[-1] ** -0.5
        for name, size in adapter_tensors(model_args, RANK, list(LINEARS)).items()
    }
    settings: dict[str, Any] = dict(rank=RANK, alpha=ALPHA, targets=list(LINEARS))
    folder.mkdir()
    save_tensors(tensors, folder, model_args.family, **settings)
    config = peft_config(model_args.family, **settings, dropout=0.0, base_model=model_folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Transformers:
    """transformers.generate with peft."""

    def __init__(self, folder: str, adapter: str, device: torch.device, dtype: torch.dtype):
        model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        self.model = PeftModel.from_pretrained(model, adapter).eval().to(device)
        self.device = device

    def write(self, prompts: Text, num_tokens: int) -> Text:
        ids = torch.tensor(prompts, device=self.device)
        written = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return written[:, ids.shape[1] :].tolist()


class Ours:
    """The training model."""

    def __init__(self, folder: str, adapter: str, device: torch.device, dtype: torch.dtype):
        self.parallel, self.model_args = initialize(device), read_model_args(folder)
        self.model = build_decoder(self.model_args, self.parallel, dtype)
        load_weights(self.model, self.model_args, self.parallel, folder)
        stored = PeftAdapter(adapter, self.model_args)
        settings: dict[str, Any] = dict(rank=stored.rank, alpha=stored.alpha, dropout=0.0)
        apply_lora(
            self.model, self.model_args, self.parallel, **settings, targets=stored.targets, seed=0
        )
        load_adapter(self.model, self.model_args, self.parallel, stored)
        self.engines: dict[int, Engine] = {}

    def write(self, prompts: Text, num_tokens: int) -> Text:
        if num_tokens not in self.engines:
            settings = GenerationSettings(
                sampling=GREEDY,
                max_new_tokens=num_tokens,
                stop_token_ids=(),
                pad_token_id=0,
                prefill_tokens=8192,
                cuda_graphs=True,
            )
            engine = Engine(self.model, self.model_args, self.parallel, settings)
            self.engines[num_tokens] = engine
        engine = self.engines[num_tokens]
        responses = generate(engine, prompts, seed=0, row_ids=range(len(prompts)))
        return [response.token_ids for response in responses]


def measure(
    engines: dict[str, "Transformers | Ours"],
    batch: int,
    arguments: argparse.Namespace,
    meter: Meter,
) -> list[str]:
    """The table's row for so many rows: the engines in turn, medians of the rounds."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(1000, (batch, arguments.prompt), generator=generator).tolist()
    runs = {
        name: functools.partial(engine.write, prompts, arguments.tokens)
        for name, engine in engines.items()
    }
    theirs, ours = (run() for run in runs.values())  # warm, too
    same = sum(a == b for x, y in zip(theirs, ours) for a, b in zip(x, y))
    taken = [[meter(run) for run in runs.values()] for _ in range(arguments.rounds)]
    results = [[statistics.median(x) for x in zip(*of_one)] for of_one in zip(*taken)]
    number = batch * arguments.tokens
    return [
        str(batch),
        *(f"{number / seconds:.0f}" for seconds, _ in results),
        f"{results[0][0] / results[1][0]:.1f}",
        *(f"{peak / MIB:.0f}" for _, peak in results),
        f"{same} of {number}",
    ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batches", default="1,8,32", help="rows of a rollout")
    add("--tokens", type=int, default=128, help="new tokens of a row")
    add("--prompt", type=int, default=32, help="tokens of a prompt")
    add("--experts", type=int, default=128)
    add("--experts_per_token", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    print(f"{machine(device.type)}; torch {torch.__version__}; commit {commit()}", flush=True)
    config = TinyModelConfig(
        thinker_only=True,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.experts_per_token,
    )
    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = build_folder(
            str(Path(work) / "model"),
            config,
        )
        adapter = Path(work) / "adapter"
        write_adapter(adapter, folder)
        engines = {
            name: engine(folder, str(adapter), device, dtype)
            for name, engine in (("transformers + peft", Transformers), ("this package", Ours))
        }
        for batch in map(int, arguments.batches.split(",")):
            rows.append(measure(engines, batch, arguments, Meter(device.type)))
            print(*rows[-1], flush=True)
            number = batch * arguments.tokens
            if dtype == torch.float32 and rows[-1][-1] != f"{number} of {number}":
                sys.exit(f"other texts than transformers': {rows[-1][-1]} tokens are equal")
    names = ["transformers + peft", "this package"]
    header = ["rows", *(f"{name}, tokens/s" for name in names), "ratio"]
    header += [*(f"{name}, peak MiB" for name in names), "equal tokens"]
    print(table(header, rows))
    destroy()


if __name__ == "__main__":
    main(sys.argv[1:])
