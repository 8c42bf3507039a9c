"""What stays equal: replicas and the base bit for bit; metrics with recompute, at any data-parallel
size and with deterministic kernels.
"""

import hashlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd import parallel, train
from megatron_gkd.train import main
from tests.ranks import run_ranks
from tests.test_train import flags_of_run, write_data
from tests.train_runs import arguments, layout_flags, read_lines, run_training, stable


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("train"))


def hashes(run) -> tuple[dict, dict]:
    """This rank's hashes: of the pieces of the adapter by what they are, of the frozen parameters
    by name.
    """
    from megatron_gkd.lora.adapter import adapter_slices

    def digest(tensor):
        return hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    trained = {
        (piece.stored.name, str(piece.stored.index)): digest(piece.view)
        for piece in adapter_slices(run.model, run.model_args, run.parallel)
    }
    return trained, {
        name: digest(value)
        for name, value in run.model.named_parameters()
        if not value.requires_grad
    }


def _watched(rank, world_size, argv):
    """A run, with `hashes` before and after, and the dtypes of what it trains."""
    from megatron_gkd import train

    train.destroy = lambda: None
    build, kept = train.build_run, {}

    def build_and_keep(*args):
        kept["run"] = build(*args)
        kept["before"] = hashes(kept["run"])
        return kept["run"]

    train.build_run = build_and_keep
    train.main(argv)
    return (
        kept["before"],
        hashes(kept["run"]),
        {str(p.dtype) for p in kept["run"].model.parameters() if p.requires_grad},
    )


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [
        pytest.param(4, 2, 1, 2, 1, marks=pytest.mark.extended),
        pytest.param(8, 4, 1, 8, 1, marks=pytest.mark.extended),
        pytest.param(4, 2, 2, 1, 1, marks=pytest.mark.extended),
        (4, 2, 1, 2, 2),
        pytest.param(8, 2, 2, 2, 2, marks=pytest.mark.extended),
    ],
)
def test_replicas_stay_equal_and_the_base_stays(data, tmp_path, world_size, tp, pp, ep, cp):
    """Twenty steps with dropout and on-policy text: every copy of an adapter weight has the same
    bits on all ranks that hold one; no frozen weight has changed.
    """
    flags = dict(
        max_steps=20,
        lora_dropout=0.2,
        learning_rate=0.01,
        torch_dtype="bfloat16",
        lmbda=0.2,
        max_completion_length=4,
    )
    flags |= dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=100,
        logging_steps=20,
        max_tokens_per_micro_batch=60,
    ) | layout_flags(tp, pp, ep, cp)
    results = run_ranks(_watched, world_size, flags_of_run(data, tmp_path, **flags))
    after, copies = {}, 0
    for (trained_before, frozen_before), (trained, frozen), dtypes in results:
        assert frozen == frozen_before and len(frozen) > 5 and dtypes == {"torch.float32"}
        assert not any(trained[name] == trained_before[name] for name in trained)
        for name, value in trained.items():
            copies += name in after
            assert after.setdefault(name, value) == value, name
    assert copies > 0


def test_recompute_trains_the_same(data, tmp_path):
    """With dropout and accumulation, at PP and TP: the same losses and gradient norms."""
    flags = dict(
        lora_dropout=0.2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_tokens_per_micro_batch=60,
        learning_rate=0.003,
    ) | layout_flags(tp=2, pp=2, ep=2)
    run_training(
        4,
        *[
            flags_of_run(data, tmp_path / name, recompute=name, **flags)
            for name in ("none", "full")
        ],
    )
    plain, recomputed = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("none", "full"))
    for line, expected in zip(recomputed, plain, strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key
    assert plain[0]["grad_norm"] > 0


def test_a_step_is_the_same_at_any_data_parallel_size_and_budget(data, tmp_path):
    """More rows than a step takes: step by step the same rows, whatever shares them and however
    they are cut; a budget below every row makes each a micro-batch.
    """
    runs = {(1, None): 1, (4, 30): 1, (1, 30): 3, (2, 1): 2}
    for (dp, budget), most in runs.items():
        flags = dict(per_device_train_batch_size=4 // dp, max_steps=5, learning_rate=0.003)
        flags |= dict(max_tokens_per_micro_batch=budget)
        output = tmp_path / f"{dp}-{budget}"
        run_training(dp, flags_of_run(data, output, adapter=data["adapter"], **flags))
        numbers = [line["micro_batches"] for line in read_lines(output / "metrics.jsonl")]
        assert max(numbers) == most and (budget != 1 or min(numbers) == most)
    first, *others = (
        read_lines(tmp_path / f"{dp}-{budget}" / "metrics.jsonl") for dp, budget in runs
    )
    assert len({line["num_tokens"] for line in first}) > 1
    assert all(line["padding"] == 0 for line in first)
    for lines in others:
        for line, expected in zip(lines, first, strict=True):
            for key in ("loss", "grad_norm", "num_tokens", "epoch"):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), key


WITHOUT_DETERMINISTIC_KERNEL = (
    *("put_", "histc", "bincount", "median", "kthvalue", "nll_loss", "grid_sampler", "ctc_loss"),
    *("scatter_reduce", "upsample", "max_unpool", "embedding_bag", "reflection_pad"),
    *("adaptive_", "fractional_max", "avg_pool3d"),
)
"""Of operations for which torch.use_deterministic_algorithms raises on CUDA, or names of families
of them; besides a cumsum of floating point."""


class RaisingOnCuda(TorchDispatchMode):
    """Collects the names of operations that would raise there."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(WITHOUT_DETERMINISTIC_KERNEL):
            self.names.add(name)
        if name.startswith("cumsum") and args[0].is_floating_point():
            self.names.add(f"{name} of {args[0].dtype}")
        return function(*args, **(kwargs or {}))


def train_deterministically(rank, world_size, argv):
    train.destroy = (
        parallel.parallel_state.destroy_model_parallel
    )  # the process group is the harness's to leave
    raising, step = RaisingOnCuda(), train.train_step

    def watched(run, batches):
        with raising:
            return step(run, batches)

    train.train_step = watched
    main(argv)
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        sorted(raising.names),
    )


def test_deterministic_kernels_train_the_same(data, tmp_path):
    """Other kernels under the same numbers, and no operation that has none on a GPU; that they give
    the same bits twice there is for tests/test_gpu.py.
    """
    flags = dict(
        model=data["model"],
        dataset=data["dataset"],
        max_steps=2,
        learning_rate=0.01,
        lmbda="0:0,1:1",
        max_completion_length=8,
        **layout_flags(2, 1, 2),
    )
    run_training(2, arguments(output_dir=tmp_path / "usual", **flags))
    modes = run_ranks(
        train_deterministically,
        2,
        arguments(output_dir=tmp_path / "same", deterministic=True, **flags),
    )
    assert modes == [(True, False, [])] * 2
    usual, same = (
        stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("usual", "same")
    )
    for line, other in zip(usual, same, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
