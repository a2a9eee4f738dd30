"""Stem and patch embedding in training, in the interpreter: outputs, every gradient and every buffer against float64, and what autograd asks of them."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from expected import compared, expected_of
from layers import Adapter, draw, made, results
from mutation import mutate
from torch import Tensor, nn

import cmt_fast
from cmt_fast.modules import PatchEmbed, SyncBatchNorm
from cmt_fast.ops._triton import batch_norm
from cmt_fast.ops.activated_conv import train_configs, train_schema, triton_train_kernels, triton_train_launch
from cmt_fast.ops.activated_conv.api import activated_conv
from cmt_fast.ops.layer_norm.api import layer_norm
from cmt_fast.ops.layout import nhwc
from cmt_fast.testing.inputs import Case


class Stem(nn.Module):
    """As a CMT's: 3x3 with stride 2, GELU, BatchNorm, 3x3, GELU, BatchNorm, patch embedding."""

    def __init__(self, in_chans: int, channels: int, dim: int, bias: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels, 3, stride=2, padding=1, bias=bias)
        # Some of the few values of a channel lie all in GELU's tail: an eps bounds what divides them, and each has its own.
        self.norm1, self.norm2 = nn.BatchNorm2d(channels, eps=0.03), nn.BatchNorm2d(channels, eps=0.02)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.act, self.embed = nn.GELU(), PatchEmbed((0, 0), in_chans=channels, embed_dim=dim)
        self.embed.norm.eps = 0.01
        self.frozen = frozen

    def train(self, mode: bool = True) -> "Stem":
        super().train(mode)
        self.norm1.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = activated_conv(nhwc(self.conv1(x)), act=self.act, bn=self.norm1, conv=self.conv2)
        tokens, _ = self.embed(x.permute(0, 3, 1, 2), before=(self.act, self.norm2))
        return tokens


class Step(nn.Module):
    """GELU, BatchNorm and a convolution alone."""

    def __init__(self, channels: int, out: int, size: int = 3, **options) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels, eps=0.02), nn.Conv2d(channels, out, size, **options)

    def forward(self, x: Tensor) -> Tensor:
        return activated_conv(x, act=nn.functional.gelu, bn=self.bn, conv=self.conv)


class Norm(nn.Module):
    def __init__(self, channels: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm, self.dtype = nn.LayerNorm(channels, eps=1e-3), dtype

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.norm, self.dtype)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that there are several of them."""
    monkeypatch.setattr(train_configs, "ELEMENTS", 256)
    with cmt_fast.use_backend("triton"):
        yield


def stem(*shape: int, channels: int, dim: int, strided: bool = False, **options) -> Case:
    build = functools.partial(Stem, shape[1], channels, dim, **options)
    return Case("stem", f"{shape}, {channels}, {dim}", build, {"x": shape}, stateful=True, strided=strided)


def step(*shape: int, out: int, **options) -> Case:
    build = functools.partial(Step, shape[3], out, **options)
    return Case("activated_conv", f"{shape}, {out}, {options}", build, {"x": shape}, stateful=True)


def check(case: Case, dtype: str, training: bool, count: int) -> None:
    found = compared(case, dtype, training, expected_of(case, dtype, training))
    assert len(found) == count
    for result in found:
        assert result.passed, f"{case.name}, {dtype}: {result}"


# ---- against float64 -----------------------------------------------------------------------------------------------------

IN_STEM, IN_STEP, IN_NORM = 20, 9, 4  # output, gradients and buffers


@pytest.mark.parametrize("part", range(3))
def test_random_shapes(part, monkeypatch):
    generator = torch.Generator().manual_seed(part)
    for _ in range(10):
        monkeypatch.setattr(train_configs, "ELEMENTS", (256, 1024, 1024)[draw(generator, 0, 2)])
        size = draw(generator, 7, 12), draw(generator, 7, 12)
        sizes = dict(channels=draw(generator, 1, 20), dim=draw(generator, 3, 12), bias=draw(generator, 0, 3) > 0)
        case = stem(draw(generator, 1, 3), draw(generator, 1, 4), *size, **sizes, strided=draw(generator, 0, 3) == 0)
        dtype = ("float32", "float16", "autocast-float16")[draw(generator, 0, 2)]
        check(case, dtype, training=draw(generator, 0, 2) > 0, count=IN_STEM - 2 * (not sizes["bias"]))


@pytest.mark.parametrize("channels", [16, 38, 130])
def test_widths(channels):
    """Of the variants, and more channels than a tile has."""
    check(stem(1, 3, 8, 12, channels=channels, dim=10), "float16", training=True, count=IN_STEM)


@pytest.mark.parametrize(
    "options",
    [dict(size=1), dict(size=(3, 2), stride=(2, 1), padding=(1, 0)), dict(dilation=2, padding=2), dict(groups=3)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_any_convolution(options, training):
    check(step(2, 4, 5, 6, out=9, **options), "float32", training, IN_STEP)


@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (2, 1, 1, 5), (1, 1, 2, 5), (1, 9, 1, 5), (1, 1, 130, 2)], ids=str)
def test_few_values_and_thin_maps(shape):
    check(step(*shape, out=4, padding=1), "float32", training=True, count=IN_STEP)


def test_one_norm_frozen():
    check(stem(2, 3, 8, 9, channels=5, dim=6, frozen=True), "float32", training=True, count=IN_STEM)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 46), "float16"), ((40, 5), "float32"), ((2, 3, 4, 1), "float32")])
@pytest.mark.parametrize("low", [None, torch.float16], ids=str)
def test_layer_norm(shape, dtype, low):
    build = functools.partial(Norm, shape[-1], low)
    check(Case("layer_norm", str(shape), build, {"x": shape}), dtype, training=True, count=IN_NORM)


def test_large_means_do_not_cancel():
    """Channels whose values are far from 0 beside their spread: moments are merged, not sums of squares."""
    module, x = made(Step(6, 4), 2, 9, 10, 6)
    exact = copy.deepcopy(module).double()
    module(x + 1000.0)
    with cmt_fast.use_backend("reference"):
        exact((x + 1000.0).double())
    torch.testing.assert_close(module.bn.running_var.double(), exact.bn.running_var, rtol=1e-4, atol=0)


# ---- bit for bit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_run_repeats(dtype):
    module, x = made(Stem(3, 5, 6), 2, 3, 9, 8, dtype=dtype)
    expected, found = results(module, x), results(module, x)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


SUBSETS = (
    *([], ["bn.weight"], ["bn.bias"], ["conv.weight"], ["conv.bias"]),
    *(["bn.weight", "conv.weight"], ["conv.weight", "conv.bias"]),
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_subsets_of_gradients(training, needs_x):
    module, x = made(Step(3, 4), 2, 4, 4, 3)
    module.train(training)
    expected = results(module, x)
    for wanted in SUBSETS:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        found = results(module, x.detach().requires_grad_(needs_x))
        gradients = [*wanted, *(["x"] if needs_x else [])]
        assert found.keys() == {"output", *gradients, *dict(module.named_buffers())}
        for name in gradients:
            torch.testing.assert_close(found[name], expected[name])


def test_subsets_of_gradients_of_the_norm():
    module, x = made(Norm(5), 3, 5)
    expected = results(module, x)
    for wanted in ([], ["norm.weight"], ["norm.bias"]):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        found = results(module, x.requires_grad_(not wanted))
        assert found.keys() == {"output", *(wanted or ["x"])}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# ---- BatchNorm, as PyTorch has it ----------------------------------------------------------------------------------------


def against_reference(module: nn.Module, x: Tensor, steps: int = 2) -> None:
    """Buffers and outputs after some steps are those of the reference, to float32's rounding."""
    other = copy.deepcopy(module)
    for _ in range(steps):
        out = module(x)
        with cmt_fast.use_backend("reference"):
            torch.testing.assert_close(out, other(x))
    for (name, buffer), (_, wanted) in zip(module.named_buffers(), other.named_buffers()):
        torch.testing.assert_close(buffer, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_cumulative_average():
    module, x = made(Step(4, 3), 2, 4, 4, 4)
    module.bn.momentum = None
    against_reference(module, x, steps=3)


@pytest.mark.parametrize("training", [True, False])
def test_no_running_statistics_and_no_affine(training):
    module, x = made(Step(4, 3), 2, 4, 4, 4)
    module.bn = nn.BatchNorm2d(4, track_running_stats=False, affine=False)
    against_reference(module.train(training), x)
    results(module, x)
    norm = Norm(4)
    norm.norm = nn.LayerNorm(4, elementwise_affine=False)
    against_reference(norm, x)
    assert results(norm, x).keys() == {"output", "x"}


def test_one_value_a_channel_is_an_error_of_training_alone():
    module, x = made(Step(4, 3, padding=1), 1, 1, 1, 4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        module(x)
    against_reference(module.eval(), x)


def test_two_processes_with_one_batch_each(monkeypatch):
    """Both have the same: statistics and gradients are those of one, but the variance's share of the mean."""
    module, x = made(Step(4, 3), 2, 4, 4, 4)
    expected = results(module, x)
    synchronised = copy.deepcopy(module)
    synchronised.bn.__class__ = SyncBatchNorm
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.mul_(2))
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, own, group: out.copy_(own.repeat(2)))
    monkeypatch.setattr(SyncBatchNorm, "process_group", object())
    found = results(synchronised, x)
    n = x.numel() // 4
    momentum = module.bn.running_var * 0.9
    unbiased = (expected["bn.running_var"] - momentum) * ((n - 1) / n * (2 * n) / (2 * n - 1))
    expected["bn.running_var"] = momentum + unbiased
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


# ---- autograd, operators, torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Step(4, 3), Norm(4)], ids=["activated_conv", "layer_norm"])
def test_second_derivatives_are_refused(module):
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*use_backend\(\"reference\"\)"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_kept_for_the_backward_pass():
    """The image, what each convolution returned, and vectors."""
    module, x = made(Stem(3, 5, 6), 2, 3, 12, 16)
    known = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    image = x.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(image)
    pixels = 2 * 6 * 8
    assert sum(kept.values()) == image.numel() + 2 * 5 * pixels + 6 * (pixels // 4) + 2 * 6 * 5
    assert out.requires_grad


def test_compiles_into_one_graph():
    module, x = made(Stem(3, 4, 5), 2, 3, 8, 8)
    compiled = copy.deepcopy(module)
    compiled.forward = torch.compile(Stem.forward, fullgraph=True, backend="aot_eager").__get__(compiled)
    out, leaf = module(x.requires_grad_()), x.detach().clone().requires_grad_()
    again = compiled(leaf)
    out.square().sum().backward()
    again.square().sum().backward()
    pairs = [(out, again), (x.grad, leaf.grad), *zip(module.buffers(), compiled.buffers())]
    pairs += [(a.grad, b.grad) for a, b in zip(module.parameters(), compiled.parameters())]
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    x, grad = torch.randn(2, 2, 5, 3, 7).to(dtype).permute(0, 1, 3, 4, 2)
    n, s = torch.rand(6, 5), torch.rand(2, 5)
    calls = {
        "moments": [(x,)],
        "normalise": [(x, n)],
        "sums": [(grad, x, n, True), (grad, x, n, False)],
        "gradient": [(grad, x, n, s), (grad, x, n, None)],
    }
    for name, every in calls.items():
        for arguments in every:
            torch.library.opcheck(getattr(train_schema, name), arguments, test_utils=("test_schema", "test_faketensor"))


# ---- when it is chosen ---------------------------------------------------------------------------------------------------


STEP_REASONS = {
    "activation": (dict(act=torch.relu), "act must be the exact GELU, F.gelu or a plain nn.GELU, got"),
    "tanh": (dict(act=nn.GELU("tanh")), "act must be the exact GELU, F.gelu or a plain nn.GELU, got GELU"),
    "norm class": (dict(bn=nn.InstanceNorm2d(5)), "bn is a InstanceNorm2d, not a plain BatchNorm2d"),
    "norm width": (dict(bn=nn.BatchNorm2d(6)), "bn must have 5 channels, got 6"),
    "subclass": (dict(conv=Adapter(5, 6, 3)), "conv is a Adapter, not a plain Conv2d"),
    "padding": (dict(conv=nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect")), "conv must pad with zeros"),
    "same": (dict(conv=nn.Conv2d(5, 6, 3, padding="same")), "conv must pad with zeros, as many as two numbers say"),
    "dtype": (dict(conv=nn.Conv2d(5, 6, 3).half()), "x and the parameters must have one dtype"),
}


@pytest.mark.parametrize("name", STEP_REASONS)
def test_reasons(name):
    changes, message = STEP_REASONS[name]
    parts = dict(act=nn.GELU(), bn=nn.BatchNorm2d(5), conv=nn.Conv2d(5, 6, 3)) | changes
    with pytest.raises(cmt_fast.BackendError) as error:
        activated_conv(torch.randn(2, 4, 4, 5), **parts)
    assert message in str(error.value)


def test_reasons_of_the_call(monkeypatch):
    module = Step(5, 6)

    def message(call) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call()
        return str(error.value)

    assert "x holds no image" in message(lambda: module(torch.randn(0, 4, 4, 5)))
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(
        lambda: module(torch.randn(1, 4, 4, 5).double())
    )
    many = torch.empty(1).expand(1, 1 << 15, 1 << 15, 5)
    assert "x must have less than 2^30 pixels, got 1073741824" in message(lambda: module(many))
    with torch.autocast("cpu", torch.float16):
        found = message(lambda: module(torch.randn(1, 4, 4, 5)))
    assert "x must have the dtype that autocast gives the convolution, torch.float16, got torch.float32" in found
    norms = {
        "norm is a RMSNorm, not a plain LayerNorm": nn.RMSNorm(5),
        "norm must be LayerNorm(5) with a positive eps": nn.LayerNorm([4, 5]),
        "x and the parameters must have one dtype": nn.LayerNorm(5).half(),
    }
    for text, norm in norms.items():
        assert text in message(lambda norm=norm: layer_norm(torch.randn(2, 4, 5), norm))
    assert "x must hold something, got (2, 0, 5)" in message(lambda: layer_norm(torch.randn(2, 0, 5), nn.LayerNorm(5)))
    monkeypatch.setattr("cmt_fast.ops.layer_norm.fused.MAX_CHANNELS", 4)
    assert "x must have at most 4 channels, got 5" in message(lambda: layer_norm(torch.randn(2, 5), nn.LayerNorm(5)))


@pytest.fixture
def small(monkeypatch) -> cmt_fast.CMT:
    """A model without blocks."""
    monkeypatch.setattr(train_configs, "ELEMENTS", 1024)
    sizes = dict(img_size=32, num_classes=0, stem_channel=4, fc_dim=8)
    model = cmt_fast.CMT(embed_dims=(4,) * 4, num_heads=(1,) * 4, depths=(1,) * 4, mlp_ratios=(2,) * 4, **sizes)
    for stage in "abcd":
        setattr(model, f"blocks_{stage}", nn.ModuleList())
    cmt_fast.set_backend("auto")
    return model.eval()


def test_a_model_takes_them_and_calls_hooks(small):
    x, seen = torch.randn(1, 3, 32, 32), []
    calls = {("activated_conv", "triton"): 3, ("layer_norm", "triton"): 4}
    assert cmt_fast.explain(small, x).calls == calls
    expected, after_stem = small(x), small.forward_stem(x)
    hook = small.patch_embed_a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(small(x), expected)
    hook.remove()
    small.stem_norm3.register_forward_hook(lambda _, inputs, out: seen.append(out))
    calls |= {("activated_conv", "triton"): 2, ("activated_conv", "reference"): 1}
    assert cmt_fast.explain(small, x).calls == calls
    assert torch.equal(seen[0], after_stem) and len(seen) == 2
    torch.testing.assert_close(seen[1], after_stem)


@pytest.mark.parametrize("low", [False, True])
def test_the_residual_stream_has_its_dtype(low, small):
    small.set_low_residual(low)

    def run() -> Tensor:
        return small.forward_intermediates(torch.randn(1, 3, 32, 32), [0], stop_early=True)[0]

    with torch.autocast("cpu", torch.float16):
        ours = run()
        with cmt_fast.use_backend("reference"):
            assert ours.dtype == run().dtype
    assert ours.dtype == torch.float16 or not low


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "moments before GELU": ("value = gelu(tl.load(x + offset, inside, 0.0).to(tl.float32), EXACT)\n    count", "value = tl.load(x + offset, inside, 0.0).to(tl.float32)\n    count"),
    "moments of rows that are not there": ("tile_moments(value, row < rows, count)", "tile_moments(value, row >= 0, count)"),
    "every tile's count": ("tl.minimum(rows - program * BLOCK_N, BLOCK_N)", "BLOCK_N"),
    "not normalised": ("tl.store(t + offset, batch_norm(value, n, c, C)", "tl.store(t + offset, value"),
    "one tile's sums lost": ("out = partials + program.to(tl.int64) * (2 * C)", "out = partials + (program // 2).to(tl.int64) * (2 * C)"),
    "sums of no normal value": ("(value - mean[None, :]) * rstd[None, :]", "value"),
    "no GELU'": ("return slope * batch_norm_gradient(", "return batch_norm_gradient("),
    "BatchNorm' of x": ("batch_norm_gradient(grad, value, statistics", "batch_norm_gradient(grad, slope, statistics"),
}  # fmt: skip

PROBE = stem(2, 3, 13, 12, channels=9, dim=4)


@functools.cache
def expected_of_probe() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return expected_of(PROBE, "float32", training=True)


def failures(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    _, kernels = mutate(monkeypatch, tmp_path, [batch_norm, triton_train_kernels], old, new)
    for name in [name for name in vars(triton_train_launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_train_launch, name, getattr(kernels, name))
    return [str(result) for result in compared(PROBE, "float32", True, expected_of_probe()) if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, "row < rows, count", "row < rows, count") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, *MUTATIONS[name])
