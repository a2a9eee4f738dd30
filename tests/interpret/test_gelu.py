"""GELU and its derivative inside kernels, against float64."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cmt_fast.ops._triton.gelu import gelu, gelu_and_derivative


@pytest.mark.parametrize(("exact", "error", "slope_error"), [(True, 5e-7, 5e-7), (False, 3e-5, 2e-4)])
def test_errors_are_as_documented(exact, error, slope_error):
    @triton.jit
    def kernel(x, value, both, slope, EXACT: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        loaded = tl.load(x + i)
        tl.store(value + i, gelu(loaded, EXACT))
        y, dy = gelu_and_derivative(loaded, EXACT)
        tl.store(both + i, y)
        tl.store(slope + i, dy)

    x = torch.cat(
        [torch.linspace(-12, 12, 4080), torch.tensor([-1e30, -1e4, -100.0, -30.0, 30.0, 100.0, 1e4, 0.0] * 2)]
    )
    value, both, slope = (torch.empty_like(x) for _ in range(3))
    kernel[(len(x) // 1024,)](x, value, both, slope, exact, 1024)
    double = x.double().requires_grad_()
    expected = F.gelu(double)
    (expected_slope,) = torch.autograd.grad(expected.sum(), double)
    scale = expected.abs().clamp(min=1)
    assert torch.equal(value, both)
    assert ((value - expected).abs() / scale).max() < error
    assert (slope - expected_slope).abs().max() < slope_error
