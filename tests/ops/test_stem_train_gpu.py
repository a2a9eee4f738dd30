"""Stem and first patch embedding in training on a GPU: the variants in every dtype against float64, layouts, bits that repeat, large offsets, torch.compile."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.activated_conv.api import activated_conv
from cmt_fast.ops.layer_norm.api import layer_norm
from cmt_fast.testing.inputs import Case
from cmt_fast.testing.precision import PRECISIONS, precision
from cmt_fast.testing.verification import verify_case

pytestmark = pytest.mark.gpu
LOW = [name for name in PRECISIONS if name != "float64"]


class Stem(nn.Module):
    """A variant up to its first block."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.model = cmt_fast.CMT(**VARIANTS[variant].config)
        self.model.prune_intermediate_layers([0])
        self.model.blocks_a = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def case(variant: str, *shape: int) -> Case:
    return Case("stem", f"{variant} {shape}", partial(Stem, variant), {"x": shape}, stateful=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype, training):
    size = VARIANTS[variant].resolution
    checks = verify_case(case(variant, 3, 3, size, size), precision(dtype), ["triton"], torch.device("cuda"), training)
    assert len(checks) == 27, "output, image, 16 parameters, 9 buffers"
    for found in checks:
        assert found.passed, found


@pytest.mark.parametrize("shape", [(128, 3, 224, 224), (5, 3, 45, 63)], ids=str)
def test_batches_and_odd_sizes(shape):
    for found in verify_case(
        case("cmt_s", *shape), precision("autocast-bfloat16"), ["triton"], torch.device("cuda"), True
    ):
        assert found.passed, found


def made(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    module, inputs = case("cmt_s", 64, 3, 224, 224).instance(precision("float32"), "cuda")
    return module.to(dtype).train(), inputs["x"].to(dtype)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a copy that trains one step."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with cmt_fast.use_backend("triton"):
        out = module(x)
    out.backward(torch.ones_like(out).cumsum(1))
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()]


def test_a_step_repeats_bit_for_bit_in_any_layout():
    torch.use_deterministic_algorithms(True)
    try:
        module, x = made(torch.bfloat16)
        expected = results(module, x)
        for again in (x, x.to(memory_format=torch.channels_last)):
            assert all(torch.equal(*pair) for pair in zip(results(module, again), expected))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 64, 2, 2)], ids=str
)
def test_convolutions_of_nhwc_maps_return_them(conv, dtype):
    """Forward and backward, as the traces count and as no kernel then copies."""
    conv = copy.deepcopy(conv).to("cuda", dtype)
    x = torch.randn(8, conv.in_channels, 64, 64, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    out = conv(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    around = (conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, (True, False, False))
    dx, _, _ = torch.ops.aten.convolution_backward.default(out, x, conv.weight, [conv.out_channels], *around)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_offsets_beyond_32_bits():
    """The last images of a batch of more than 2^31 elements are like the first."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    bn, conv = nn.BatchNorm2d(32).cuda().bfloat16().eval(), nn.Conv2d(32, 8, 2, stride=2).cuda().bfloat16()
    few = torch.randn(2, 112, 112, 32, device="cuda", dtype=torch.bfloat16)
    many = few.repeat(2700, 1, 1, 1).requires_grad_()
    assert many.numel() > 2**31
    with cmt_fast.use_backend("triton"):
        out = activated_conv(many, act=nn.GELU(), bn=bn, conv=conv)
        out.backward(torch.ones_like(out))
        assert torch.equal(out[:2], out[-2:]) and torch.equal(many.grad[:2], many.grad[-2:])
        norm = nn.LayerNorm(32).cuda().bfloat16()
        tokens = layer_norm(many.detach(), norm)
    assert torch.equal(tokens[:2], tokens[-2:])


def test_compiles_into_one_graph():
    module, x = made(torch.bfloat16)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True)
    for a, b in zip(results(module, x), results(compiled, x)):
        torch.testing.assert_close(a, b)
