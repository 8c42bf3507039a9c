"""QK-norm and rotary in one function: values and gradients against float64, in torch and in
Triton's interpreter, at odd sizes and for gradients of any strides; what it keeps; its kernels
compiled for an H100. Positions of media: tests/test_model_layers.py, tests/test_step_media.py.
"""

from typing import NamedTuple

import pytest
import torch

from megatron_gkd.model import norm_rotary, torch_norm_rotary
from tests.processes import in_a_process

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-3  # large enough to be seen


class Case(NamedTuple):
    length: int
    batch: int
    groups: int
    queries: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    is_strided: bool = False  # upstream gradients as attention may hand them back


CASES = {
    "real heads": Case(19, 1, 1, 4, 128),
    "several groups and rows": Case(7, 3, 2, 3, 20),
    "head size 2": Case(4, 2, 1, 1, 2),
    "head size 96": Case(16, 1, 2, 1, 96, is_strided=True),
    "strided": Case(17, 2, 3, 2, 12, is_strided=True),
    "bfloat16": Case(21, 1, 2, 2, 64, torch.bfloat16),
    "bfloat16, strided": Case(5, 2, 1, 3, 24, torch.bfloat16, is_strided=True),
    "float16": Case(9, 1, 1, 2, 32, torch.float16),
    "no position": Case(0, 1, 2, 2, 8),
}


def make(case: Case):
    """(qkv, weights of q and k, rotation, gradients of the three results)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(case.dtype)

    length, batch, groups, queries, head_dim, *_ = case
    qkv = randn(length, batch, groups * (queries + 2) * head_dim)
    qkv[: length // 3] *= 1e-2  # where eps counts
    q_weight, k_weight = 1 + 0.3 * randn(head_dim), 1 + 0.3 * randn(head_dim)
    angles = 500 * torch.rand(length, batch, head_dim // 2, generator=generator)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=2)
    upstream = []
    for heads in (groups * queries, groups, groups):
        gradient = randn(length, batch, heads, head_dim)
        if case.is_strided:  # sequence and heads change places, channels two apart
            wide = randn(heads, batch, length, 2 * head_dim)
            wide[..., ::2] = gradient.transpose(0, 2)
            gradient = wide[..., ::2].transpose(0, 2)
        upstream.append(gradient)
    return qkv, q_weight, k_weight, rotation, upstream


def plain(qkv, q_weight, k_weight, rotation, groups, eps):
    """The formulas of norm_rotary.py in float64, step by step."""
    head_dim = len(q_weight)
    heads = qkv.unflatten(2, (groups, -1, head_dim))
    cos, sin = rotation.double()[:, :, :, None].unbind(2)

    def normed_rotated(x, weight):
        x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    query = normed_rotated(heads[..., :-2, :].flatten(2, 3), q_weight)
    return query, normed_rotated(heads[..., -2, :], k_weight), heads[..., -1, :]


def results(function, qkv, q_weight, k_weight, rotation, upstream, groups):
    """The three results and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    found = function(qkv, q_weight, k_weight, rotation, groups, EPS)
    (gradient,) = torch.autograd.grad(found, qkv, [g.to(found[0].dtype) for g in upstream])
    return [x.detach().cpu() for x in (*found, gradient)]


def with_triton():
    """Of every case, through the Triton kernels."""
    from megatron_gkd.model import triton_norm_rotary

    norm_rotary.select_kernels = lambda device: triton_norm_rotary
    found = {}
    for name, case in CASES.items():
        *tensors, upstream = make(case)
        tensors = [x.to(DEVICE) for x in tensors]
        upstream = [x.to(DEVICE) for x in upstream]
        found[name] = results(norm_rotary.norm_rotary, *tensors, upstream, case.groups)
    return found


@pytest.fixture(scope="module")
def triton_results():
    return in_a_process(with_triton, interpret_triton=not CUDA)


def check(name, found):
    case = CASES[name]
    qkv, *tensors, upstream = make(case)
    expected = results(plain, qkv.double(), *tensors, upstream, case.groups)
    epsilon = torch.finfo(case.dtype).eps
    for value, wanted in zip(found, expected):
        assert value.shape == wanted.shape and value.dtype == case.dtype
        largest = wanted.abs().amax(dim=-1, keepdim=True) if wanted.numel() else wanted
        # one rounding of the result where that is coarser than fp32
        allowed = largest * max(epsilon / 2, 4e-6) + wanted.abs() * epsilon
        assert ((value.double() - wanted).abs() <= allowed).all(), name


@pytest.mark.parametrize("name", CASES)
def test_torch(name):
    *tensors, upstream = make(CASES[name])
    check(name, results(norm_rotary.norm_rotary, *tensors, upstream, CASES[name].groups))


@pytest.mark.parametrize("name", CASES)
def test_triton(triton_results, name):
    check(name, triton_results[name])


def test_gradcheck():
    """Numerical derivatives in float64, with norms of some size."""
    case = Case(3, 2, 2, 2, 6)
    qkv, q_weight, k_weight, rotation, _ = make(case)

    def function(qkv):
        return norm_rotary.norm_rotary(
            qkv, q_weight.double(), k_weight.double(), rotation, case.groups, EPS
        )

    assert torch.autograd.gradcheck(function, qkv.double().requires_grad_())


def test_what_is_kept():
    """The projection alone, which v is a part of, beside the rotation of all layers and the frozen
    weights.
    """
    qkv, q_weight, k_weight, rotation, _ = make(CASES["strided"])
    qkv.requires_grad_()
    kept = set()

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = norm_rotary.norm_rotary(qkv, q_weight, k_weight, rotation, 3, EPS)
    assert kept == {x.untyped_storage().data_ptr() for x in (qkv, q_weight, k_weight, rotation)}
    assert found[2].untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert found[0].is_contiguous() and found[1].is_contiguous()


def test_trained_norms_are_refused():
    qkv, q_weight, k_weight, rotation, _ = make(CASES["strided"])
    with pytest.raises(AssertionError, match="the norms are frozen"):
        norm_rotary.norm_rotary(qkv, q_weight, k_weight.requires_grad_(), rotation, 3, EPS)


def test_kernels_are_chosen_by_device():
    pytest.importorskip("triton")
    from megatron_gkd.model import triton_norm_rotary

    assert norm_rotary.select_kernels(torch.device("cpu")) is torch_norm_rotary
    assert norm_rotary.select_kernels(torch.device("cuda")) is triton_norm_rotary


def compiled():
    """(name, bytes of shared memory, PTX) of the launches of a forward and a backward at the 30B's
    sizes, at TP 8, for compute capability 9.0.
    """
    from megatron_gkd.model import triton_norm_rotary
    from tests.triton_launches import compile_launch, recorded_launches

    norm_rotary.select_kernels = lambda device: triton_norm_rotary
    found = []
    case = Case(4096, 1, 1, 4, 128, torch.bfloat16)
    *tensors, upstream = make(case)
    with recorded_launches() as launches:
        results(norm_rotary.norm_rotary, *tensors, upstream, case.groups)
    for launch in launches:
        kernel = compile_launch(launch)
        found.append((launch.function.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
    return found


def test_one_launch_each_way_compiled_for_sm_90():
    """Heads are read and written in 16 bytes a thread in bfloat16."""
    found = in_a_process(compiled)
    assert [name for name, _, _ in found] == ["forward_kernel", "gradient_kernel"]
    for name, shared, ptx in found:
        assert shared <= 16_384, name
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx, name
