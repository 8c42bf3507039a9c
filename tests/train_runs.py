"""The command line on test ranks: rows, arguments, `run_training`, and what the run left."""

import contextlib
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace

from tests.ranks import run_ranks

SMALL = dict(
    num_hidden_layers=2, hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=503
)
"""Of `tiny_folder`: 8 heads, 4 key/value heads, 8 experts; 503 is a prime."""


def make_rows(
    number: int,
    *,
    vocab_size: int = 503,
    seed: int = 0,
    with_teacher: bool = True,
    max_prompt: int = 9,
    max_response: int = 8,
) -> list[dict]:
    """Tokenised rows of different lengths; every third one has two trained spans."""
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randrange(vocab_size) for _ in range(draw.randint(low, high))]

    rows = []
    for index in range(number):
        prompt, response = ids(2, max_prompt), ids(1, max_response)
        row = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        if index % 3 == 2:
            gap, more = ids(1, 4), ids(1, 4)
            row = {
                "input_ids": row["input_ids"] + gap + more,
                "labels": row["labels"] + [-100] * len(gap) + more,
            }
        if with_teacher:
            row["teacher_input_ids"] = ids(3, 2 * max_prompt)
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(**flags) -> list[str]:
    """`--flag value` pairs over defaults that suit a test: fp32 on CPU, no dropout, no on-policy
    steps, every step logged.
    """
    defaults = dict(
        torch_dtype="float32",
        device="cpu",
        lora_dropout=0,
        lmbda=0,
        logging_steps=1,
        report_to="none",
    )
    return [
        word
        for name, value in (defaults | flags).items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


def layout_flags(tp: int = 1, pp: int = 1, ep: int = 1, cp: int = 1) -> dict[str, int]:
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        context_parallel_size=cp,
    )


def _train(rank: int, world_size: int, argument_lists: list[list[str]]) -> str:
    from megatron_gkd import parallel, train

    train.destroy = (
        parallel.parallel_state.destroy_model_parallel
    )  # the process group is the harness's to leave
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            for argv in argument_lists:
                train.main(argv)
    finally:
        print(said.getvalue(), end="", flush=True)
    return said.getvalue()


def run_training(world_size: int, *argument_lists: list[str]) -> str:
    """`megatron_gkd.train` once for each list of flags, on the same `world_size` gloo ranks: what
    rank 0 said.

    RuntimeError where a run exits with an error.
    """
    return run_ranks(_train, world_size, argument_lists)[0]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def stable(lines: list[dict]) -> list[dict]:
    """Without what no two runs share: times and memory."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith("_time") and key not in ("tokens_per_second", "peak_memory_gib")
        }
        for line in lines
    ]


def initialize(config):
    """Inside a rank: the groups of a run with these settings."""
    import torch

    from megatron_gkd.parallel import initialize

    sizes = config.parallel
    return initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
    )


def build_parts(
    argv: list[str],
    *,
    again: bool = False,
    audio: bool = False,
    visual: bool = False,
    bucket_bytes: int | None = None,
):
    """Inside a rank: what a run with these flags trains, and with what, but not its data. again: in
    the same groups; audio, visual: what the data would have; bucket_bytes: of the reduction of
    gradients, in place of the package's.
    """

    from megatron_gkd import adapters, build
    from megatron_gkd import parallel as layout
    from megatron_gkd.config import parse_config
    from megatron_gkd.gradients import in_gradient_reducer, smallest_bucket
    from megatron_gkd.model.args import read_model_args

    config = parse_config(argv)
    if again:
        layout.parallel_state.destroy_model_parallel()
    parallel = initialize(config)
    layout.seed_step(0, 0, parallel)
    model_args = read_model_args(config.model.model)
    config, adapter, _ = adapters.resolve(config, model_args, parallel, has_media=audio or visual)
    model = build.build_base(config, model_args, parallel, audio=audio, visual=visual)
    adapters.add_lora(model, config, model_args, parallel, adapter)
    adapters.add_teacher(model, config, model_args, parallel, None, None)
    size = smallest_bucket if bucket_bytes is None else lambda num_ranks: bucket_bytes
    ddp = in_gradient_reducer(model, size)
    return SimpleNamespace(
        parallel=parallel,
        model_args=model_args,
        model=model,
        ddp=ddp,
        optimizer=build.build_optimizer(config, ddp, parallel),
        loss=build.loss_settings(config, model_args),
    )
