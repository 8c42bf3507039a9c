"""The CPU layer: nothing on import; after `enable()` the CPU meaning of torch.cuda for
megatron-core, and GPUs as they are for everyone else.
"""

import importlib
import pkgutil
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.device_interface import get_interface_for_device

import megatron_gkd
from tests.believed_gpu import believe_in_a_gpu
from tests.ranks import run_ranks
from tests.train_runs import SMALL, arguments, make_rows, read_lines, write_rows

PATCHED = [
    (torch.cuda, name)
    for name in (
        "current_device",
        "set_device",
        "Stream",
        "Event",
        "stream",
        "synchronize",
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
    )
] + [
    (torch, "zeros"),
    (torch, "tensor"),
    (torch, "empty_like"),
    (torch.Tensor, "cuda"),
    (torch.Tensor, "type"),
]


def originals():
    return [getattr(owner, name) for owner, name in PATCHED]


def replaced() -> list[str]:
    """Names of PATCHED that hold something defined in this package."""
    package = str(
        Path(megatron_gkd.__file__).parent
    )  # the checkout, with torch in its .venv, may have that name too
    names = []
    for owner, name in PATCHED:
        value = getattr(owner, name)
        of_package = str(getattr(value, "__module__", None)).startswith("megatron_gkd")
        if (
            of_package
            or hasattr(value, "__code__")
            and value.__code__.co_filename.startswith(package)
        ):
            names.append(name)
    return names


def import_everything(rank, world_size):
    modules = [
        module.name for module in pkgutil.walk_packages(megatron_gkd.__path__, "megatron_gkd.")
    ]
    for name in modules:
        importlib.import_module(name)
    after_import = replaced()
    importlib.import_module("megatron_gkd.cpu").enable()
    return modules, after_import, replaced()


def test_import_changes_nothing():
    ((modules, after_import, after_enable),) = run_ranks(import_everything, 1)
    assert {"megatron_gkd.cpu", "megatron_gkd.train", "megatron_gkd.model.decoder"} <= set(modules)
    assert after_import == []
    assert set(after_enable) == {name for _, name in PATCHED}


def as_megatron(function):
    """The function as if a file of megatron-core had it."""
    return types.FunctionType(
        function.__code__, function.__globals__ | {"__name__": "megatron.core.somewhere"}
    )


def enable_and_look(rank, world_size):
    from megatron_gkd import cpu

    cpu.enable()
    once = originals()
    cpu.enable()
    assert all(old is new for old, new in zip(once, originals())), (
        "a second call must change nothing"
    )
    as_megatron(look)()
    return True


def look():
    cpu_device = torch.device("cpu")
    assert torch.cuda.current_device() == cpu_device
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0, 2.0], device=torch.device("cuda", 0)),
        torch.empty_like(torch.ones(2), device="cuda:1"),
    ]
    assert all(tensor.device == cpu_device for tensor in made)
    assert made[1].tolist() == [1.0, 2.0]
    with torch.device(
        "meta"
        # transformers builds models in it: were it blind to the factories, buffers would stay
        # uninitialised
    ):
        assert torch.arange(3).device.type == torch.empty(2).device.type == "meta"
    assert (
        torch.zeros(2, device="meta").device.type == "meta"
        and torch.zeros([2, 3], dtype=torch.int8).dtype == torch.int8
    )
    assert made[0].cuda() is made[0]
    assert (
        made[0].type() == "torch.cuda.FloatTensor"
        and made[0].bfloat16().type() == "torch.cuda.BFloat16Tensor"
    )
    assert made[0].type(torch.int64).dtype == torch.int64

    # the GPU's generator has a stand-in: what moves it leaves the CPU's where it is
    own = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(4)
    assert not torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), own)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        torch.cuda.Event(enable_timing=True).record()
    torch.cuda.synchronize()


def test_enable_gives_cuda_its_cpu_meaning():
    assert run_ranks(enable_and_look, 1) == [True]


def enable_beside_a_gpu(rank, world_size):
    from megatron_gkd import cpu

    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    before = originals()
    with pytest.raises(RuntimeError, match="already uses a GPU"):
        cpu.enable()
    return [name for (_, name), old, new in zip(PATCHED, before, originals()) if old is not new]


def test_a_process_that_uses_a_gpu_is_refused():
    assert run_ranks(enable_beside_a_gpu, 1) == [[]]


def train_beside_a_gpu(rank, world_size, argv):
    """A run with --device cpu where torch sees a GPU; then other code of the process asks."""
    from megatron_gkd import parallel, train

    started = believe_in_a_gpu()
    train.destroy = parallel.parallel_state.destroy_model_parallel
    train.main(argv)
    assert started == [], "the run has started CUDA"
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert isinstance(torch.cuda.Stream, type) and not isinstance(1, torch.cuda.Stream)
    assert torch.ones(1).type() == "torch.FloatTensor"
    for use in (lambda: torch.zeros(1, device="cuda"), torch.ones(1).cuda, torch.cuda.Stream):
        with pytest.raises((AssertionError, RuntimeError)):  # there is none after all
            use()
    compiler = get_interface_for_device("cuda").Worker  # what torch.compile asks at its first call
    assert compiler.get_device_properties().major == 9 and started
    with pytest.raises(RuntimeError, match="on the CPU in this process"):
        parallel.initialize(torch.device("cuda", 0))
    return True


def test_a_run_on_the_cpu_beside_a_gpu(tiny_folder, tmp_path):
    """An off-policy step, an on-policy one and a checkpoint."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    flags = dict(model=tiny_folder(**SMALL), dataset=rows, output_dir=tmp_path / "run")
    schedule = dict(max_steps=2, lmbda="0:0,1:1", max_completion_length=4)
    assert run_ranks(train_beside_a_gpu, 1, arguments(**flags, **schedule)) == [True]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["on_policy"] for line in lines] == [False, True]


def train_beside_gpu_kernels(rank, world_size, folder):
    """One step where megatron-core has found Transformer Engine: it has no kernels for a CPU."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils

    def for_gpus_only(*args, **kwargs):
        raise AssertionError("a kernel for GPUs was called")

    moe_utils.te_general_gemm = optimizer.Adam = for_gpus_only
    optimizer.USING_PYTORCH_OPTIMIZER = False
    clip_grads.multi_tensor_applier = clip_grads.l2_norm_impl = (
        clip_grads.multi_tensor_scale_impl
    ) = for_gpus_only

    from tests.adapters import make_batches
    from tests.lora_runs import (
        VOCAB_SIZE,
        build,
        in_reducer,
        initialize,
        make_optimizer,
        run_schedule,
    )

    place = initialize(1, 1, 1)
    _, model = build(place, folder, rank=4, alpha=8, targets=["q_proj", "down_proj"], seed=0)
    model = in_reducer(model.train())
    adam = make_optimizer(model, place)
    run_schedule(place, model, make_batches(VOCAB_SIZE)[:1])
    return adam.step(1e-3, 1.0)


def test_kernels_for_gpus_are_left_out(tiny_folder):
    from tests.lora_runs import FOLDERS

    (update,) = run_ranks(train_beside_gpu_kernels, 1, tiny_folder(**FOLDERS["4 KV heads"]))
    assert update.applied and update.grad_norm > 0
