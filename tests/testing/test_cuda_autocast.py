"""CUDA's autocast where there is no GPU: which dtypes it gives, and on a CPU which numbers."""

import pytest
import torch
import torch.nn.functional as F

from cmt_fast import CMT
from cmt_fast.ops import autocast
from cmt_fast.testing.cuda_autocast import CudaAutocast
from cmt_fast.testing.shapes import SMALL_MODELS


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_dtypes(device):
    x, weight = torch.ones(3, 4, device=device), torch.nn.Parameter(torch.ones(5, 4, device=device))
    with CudaAutocast(torch.bfloat16) as mode:
        assert F.linear(x, weight).dtype == (x @ weight.t()).dtype == torch.bfloat16
        assert F.linear(x, weight).dtype == torch.bfloat16 and len(mode._parameters) == 1
        assert F.layer_norm(x.bfloat16(), (4,)).dtype == x.bfloat16().softmax(-1).dtype == torch.float32
        assert F.gelu(x).dtype == torch.float32 and autocast.autocast_dtype(x) == torch.bfloat16
        assert F.linear(x.double(), weight.double()).dtype == torch.float64
    assert autocast.autocast_dtype(x) is None and F.linear(x, weight).dtype == torch.float32


def test_parameters_are_converted_again_after_a_step():
    """A cache that outlived a forward pass would train on the first weights for ever."""
    x, weight, mode = torch.ones(1, 1), torch.nn.Parameter(torch.ones(1, 1)), CudaAutocast(torch.bfloat16)
    for value in (1.0, 2.0):
        weight.data.fill_(value)
        with mode:
            assert F.linear(x, weight).item() == value


def test_products_on_a_cpu_are_sums_in_float32_of_rounded_numbers():
    x, weight = torch.randn(64, 300, requires_grad=True), torch.nn.Parameter(torch.randn(7, 300))
    with CudaAutocast(torch.bfloat16):
        y = F.linear(x, weight)
    dy = torch.randn(64, 7).bfloat16()
    y.backward(dy)

    def rounded(t):
        return t.detach().bfloat16().float()

    assert torch.equal(y, (rounded(x) @ rounded(weight).t()).bfloat16())
    assert torch.equal(x.grad, rounded(dy.float() @ rounded(weight)))
    assert torch.equal(weight.grad, rounded(dy.float().t() @ rounded(x))) and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("low", [False, True])
def test_the_stream_is_that_of_the_kernels_trace(low):
    """Of the same model on the meta device, whose trace has a GPU's dtypes."""

    def dtypes(device):
        model, found = CMT(**SMALL_MODELS["aligned"]).to(device), []
        model.set_low_residual(low)
        for module in model.modules():
            module.register_forward_hook(lambda module, args, out: found.append(getattr(out, "dtype", None)))
        for stage in "abcd":
            for block in model.get_submodule(f"blocks_{stage}"):
                block.register_full_backward_hook(lambda module, grads, out: found.append(out[0].dtype))
        with CudaAutocast(torch.bfloat16):
            out = model(torch.zeros(2, 3, 64, 64, device=device))
        out.backward(torch.ones_like(out))
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return found

    on_cpu = dtypes("cpu")
    assert on_cpu == dtypes("meta")
    assert on_cpu[-1] == (torch.bfloat16 if low else torch.float32), "the gradient of the first block's output"
