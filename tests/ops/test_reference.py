"""The reference operations against hand-computed values, independent formulations and fp64 gradients."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmt_fast import CMT, functional, use_backend

DOUBLE = dict(dtype=torch.float64)
few = settings(max_examples=15, deadline=None)
sides = st.integers(1, 9)


@pytest.fixture(autouse=True)
def _reference():
    torch.manual_seed(0)
    with use_backend("reference"):
        yield


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, **DOUBLE, requires_grad=grad)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic of ``module`` a value that the result depends on."""
    module.double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_()
    for name, tensor in module.named_buffers():
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2.0)
    return module


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def batch_norm(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """(B, H, W, C), channels last; statistics of the batch in training."""
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        mean = x.mean((0, 1, 2))
        var = ((x - mean) ** 2).mean((0, 1, 2))
    return (x - mean) / torch.sqrt(var + bn.eps) * bn.weight + bn.bias


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias


def shifted_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise 3x3 of (B, H, W, C) as nine shifted products over a map padded with zeros."""
    H, W = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    y = sum(padded[:, i : i + H, j : j + W] * weight[:, 0, i, j] for i in range(3) for j in range(3))
    return y if bias is None else y + bias


def blocked_reduce(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise k x k, stride k, of (B, H, W, C): a weighted sum over the pixels of each k x k block."""
    k, (H, W) = weight.shape[-1], x.shape[1:3]
    x = x[:, : H // k * k, : W // k * k]
    blocks = x.unflatten(1, (-1, k)).unflatten(3, (-1, k))  # (B, H/k, k, W/k, k, C)
    y = torch.einsum("bhiwjc,cij->bhwc", blocks, weight[:, 0])
    return y if bias is None else y + bias


def einsum_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = scale * torch.einsum("bhnd,bhmd->bhnm", q, k)
    if bias is not None:
        logits = logits + bias
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


# ---- depthwise convolutions --------------------------------------------------------------------------------------------


def test_conv3x3_of_one_pixel_is_the_centre_tap():
    x, weight, bias = randn(2, 1, 1, 3), randn(3, 1, 3, 3), randn(3)
    close(functional.depthwise_conv3x3(x, weight, bias), x * weight[:, 0, 1, 1] + bias)


def test_conv3x3_is_a_correlation_with_zero_padding():
    """A single tap at the upper left reads the pixel above and to the left; outside is zero."""
    x = torch.arange(1.0, 7.0).view(1, 2, 3, 1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 0] = 1
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]).view(1, 2, 3, 1)
    close(functional.depthwise_conv3x3(x, weight), wanted)


def test_conv3x3_of_ones_counts_neighbours():
    wanted = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]).view(1, 3, 3, 1)
    close(functional.depthwise_conv3x3(torch.ones(1, 3, 3, 1), torch.ones(1, 1, 3, 3)), wanted)


def test_conv3x3_shortcut_is_a_centre_tap_one_larger():
    x, weight, bias = randn(2, 4, 5, 3), randn(3, 1, 3, 3), randn(3)
    larger = weight.clone()
    larger[:, 0, 1, 1] += 1
    close(functional.depthwise_conv3x3(x, weight, bias, shortcut=True), functional.depthwise_conv3x3(x, larger, bias))


@given(batch=st.integers(1, 3), height=sides, width=sides, channels=sides, shortcut=st.booleans(), biased=st.booleans())
@few
def test_conv3x3_any_size(batch, height, width, channels, shortcut, biased):
    x, weight = randn(batch, height, width, channels), randn(channels, 1, 3, 3)
    bias = randn(channels) if biased else None
    found = functional.depthwise_conv3x3(x, weight, bias, shortcut=shortcut)
    wanted = shifted_conv3x3(x, weight, bias)
    close(found, wanted + x if shortcut else wanted)
    plain = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=1, groups=channels)
    close(found, plain.permute(0, 2, 3, 1) + x if shortcut else plain.permute(0, 2, 3, 1))


def test_reduce_by_hand():
    """2 x 2 blocks of 1 .. 8 with taps 1, 10, 100, 1000; the odd last column is not read."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0], [5.0, 6.0, 7.0, 8.0, 9.0]]).view(1, 2, 5, 1)
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 2, 2)
    wanted = torch.tensor([6521.0, 8743.0]).view(1, 1, 2, 1) + 0.5
    close(functional.depthwise_reduce(x, weight, torch.tensor([0.5])), wanted)


def test_reduce_by_one_scales():
    x, weight, bias = randn(2, 3, 4, 5), randn(5, 1, 1, 1), randn(5)
    close(functional.depthwise_reduce(x, weight, bias), x * weight.flatten() + bias)


@given(k=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), more=st.integers(0, 3), channels=sides)
@few
def test_reduce_any_size(k, rows, columns, more, channels):
    extra = min(more, k - 1)
    x, weight, bias = randn(2, rows * k + extra, columns * k, channels), randn(channels, 1, k, k), randn(channels)
    found = functional.depthwise_reduce(x, weight, bias)
    assert found.shape == (2, rows, columns, channels)
    close(found, blocked_reduce(x, weight, bias))


@pytest.mark.parametrize("shortcut", [False, True])
def test_gradcheck_conv3x3(shortcut):
    operation = partial(functional.depthwise_conv3x3, shortcut=shortcut)
    assert gradcheck(operation, (randn(2, 3, 2, 2, grad=True), randn(2, 1, 3, 3, grad=True), randn(2, grad=True)))


def test_gradcheck_reduce():
    inputs = randn(2, 5, 4, 2, grad=True), randn(2, 1, 2, 2, grad=True), randn(2, grad=True)
    assert gradcheck(functional.depthwise_reduce, inputs)


# ---- attention with few keys -------------------------------------------------------------------------------------------


def test_zero_queries_average_the_values():
    k, v = randn(2, 3, 5, 4), randn(2, 3, 5, 6)
    found = functional.reduced_kv_attention(torch.zeros(2, 3, 7, 4, **DOUBLE), k, v)
    close(found, v.mean(2, keepdim=True).expand(2, 3, 7, 6))


def test_bias_chooses_the_key():
    """A bias far above the logits makes query n read key n % M alone, whatever the image."""
    q, k, v = randn(2, 1, 6, 4), randn(2, 1, 3, 4), randn(2, 1, 3, 4)
    chosen = torch.arange(6) % 3
    bias = F.one_hot(chosen, 3).to(**DOUBLE)[None] * 1e4
    close(functional.reduced_kv_attention(q, k, v, bias), v[:, :, chosen])


def test_a_bias_equal_for_all_keys_changes_nothing():
    q, k, v, bias = randn(2, 3, 5, 4), randn(2, 3, 6, 4), randn(2, 3, 6, 4), randn(3, 5, 6)
    shifted = bias + randn(3, 5, 1)
    close(functional.reduced_kv_attention(q, k, v, bias), functional.reduced_kv_attention(q, k, v, shifted))


def test_a_key_bias_drops_out():
    """Adding one vector to every key shifts a query's logits equally: the k projection's bias has no effect."""
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 6, 4), randn(2, 3, 6, 4)
    close(functional.reduced_kv_attention(q, k, v), functional.reduced_kv_attention(q, k + randn(1, 3, 1, 4), v))


def test_two_keys_by_hand():
    """Logits 0 and ln 3 give the weights 1/4 and 3/4; the default scale is d_qk^-0.5."""
    q = torch.full((1, 1, 1, 4), math.log(3.0) / 2, **DOUBLE)
    k = torch.stack([torch.zeros(4, **DOUBLE), torch.ones(4, **DOUBLE)]).view(1, 1, 2, 4)
    v = torch.tensor([[8.0, 0.0], [0.0, 4.0]], **DOUBLE).view(1, 1, 2, 2)
    close(functional.reduced_kv_attention(q, k, v), torch.tensor([2.0, 3.0], **DOUBLE).view(1, 1, 1, 2))


def test_large_logits_do_not_overflow():
    q = torch.tensor([1e4, -1e4]).view(1, 1, 2, 1)
    k = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    v = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
    close(functional.reduced_kv_attention(q, k, v, scale=1.0), v)


@given(
    heads=st.integers(1, 3),
    queries=sides,
    keys=sides,
    d_qk=sides,
    d_v=sides,
    biased=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
@few
def test_attention_any_size(heads, queries, keys, d_qk, d_v, biased, scale):
    q, k, v = randn(2, heads, queries, d_qk), randn(2, heads, keys, d_qk), randn(2, heads, keys, d_v)
    bias = randn(heads, queries, keys) if biased else None
    found = functional.reduced_kv_attention(q, k, v, bias, scale=scale)
    close(found, einsum_attention(q, k, v, bias, d_qk**-0.5 if scale is None else scale))
    mask = None if bias is None else bias.expand(2, heads, queries, keys)
    close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))


@pytest.mark.parametrize(("keys", "d_qk", "d_v"), [(3, 2, 4), (1, 3, 2), (4, 4, 4)])
def test_gradcheck_attention(keys, d_qk, d_v):
    inputs = (
        randn(2, 2, 5, d_qk, grad=True),
        randn(2, 2, keys, d_qk, grad=True),
        randn(2, 2, keys, d_v, grad=True),
        randn(2, 5, keys, grad=True),
    )
    assert gradcheck(functional.reduced_kv_attention, inputs)


def test_attention_gradients_are_those_of_the_derivation():
    """docs/math.md, section 4: ds = p (dp - sum dp p), and the bias gradient is its sum over the batch."""
    q, k, v = randn(3, 2, 5, 4, grad=True), randn(3, 2, 6, 4, grad=True), randn(3, 2, 6, 3, grad=True)
    bias, do, scale = randn(2, 5, 6, grad=True), randn(3, 2, 5, 3), 0.4
    functional.reduced_kv_attention(q, k, v, bias, scale=scale).backward(do)
    with torch.no_grad():
        p = (scale * q @ k.mT + bias).softmax(-1)
        dp = do @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        close((dp * p).sum(-1), (do * (p @ v)).sum(-1))  # the row sum that a kernel takes from the output
    close(q.grad, scale * ds @ k)
    close(k.grad, scale * ds.mT @ q)
    close(v.grad, p.mT @ do)
    close(bias.grad, ds.sum(0))
    close(bias.grad.sum(-1), torch.zeros(2, 5, **DOUBLE))


def test_dropout_of_the_weights():
    """Kept weights are divided by 1 - p, so with v = 1 an output is a sum of kept weights, and 1 on average."""
    q, k, v = randn(2, 4, 500, 8), randn(2, 4, 40, 8), torch.ones(2, 4, 40, 1, **DOUBLE)
    kept = functional.reduced_kv_attention(q, k, v, dropout_p=0.5)
    assert kept.std() > 0.05
    assert abs(kept.mean() - 1) < 0.02
    close(functional.reduced_kv_attention(q, k, v), torch.ones(2, 4, 500, 1, **DOUBLE))


# ---- resizing the position bias ----------------------------------------------------------------------------------------


def bicubic_matrix(old: int, new: int) -> Tensor:
    """(new, old) weights of bicubic interpolation: Keys' kernel with a = -0.75, half-pixel centres, clamped borders."""
    a = -0.75
    matrix = torch.zeros(new, old, **DOUBLE)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


def grid_matrix(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same for a flattened grid: the Kronecker product of rows and columns."""
    return torch.kron(bicubic_matrix(old[0], new[0]), bicubic_matrix(old[1], new[1]))


grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(old_q=grids, old_k=grids, new_q=grids, new_k=grids)
@few
def test_resize_is_two_matrices(old_q, old_k, new_q, new_k):
    """B' = A_q B A_k^T (docs/math.md, section 9): separable, linear, and of rank at most the old number of keys."""
    bias = randn(2, math.prod(old_q), math.prod(old_k))
    found = functional.resize_relative_pos(bias, old_q, old_k, new_q, new_k)
    close(found, grid_matrix(old_q, new_q) @ bias @ grid_matrix(old_k, new_k).T)


def test_resize_same_size_is_the_table_itself():
    bias = randn(2, 12, 3)
    assert functional.resize_relative_pos(bias, (4, 3), (1, 3), (4, 3), (1, 3)) is bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resize_of_a_constant(dtype):
    bias = torch.full((2, 12, 4), 1.5, dtype=dtype)
    found = functional.resize_relative_pos(bias, (4, 3), (2, 2), (5, 7), (3, 1))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full((2, 35, 3), 1.5, dtype=dtype))


def test_resize_is_linear():
    resize = lambda bias: functional.resize_relative_pos(bias, (4, 3), (2, 2), (6, 5), (3, 3))
    one, two = randn(2, 12, 4), randn(2, 12, 4)
    close(resize(2 * one - 3 * two), 2 * resize(one) - 3 * resize(two))


def test_resize_in_16_bit_interpolates_in_32():
    bias = torch.randn(2, 12, 4).bfloat16()
    wanted = functional.resize_relative_pos(bias.float(), (4, 3), (2, 2), (6, 5), (3, 3)).bfloat16()
    assert torch.equal(functional.resize_relative_pos(bias, (4, 3), (2, 2), (6, 5), (3, 3)), wanted)


def test_gradcheck_resize():
    resize = lambda bias: functional.resize_relative_pos(bias, (3, 2), (2, 2), (4, 3), (1, 3))
    assert gradcheck(resize, (randn(2, 6, 4, grad=True),))


# ---- sub-layers --------------------------------------------------------------------------------------------------------


def lpu_conv(channels: int) -> nn.Conv2d:
    return randomise(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))


def lmhsa_parts(C: int, heads: int, k: int, *, d_qk: int | None = None, qkv_bias: bool = True) -> dict:
    qk_width = heads * (d_qk or C // heads)
    return dict(
        q=randomise(nn.Linear(C, qk_width, bias=qkv_bias)),
        k=randomise(nn.Linear(C, qk_width, bias=qkv_bias)),
        v=randomise(nn.Linear(C, C, bias=qkv_bias)),
        proj=randomise(nn.Linear(C, C)),
        num_heads=heads,
        scale=(C // heads) ** -0.5,
        reduction=randomise(nn.Sequential(nn.Conv2d(C, C, k, stride=k, groups=C), nn.BatchNorm2d(C)))
        if k > 1
        else None,
        norm=randomise(nn.LayerNorm(C, eps=1e-6)),
    )


def irffn_parts(C: int, R: int) -> dict:
    return dict(
        expand=randomise(nn.Conv2d(C, R, 1)),
        bn1=randomise(nn.BatchNorm2d(R)),
        dw=lpu_conv(R),
        bn2=randomise(nn.BatchNorm2d(R)),
        project=randomise(nn.Conv2d(R, C, 1)),
        bn3=randomise(nn.BatchNorm2d(C)),
        norm=randomise(nn.LayerNorm(C, eps=1e-6)),
    )


def modules_of(parts: dict) -> list[nn.Module]:
    return [part for part in parts.values() if isinstance(part, nn.Module)]


def set_training(parts: dict, training: bool) -> None:
    for module in modules_of(parts):
        module.train(training)


def plain_lmhsa(x: Tensor, relative_pos: Tensor, parts: dict) -> Tensor:
    """One head at a time, one matrix product a projection."""
    B, H, W, C = x.shape
    y = layer_norm(x, parts["norm"])
    reduced = y
    if parts["reduction"] is not None:
        conv, bn = parts["reduction"]
        reduced = batch_norm(blocked_reduce(y, conv.weight, conv.bias), bn)
    linear = lambda t, module: t @ module.weight.T + (0 if module.bias is None else module.bias)
    q = linear(y.reshape(B, H * W, C), parts["q"]).chunk(parts["num_heads"], -1)
    k = linear(reduced.reshape(B, -1, C), parts["k"]).chunk(parts["num_heads"], -1)
    v = linear(reduced.reshape(B, -1, C), parts["v"]).chunk(parts["num_heads"], -1)
    heads = [(parts["scale"] * a @ b.mT + bias).softmax(-1) @ c for a, b, c, bias in zip(q, k, v, relative_pos)]
    return x + linear(torch.cat(heads, -1), parts["proj"]).reshape(B, H, W, C)


def plain_irffn(x: Tensor, parts: dict) -> Tensor:
    """GELU before each BatchNorm; the 3x3 convolution sees zeros, not BatchNorm's shift, outside of the map."""
    matrix = lambda t, conv: t @ conv.weight.flatten(1).T + conv.bias
    h = batch_norm(erf_gelu(matrix(layer_norm(x, parts["norm"]), parts["expand"])), parts["bn1"])
    h = shifted_conv3x3(h, parts["dw"].weight, parts["dw"].bias) + h
    h = batch_norm(erf_gelu(h), parts["bn2"])
    return x + batch_norm(matrix(h, parts["project"]), parts["bn3"])


def test_lpu_of_one_pixel():
    x, conv = randn(2, 1, 1, 3), lpu_conv(3)
    close(functional.lpu(x, conv), x * (conv.weight[:, 0, 1, 1] + 1) + conv.bias)


@given(height=sides, width=sides, channels=sides)
@few
def test_lpu_any_size(height, width, channels):
    x, conv = randn(2, height, width, channels), lpu_conv(channels)
    close(functional.lpu(x, conv), shifted_conv3x3(x, conv.weight, conv.bias) + x)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    k=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    d_qk=st.integers(1, 4),
    qkv_bias=st.booleans(),
    training=st.booleans(),
)
@few
def test_lmhsa_any_size(rows, columns, k, heads, head_dim, d_qk, qkv_bias, training):
    parts = lmhsa_parts(heads * head_dim, heads, k, d_qk=d_qk, qkv_bias=qkv_bias)
    set_training(parts, training)
    x = randn(2, rows * k, columns * k, heads * head_dim)
    relative_pos = randn(heads, rows * k * columns * k, rows * columns)
    close(functional.lmhsa(x, relative_pos, **parts), plain_lmhsa(x, relative_pos, parts))


def test_lmhsa_uniform_attention():
    """Zero queries and no bias: every token gets the projection of the mean value."""
    parts = lmhsa_parts(6, 2, 2)
    nn.init.zeros_(parts["q"].weight)
    nn.init.zeros_(parts["q"].bias)
    set_training(parts, False)
    x, none = randn(2, 4, 4, 6), torch.zeros(2, 16, 4, **DOUBLE)
    reduced = parts["reduction"](parts["norm"](x).permute(0, 3, 1, 2))
    mean = parts["proj"](parts["v"](reduced.flatten(2).mean(-1)))
    branch = functional.lmhsa(x, none, **parts, shortcut=False)
    close(branch, mean[:, None, None].expand_as(x))


@given(height=st.integers(1, 5), width=st.integers(1, 5), C=sides, R=sides, training=st.booleans())
@few
def test_irffn_any_size(height, width, C, R, training):
    assume(
        not training or height * width > 2
    )  # two values a channel may be as good as equal, and then three BatchNorms magnify rounding
    parts = irffn_parts(C, R)
    set_training(parts, training)
    x = randn(2, height, width, C)
    close(functional.irffn(x, **parts), plain_irffn(x, parts))


def test_irffn_gelu_comes_before_batch_norm():
    """With bn1 sending everything to the constant 1, GELU must not be seen again before the convolution."""
    parts = irffn_parts(2, 3)
    set_training(parts, False)
    parts["norm"] = None
    nn.init.zeros_(parts["bn1"].weight)
    nn.init.constant_(parts["bn1"].bias, 1.0)
    for name in ("bn2", "bn3"):
        parts[name] = nn.Identity()
    nn.init.zeros_(parts["dw"].weight)
    nn.init.zeros_(parts["dw"].bias)
    hidden = erf_gelu(torch.ones(3, **DOUBLE))  # gelu(bn1) would be 0.84, and gelu of it 0.67
    wanted = parts["project"].weight.flatten(1) @ hidden + parts["project"].bias
    close(functional.irffn(randn(1, 2, 2, 2), **parts, shortcut=False), wanted.expand(1, 2, 2, 2))


def test_irffn_pads_after_batch_norm():
    """A constant map and taps of 1: a corner sees 4 pixels and zeros, not bn1's shift, where there is no pixel."""
    parts = irffn_parts(1, 1)
    set_training(parts, False)
    parts.update(norm=None, bn2=nn.Identity(), bn3=nn.Identity(), project=nn.Identity())
    nn.init.zeros_(parts["bn1"].weight)
    nn.init.constant_(parts["bn1"].bias, 2.0)
    nn.init.ones_(parts["dw"].weight)
    nn.init.zeros_(parts["dw"].bias)
    found = functional.irffn(randn(1, 3, 3, 1), **parts, shortcut=False)
    seen = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], **DOUBLE).view(1, 3, 3, 1)
    close(found, erf_gelu(2 * seen + 2))


SUBLAYERS = {
    "lmhsa": lambda x, **kwargs: functional.lmhsa(x, randn(2, 16, 4), **lmhsa_parts(4, 2, 2), **kwargs),
    "irffn": lambda x, **kwargs: functional.irffn(x, **irffn_parts(4, 5), **kwargs),
}


def same_weights(call, *args, **kwargs) -> Tensor:
    torch.manual_seed(1)
    return call(*args, **kwargs)


@pytest.mark.parametrize("call", SUBLAYERS.values(), ids=SUBLAYERS.keys())
def test_shortcut_adds_the_input(call):
    x = randn(2, 4, 4, 4)
    close(same_weights(call, x), x + same_weights(call, x, shortcut=False))


@pytest.mark.parametrize("call", SUBLAYERS.values(), ids=SUBLAYERS.keys())
def test_drop_path_acts_on_the_branch_alone(call):
    x = randn(2, 4, 4, 4)
    branch = same_weights(call, x, shortcut=False)
    close(same_weights(call, x, drop_path=lambda branch: 0 * branch), x)
    close(same_weights(call, x, drop_path=lambda branch: 3 * branch), x + 3 * branch)


def test_dropout_of_the_irffn_acts_on_hidden_map_and_output():
    parts, seen = irffn_parts(4, 5), []
    set_training(parts, False)
    x = randn(1, 3, 3, 4)
    found = functional.irffn(x, **parts, drop=lambda y: seen.append(y.shape[1]) or 2 * y, shortcut=False)
    assert seen == [5, 4]
    nn.init.constant_(parts["bn1"].weight, 0.0)
    assert not torch.equal(found, functional.irffn(x, **parts, drop=lambda y: 2 * y, shortcut=False))


def test_dropout_of_the_attention_acts_on_weights_and_output():
    parts, seen = lmhsa_parts(4, 2, 2), []
    keep = lambda name: lambda t: seen.append((name, tuple(t.shape))) or t
    functional.lmhsa(randn(1, 4, 4, 4), randn(2, 16, 4), **parts, attn_drop=keep("weights"), proj_drop=keep("output"))
    assert seen == [("weights", (1, 2, 16, 4)), ("output", (1, 16, 4))]


def gradcheck_module_function(call, parts: dict, *inputs: Tensor) -> bool:
    """gradcheck of the inputs and of every parameter of ``parts``."""
    parameters = [p for module in modules_of(parts) for p in module.parameters()]
    return gradcheck(lambda *tensors: call(*tensors[: len(inputs)], **parts), (*inputs, *parameters), atol=1e-4)


def test_gradcheck_lpu():
    assert gradcheck_module_function(functional.lpu, {"conv": lpu_conv(2)}, randn(2, 3, 2, 2, grad=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("k", "d_qk"), [(2, 1), (1, 2)])
def test_gradcheck_lmhsa(k, d_qk, training):
    parts = lmhsa_parts(4, 2, k, d_qk=d_qk)
    set_training(parts, training)
    x, relative_pos = randn(2, 2 * k, k, 4, grad=True), randn(2, 2 * k * k, 2, grad=True)
    assert gradcheck_module_function(functional.lmhsa, parts, x, relative_pos)


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_irffn(training):
    parts = irffn_parts(2, 3)
    set_training(parts, training)
    assert gradcheck_module_function(functional.irffn, parts, randn(2, 2, 3, 2, grad=True))


# ---- strides and layouts -----------------------------------------------------------------------------------------------


def strided(*shape: int) -> Tensor:
    """Values in the layout of an NCHW-contiguous map, with a gap after every channel row: no dimension is dense."""
    B, H, W, C = shape
    return randn(B, C, H, 2 * W)[..., ::2].permute(0, 2, 3, 1)


WEIGHT3, WEIGHT2, KEYS = randn(4, 1, 3, 3), randn(4, 1, 2, 2), randn(2, 2, 3, 4)
ANY_LAYOUT = {
    "depthwise_conv3x3": (lambda x: functional.depthwise_conv3x3(x, WEIGHT3, shortcut=True), (2, 4, 6, 4)),
    "depthwise_reduce": (lambda x: functional.depthwise_reduce(x, WEIGHT2), (2, 4, 6, 4)),
    "attention queries": (lambda x: functional.reduced_kv_attention(x, KEYS, KEYS), (2, 2, 5, 4)),
    "attention keys": (lambda x: functional.reduced_kv_attention(KEYS, x, x), (2, 2, 5, 4)),
    "lpu": (lambda x: same_weights(lambda: functional.lpu(x, lpu_conv(4))), (2, 4, 6, 4)),
    "lmhsa": (lambda x: same_weights(SUBLAYERS["lmhsa"], x), (2, 4, 4, 4)),
    "irffn": (lambda x: same_weights(SUBLAYERS["irffn"], x), (2, 4, 6, 4)),
}


@pytest.mark.parametrize(("call", "shape"), ANY_LAYOUT.values(), ids=ANY_LAYOUT.keys())
def test_any_strides_of_inputs_and_gradients(call, shape):
    dense = randn(*shape, grad=True)
    gaps = strided(*shape).copy_(dense.detach()).requires_grad_()
    assert not gaps.is_contiguous()
    wanted, found = call(dense), call(gaps)
    close(found, wanted)
    gradient = randn(*wanted.shape)
    wanted.backward(gradient)
    found.backward(torch.empty_like(gradient.mT).mT.copy_(gradient))
    close(gaps.grad, dense.grad)
    constant = gaps.detach().clone().requires_grad_()
    call(constant).sum().backward()  # the gradient of a sum is expanded: all its strides are 0
    summed = dense.detach().clone().requires_grad_()
    call(summed).backward(torch.ones_like(wanted))
    close(constant.grad, summed.grad)


def test_a_training_step_repeats_bit_for_bit():
    """docs/determinism.md: the same seed and number of threads give the same bits, dropout included."""
    config = dict(
        img_size=64, num_classes=10, depths=(1, 1, 1, 1), drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2
    )

    def step() -> list[Tensor]:
        torch.manual_seed(3)
        model = CMT(**config)
        logits = model(torch.randn(4, 3, 80, 64))  # not its own size: the position bias is resized
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters()), *model.buffers()]

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step()))


# ---- errors ------------------------------------------------------------------------------------------------------------

MAP = torch.randn(1, 4, 4, 6)
Q, K = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
META = "meta"
conv3, reduce, attention, resize = (
    functional.depthwise_conv3x3,
    functional.depthwise_reduce,
    functional.reduced_kv_attention,
    functional.resize_relative_pos,
)
W3, W2 = torch.randn(6, 1, 3, 3), torch.randn(6, 1, 2, 2)
TABLE = torch.randn(2, 12, 4)
FLOAT_CONV = nn.Conv2d(6, 6, 3, padding=1, groups=6)
ERRORS = [
    # a map, in every operation that takes one
    (conv3, (MAP[0], W3), {}, ValueError, r"x must be a 4-D tensor \(B, H, W, C\), got \(4, 4, 6\); tokens"),
    (conv3, ("x", W3), {}, ValueError, "x must be a 4-D tensor .* got str"),
    (conv3, (MAP.long(), W3), {}, TypeError, "x must be floating point, got torch.int64"),
    (conv3, (MAP[:, :0], W3), {}, ValueError, r"at least one row, column and channel, got \(1, 0, 4, 6\)"),
    (reduce, (MAP[0], W2), {}, ValueError, "x must be a 4-D tensor"),
    (functional.lpu, (MAP[0], nn.Identity()), {}, ValueError, "x must be a 4-D tensor"),
    (functional.lpu, (MAP.int(), nn.Identity()), {}, TypeError, "x must be floating point, got torch.int32"),
    (functional.lmhsa, (MAP[0], Q[0]), lmhsa_parts(6, 2, 2), ValueError, "x must be a 4-D tensor"),
    (functional.irffn, (MAP[0],), irffn_parts(6, 6), ValueError, "x must be a 4-D tensor"),
    # depthwise weights and biases
    (conv3, (MAP, W3[:5]), {}, ValueError, r"weight must have shape \(C, 1, k, k\) with C = 6 .* got \(5, 1, 3, 3\)"),
    (conv3, (MAP, W3[:, 0]), {}, ValueError, r"with C = 6 channels of x, got \(6, 3, 3\)"),
    (conv3, (MAP, torch.randn(6, 6, 3, 3)), {}, ValueError, r"got \(6, 6, 3, 3\)"),
    (conv3, (MAP, W2), {}, ValueError, r"weight must have shape \(6, 1, 3, 3\), got \(6, 1, 2, 2\)"),
    (conv3, (MAP, W3, torch.randn(5)), {}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    (conv3, (MAP, W3.to(META)), {}, ValueError, "weight is on meta but x is on cpu; move one of them"),
    (conv3, (MAP, W3, torch.randn(6, device=META)), {}, ValueError, "bias is on meta but x is on cpu"),
    (reduce, (MAP, torch.randn(6, 1, 2, 3)), {}, ValueError, r"k no larger than the map, got weight \(6, 1, 2, 3\)"),
    (reduce, (MAP, torch.randn(6, 1, 5, 5)), {}, ValueError, r"weight \(6, 1, 5, 5\) and x \(1, 4, 4, 6\)"),
    (reduce, (MAP, W2, torch.randn(1, 6)), {}, ValueError, r"bias must have shape \(6,\), got \(1, 6\)"),
    (conv3, (MAP, None), {}, ValueError, "weight must have shape .* got NoneType"),
    (conv3, (MAP, W3, 0.5), {}, ValueError, r"bias must have shape \(6,\), got float"),
    (conv3, (MAP, W3.double()), {}, TypeError, r"weight is torch.float64 but x is torch.float32: convert .* \.to\(\)"),
    (conv3, (MAP, W3, torch.randn(6).bfloat16()), {}, TypeError, "bias is torch.bfloat16 but x is torch.float32"),
    (conv3, (MAP, W3), dict(shortcut=1), TypeError, "shortcut must be True or False, got int"),
    (conv3, (MAP, W3), dict(shortcut=MAP), TypeError, "shortcut must be True or False, got Tensor"),
    (conv3, (MAP.to(META), W3.half().to(META)), {}, TypeError, "weight is torch.float16 but x is torch.float32"),
    (reduce, (MAP, W2.half()), {}, TypeError, "weight is torch.float16 but x is torch.float32"),
    (reduce, (MAP, "w"), {}, ValueError, "weight must have shape .* got str"),
    (reduce, (MAP, W2[..., :0, :0]), {}, ValueError, r"1 <= k .* got weight \(6, 1, 0, 0\)"),
    # modules
    (functional.lpu, (MAP, None), {}, TypeError, "conv must be a module, got NoneType"),
    (functional.lpu, (MAP, lpu_conv(6)), {}, TypeError, "conv is torch.float64 but x is torch.float32"),
    (functional.lpu, (MAP.double(), lpu_conv(5)), {}, ValueError, "conv takes 5 channels but x has 6"),
    (functional.lpu, (MAP, nn.Conv2d(6, 6, 3)), {}, ValueError,
     r"conv must keep the shape of x \(1, 4, 4, 6\), got \(1, 2, 2, 6\)"),
    (functional.lpu, (MAP, nn.Conv2d(6, 1, 1)), {}, ValueError, r"got \(1, 4, 4, 1\)"),  # would broadcast
    (functional.irffn, (MAP.double(),), irffn_parts(5, 6), ValueError, "expand takes 5 channels but x has 6"),
    (functional.irffn, (MAP.double(),), irffn_parts(6, 6) | dict(dw=None), TypeError, "dw must be a module, got NoneType"),
    (functional.lmhsa, (MAP.double(), randn(2, 16, 4)), lmhsa_parts(6, 2, 2) | dict(proj=None), TypeError,
     "proj must be a module, got NoneType"),
    (functional.lmhsa, (MAP.double(), randn(0, 16, 4)), lmhsa_parts(6, 2, 2) | dict(num_heads=0), ValueError,
     "num_heads must be at least 1, got 0"),
    (functional.lmhsa, (MAP.double(), randn(4, 16, 4)), lmhsa_parts(6, 2, 2) | dict(num_heads=4), ValueError,
     "num_heads must divide the width of q, got num_heads 4 and width 6"),
    (functional.lmhsa, (MAP.double(), randn(2, 16, 4)), lmhsa_parts(6, 2, 2) | dict(v=nn.Linear(6, 7)), ValueError,
     "num_heads must divide the width of v, got num_heads 2 and width 7"),
    # attention
    (attention, (Q.long(), K, K), {}, TypeError, "q must be floating point, got torch.int64"),
    (attention, (Q, K.double(), K), {}, TypeError, "k is torch.float64 but q is torch.float32"),
    (attention, (Q, K, K.half()), {}, TypeError, "v is torch.float16 but q is torch.float32"),
    (attention, (Q, K, K, torch.randn(2, 5, 3).double()), {}, TypeError, "bias is torch.float64 but q is torch.float32"),
    (attention, (Q.half(), K.half(), K.half(), torch.randn(2, 5, 3).bfloat16()), {}, TypeError, "bias is torch.bfloat16"),
    (attention, (Q, K, K, torch.ones(2, 5, 3).bool()), {}, TypeError, "bias must be floating point, .* not a mask"),
    (attention, (Q, K, K, 1.0), {}, ValueError, "bias must have shape .* got float"),
    (attention, (Q[0], K, K), {}, ValueError, r"q must be a 4-D tensor \(B, heads, tokens, head dim\), got \(2, 5, 4\)"),
    (attention, (Q, K[0], K), {}, ValueError, "k must be a 4-D tensor"),
    (attention, (Q, K, None), {}, ValueError, "v must be a 4-D tensor .* got NoneType"),
    (attention, (Q, K[..., :3], K), {}, ValueError, r"\(B, h, M, d_qk\) = \(1, 2, M, 4\) to meet q .* got \(1, 2, 3, 3\)"),
    (attention, (Q, K[:, :1], K), {}, ValueError, r"k must have shape .* got \(1, 1, 3, 4\)"),
    (attention, (Q, K, K[:, :, :2]), {}, ValueError, r"v must have shape .* \(1, 2, 3, d_v\) to meet k .* got \(1, 2, 2, 4\)"),
    (attention, (Q, K[:, :, :0], K[:, :, :0]), {}, ValueError, "k and v hold no keys"),
    (attention, (Q, K, K, torch.randn(2, 5, 4)), {}, ValueError, r"bias .* \(h, N, M\) = \(2, 5, 3\), got \(2, 5, 4\)"),
    (attention, (Q, K, K, torch.randn(1, 2, 5, 3)), {}, ValueError, r"got \(1, 2, 5, 3\)"),
    (attention, (Q, K.to(META), K), {}, ValueError, "k is on meta but q is on cpu"),
    (attention, (Q, K, K, torch.randn(2, 5, 3, device=META)), {}, ValueError, "bias is on meta but q is on cpu"),
    (attention, (Q, K, K), dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (attention, (Q, K, K), dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    # position bias
    (functional.lmhsa, (MAP, torch.randn(2, 15, 4)), lmhsa_parts(6, 2, 2), ValueError,
     r"relative_pos must have shape \(num_heads, H \* W, keys\) = \(2, 16, keys\), got \(2, 15, 4\)"),
    (functional.lmhsa, (MAP, torch.randn(16, 4)), lmhsa_parts(6, 2, 2), ValueError, r"relative_pos .* got \(16, 4\)"),
    (functional.lmhsa, (MAP, torch.randn(2, 16, 4, device=META)), lmhsa_parts(6, 2, 2), ValueError,
     "relative_pos is on meta but x is on cpu"),
    (functional.lmhsa, (MAP.double(), torch.randn(2, 16, 1)), lmhsa_parts(6, 2, 2), ValueError,
     r"relative_pos must have one column for each of the 4 keys, got \(2, 16, 1\)"),
    (resize, (torch.randn(2, 12, 4), (4, 4), (2, 2), (5, 5), (3, 3)), {}, ValueError,
     r"\(h, 16, 4\) for query grid \(4, 4\) and key grid \(2, 2\), got \(2, 12, 4\)"),
    (functional.lmhsa, (MAP, None), lmhsa_parts(6, 2, 2), ValueError, "relative_pos must have shape .* got NoneType"),
    (functional.lmhsa, (MAP, torch.ones(2, 16, 4).long()), lmhsa_parts(6, 2, 2), TypeError, "relative_pos must be floating"),
    (resize, (TABLE[0], (4, 3), (2, 2), (5, 5), (3, 3)), {}, ValueError, r"bias must have shape .* got \(12, 4\)"),
    (resize, (TABLE.long(), (4, 3), (2, 2), (5, 5), (3, 3)), {}, TypeError, "bias must be floating point"),
    (resize, (TABLE, (12,), (2, 2), (5, 5), (3, 3)), {}, ValueError, r"query_grid must be \(H, W\) .* got \(12,\)"),
    (resize, (TABLE, (4, 3), 4, (5, 5), (3, 3)), {}, ValueError, r"key_grid must be \(H, W\) .* got 4"),
    (resize, (TABLE, (4, 3), (2, 2), (5, 0), (3, 3)), {}, ValueError, r"new_query_grid must be \(H, W\) .* got \(5, 0\)"),
    (resize, (TABLE, (4, 3), (2, 2), (5, 5), (3.5, 3)), {}, ValueError, r"new_key_grid must be .* got \(3.5, 3\)"),
    # the backend
    (conv3, (MAP, W3), dict(backend="cuda"), ValueError, "backend must be one of 'auto', .*'reference', got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "kwargs", "error", "message"), ERRORS)
def test_errors(function, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


def mixed_dtypes() -> tuple[Tensor, ...]:
    """What autocast may mix: a bfloat16 map with float32 weights, and attention with a bias wider than its queries."""
    low = torch.bfloat16
    return (
        functional.depthwise_conv3x3(MAP.to(low), W3),
        functional.depthwise_reduce(MAP.to(low), W2),
        functional.lpu(MAP.to(low), FLOAT_CONV),
        attention(Q.to(low), K, K, torch.randn(2, 5, 3)),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_may_mix_dtypes(compiled):
    function = torch.compile(mixed_dtypes, fullgraph=True, backend="eager") if compiled else mixed_dtypes
    with torch.autocast("cpu", torch.bfloat16):
        function()
    with pytest.raises(TypeError, match=r"weight is torch\.float32 but x is torch\.bfloat16"):
        mixed_dtypes()


def test_attention_takes_a_narrower_bias():
    bias = torch.randn(2, 5, 3).bfloat16()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for function in (attention, compiled):
        torch.testing.assert_close(function(Q, K, K, bias), attention(Q, K, K, bias.float()))
