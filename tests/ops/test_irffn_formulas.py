"""The backward pass of the IRFFN as its kernels make it (docs/math.md, section 8), in plain float64: against numerical gradients.

The kernels follow the steps of ``Formulas.backward`` one by one, so this is what they are derived from.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EPS_LN, EPS_BN = 1e-6, 1e-5


def depthwise(x: Tensor, taps: Tensor) -> Tensor:
    """x (B, H, W, R) with taps (R, 1, 3, 3)."""
    return F.conv2d(x.permute(0, 3, 1, 2), taps, padding=1, groups=len(taps)).permute(0, 2, 3, 1)


def slope(x: Tensor) -> Tensor:
    """GELU'."""
    phi = 0.5 * (1 + torch.erf(x / 2**0.5))
    return phi + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


def statistics(x: Tensor, frozen: Tensor | None) -> Tensor:
    """Mean and 1 / sigma of each channel, of the batch or, in eval mode, frozen ones: (2, channels)."""
    if frozen is not None:
        return torch.stack((frozen[0], (frozen[1] + EPS_BN).rsqrt()))
    variance, mean = torch.var_mean(x.flatten(0, -2), 0, correction=0)
    return torch.stack((mean, (variance + EPS_BN).rsqrt()))


def normal(x: Tensor, norm: Tensor) -> Tensor:
    return (x - norm[0]) * norm[1]


def norm_backward(grad: Tensor, x: Tensor, norm: Tensor, gamma: Tensor, sums: tuple[Tensor, Tensor], frozen) -> Tensor:
    """BN': ``sums`` are those of grad * x_hat and of grad, which are the gradients of gamma and beta too."""
    inverse_count = 0.0 if frozen is not None else 1 / grad[..., 0].numel()
    dgamma, dbeta = sums
    return gamma * norm[1] * (grad - inverse_count * (dbeta + normal(x, norm) * dgamma))


def weight_gradient(grad: Tensor, x_hat: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor):
    """Of y = (gamma x_hat + beta) W^T + b from one product: gradients of W, b, gamma and beta."""
    product, dbias = grad.flatten(0, -2).T @ x_hat.flatten(0, -2), grad.flatten(0, -2).sum(0)
    return product * gamma + dbias[:, None] * beta, dbias, (weight * product).sum(0), dbias @ weight


class Formulas(torch.autograd.Function):
    """x (B, H, W, C), factor (B,) of the branch, and for each BatchNorm None or frozen (mean, variance)."""

    @staticmethod
    def forward(ctx, x, g0, c0, w1, b1, g1, c1, taps, b, g2, c2, w2, b2, g3, c3, factor, frozen):
        weight, bias = w1 * g0, w1 @ c0 + b1  # LayerNorm's affine part goes into the product
        var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        rows = torch.cat((mean, (var + EPS_LN).rsqrt()), -1)
        h = (x - rows[..., :1]) * rows[..., 1:] @ weight.T + bias
        n1 = statistics(F.gelu(h), frozen[0])
        t = normal(F.gelu(h), n1) * g1 + c1
        u = depthwise(t, taps) + b + t
        n2 = statistics(F.gelu(u), frozen[1])
        y = (normal(F.gelu(u), n2) * g2 + c2) @ w2.T + b2
        n3 = statistics(y, frozen[2])
        ctx.save_for_backward(x, g0, c0, w1, g1, c1, taps, g2, c2, w2, g3, factor, h, u, y, n1, n2, n3)
        ctx.frozen = frozen
        return x + factor[:, None, None, None] * (normal(y, n3) * g3 + c3)

    @staticmethod
    def backward(ctx, dout):
        x, g0, c0, w1, g1, c1, taps, g2, c2, w2, g3, factor, h, u, y, n1, n2, n3 = ctx.saved_tensors
        frozen = ctx.frozen
        # BN3: two sums, then the gradient of the projection's output
        dz = dout * factor[:, None, None, None]
        dg3, dc3 = (dz * normal(y, n3)).flatten(0, 2).sum(0), dz.flatten(0, 2).sum(0)
        dm = norm_backward(dz, y, n3, g3, (dg3, dc3), frozen[2])
        # The projection: its weight's gradient holds both sums of BN2, so that BN2' and GELU' can follow the next product
        dw2, db2, dg2, dc2 = weight_gradient(dm, normal(F.gelu(u), n2), w2, g2, c2)
        du = slope(u) * norm_backward(dm @ w2, F.gelu(u), n2, g2, (dg2, dc2), frozen[1])
        # The depthwise convolution: shifted du alone makes dt and, with t, the taps' gradients
        t = normal(F.gelu(h), n1) * g1 + c1
        padded = F.pad(du, (0, 0, 1, 1, 1, 1))
        height, width = du.shape[1:3]
        dt, dtaps = du.clone(), torch.empty_like(taps)
        for i in range(3):
            for j in range(3):
                shifted = padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width]
                dt += taps[:, 0, i, j] * shifted
                dtaps[:, 0, i, j] = (shifted * t).flatten(0, 2).sum(0)
        db = du.flatten(0, 2).sum(0)
        dg1, dc1 = (dt * normal(F.gelu(h), n1)).flatten(0, 2).sum(0), dt.flatten(0, 2).sum(0)
        # The expansion and LayerNorm
        dh = slope(h) * norm_backward(dt, F.gelu(h), n1, g1, (dg1, dc1), frozen[0])
        d = dh @ (w1 * g0)
        var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        scale = (var + EPS_LN).rsqrt()
        x_hat = (x - mean) * scale
        dx = dout + scale * (d - d.mean(-1, keepdim=True) - x_hat * (d * x_hat).mean(-1, keepdim=True))
        dw1, db1, dg0, dc0 = weight_gradient(dh, x_hat, w1, g0, c0)
        return dx, dg0, dc0, dw1, db1, dg1, dc1, dtaps, db, dg2, dc2, dw2, db2, dg3, dc3, None, None


def arguments(shape=(2, 3, 2, 3), hidden=4, frozen=(False, False, False)):
    """Leaves of :class:`Formulas`, the factor, and the frozen statistics."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + mean).requires_grad_()

    c = shape[-1]
    leaves = [draw(*shape), draw(c, mean=1), draw(c), draw(hidden, c), draw(hidden)]
    leaves += [draw(hidden, mean=1), draw(hidden), draw(hidden, 1, 3, 3), draw(hidden)]
    leaves += [draw(hidden, mean=1), draw(hidden), draw(c, hidden), draw(c), draw(c, mean=1), draw(c)]
    factor = torch.tensor([2.0, 0.0, 0.5][: shape[0]], dtype=torch.float64)
    kept = [draw(2, width).detach().exp() if f else None for f, width in zip(frozen, (hidden, hidden, c))]
    return leaves, factor, kept


def plain(x, g0, c0, w1, b1, g1, c1, taps, b, g2, c2, w2, b2, g3, c3, factor, frozen):
    """The same in PyTorch's operations."""

    def batch_norm(y: Tensor, gamma: Tensor, beta: Tensor, kept: Tensor | None) -> Tensor:
        mean, var = (None, None) if kept is None else kept
        y = F.batch_norm(y.permute(0, 3, 1, 2), mean, var, gamma, beta, kept is None, 0.1, EPS_BN)
        return y.permute(0, 2, 3, 1)

    h = F.layer_norm(x, x.shape[-1:], g0, c0, EPS_LN) @ w1.T + b1
    t = batch_norm(F.gelu(h), g1, c1, frozen[0])
    u = depthwise(t, taps) + b + t
    y = batch_norm(F.gelu(u), g2, c2, frozen[1]) @ w2.T + b2
    return x + factor[:, None, None, None] * batch_norm(y, g3, c3, frozen[2])


MODES = {
    "train": (False,) * 3,
    "eval": (True,) * 3,
    "BN2 frozen": (False, True, False),
    "BN3 frozen": (False, False, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    leaves, factor, frozen = arguments(frozen=MODES[mode])
    assert torch.autograd.gradcheck(lambda *leaves: Formulas.apply(*leaves, factor, frozen), leaves)


@pytest.mark.parametrize("mode", MODES)
def test_same_as_plain_pytorch(mode):
    leaves, factor, frozen = arguments((3, 5, 4, 6), 7, MODES[mode])
    out, expected = Formulas.apply(*leaves, factor, frozen), plain(*leaves, factor, frozen)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(ours, theirs)
