"""The router's logits and their gradient against float64; the parts that go to the tensor cores;
which products CUDA runs, without one.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd.model.router import bfloat16_parts, input_gradient, logits_product, router_logits

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(7, 1, 48), (3, 2, 5), (0, 1, 8)], ids=str)
def test_value_and_gradient(dtype, shape):
    """The logits are an fp32 product's; the gradient is rounded once."""
    x = randn(*shape).to(dtype).requires_grad_()
    weight, upstream = randn(6, shape[-1], seed=1).to(dtype), randn(*shape[:-1], 6, seed=2)
    logits = router_logits(x, weight)
    assert logits.shape == (*shape[:-1], 6) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(logits, x, upstream)
    assert gradient.dtype == dtype
    wanted = upstream.double() @ weight.double()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def test_three_parts_are_the_number():
    """Exact over the range of gradients, so the product is that of the fp32 numbers."""
    x = randn(2000, 3) * torch.logspace(-25, 5, 2000)[:, None]
    parts = bfloat16_parts(x)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().unflatten(1, (3, 3)).sum(dim=1), x.double())
    weight = randn(3, 5, seed=1).to(torch.bfloat16).double()
    torch.testing.assert_close(
        parts.double() @ weight.repeat(3, 1), x.double() @ weight, rtol=1e-14, atol=0
    )


class Products(TorchDispatchMode):
    """The dtypes and sizes of the products, (input, other, result)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm:
            self.found.append([(x.dtype, tuple(x.shape)) for x in (*args[:2], result)])
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_cuda(dtype):
    """Tensors without data on a device that need not be there: the factors have 16 bits, the logits
    are fp32 and the input is not copied; so is the gradient's product in bfloat16.
    """
    with FakeTensorMode(), Products() as products:
        x = torch.empty(10, 32, dtype=dtype, device="cuda")
        weight = torch.empty(4, 32, dtype=dtype, device="cuda")
        logits = logits_product(x, weight)
        gradient = input_gradient(torch.empty_like(logits), weight, dtype)
    assert gradient.dtype == dtype and gradient.shape == x.shape
    assert products.found[0] == [(dtype, (10, 32)), (dtype, (32, 4)), (torch.float32, (10, 4))]
    if dtype == torch.bfloat16:
        expected = [(dtype, (10, 12)), (dtype, (12, 32)), (dtype, (10, 32))]
    else:
        expected = [(torch.float32, shape) for shape in ((10, 4), (4, 32), (10, 32))]
    assert products.found[1:] == [expected]


def test_what_is_kept():
    """The frozen weight, nothing of the input."""
    kept = []
    x, weight = randn(5, 1, 8).requires_grad_(), randn(3, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router_logits(x, weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_a_trained_router_is_refused():
    with pytest.raises(AssertionError, match="the router is frozen"):
        router_logits(randn(2, 4), randn(3, 4).requires_grad_())
