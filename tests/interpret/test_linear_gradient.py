"""Gradients of a linear layer's weight and bias behind a LayerNorm made on load, in the interpreter: against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutation import mutate
from torch import Tensor

from cmt_fast.ops._triton import linear_gradient, norm, tiles
from cmt_fast.ops._triton.linear_gradient import Normal, linear_gradient_config, linear_gradient_launches
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.tolerance import Comparison, compare

F16, F32, F64 = torch.float16, torch.float32, torch.float64
EPS = 1e-6


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """Of one tile of rows or two."""
    monkeypatch.setattr(linear_gradient, "_PARTIALS", 1.0)
    linear_gradient_config.cache_clear()
    yield
    linear_gradient_config.cache_clear()


def make(
    sizes: tuple[int, int, int, int] = (3, 70, 20, 40),
    grad_dtype: torch.dtype = F16,
    x_dtype: torch.dtype = F16,
    norm: bool = True,
    affine: bool = True,
    scaled: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """sizes: images, rows of an image, outputs, inputs."""
    b, n, outputs, inputs = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = F32) -> Tensor:
        return (torch.randn(size, generator=generator) * std + mean).to(dtype)

    return dict(
        grad=normal(b, n, outputs, dtype=grad_dtype),
        x=normal(b, n, inputs, mean=0.5, dtype=x_dtype),
        norm=torch.ones(inputs) if norm else None,
        weight=normal(inputs, std=0.2, mean=1.0) if norm and affine else None,
        bias=normal(inputs, std=0.2) if norm and affine else None,
        row_scale=(torch.arange(b) % 3 / 2) if scaled else None,
    )


def product_dtype(call: dict[str, Any]) -> torch.dtype:
    return min(call["grad"].dtype, call["x"].dtype, key=lambda dtype: dtype.itemsize)


def plain(call: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients of weight and bias by plain PyTorch, in ``dtype`` or, rounded as the products' operands are, in those of the call."""
    wide, low = dtype or F32, dtype or product_dtype(call)
    grad, x = call["grad"].to(wide), call["x"].to(wide)
    if call["row_scale"] is not None:
        grad = grad * call["row_scale"].to(wide)[:, None, None]
    if call["norm"] is not None:
        weight, bias = (None if t is None else t.to(wide) for t in (call["weight"], call["bias"]))
        x = F.layer_norm(x, x.shape[2:], weight, bias, EPS)
    return [grad.to(low).flatten(0, 1).t() @ x.to(low).flatten(0, 1), grad.sum((0, 1))]


def fused(
    call: dict[str, Any], launches=linear_gradient_launches, weight: bool = True, bias: bool = True
) -> list[Tensor]:
    grad, x, norm = call["grad"], call["x"], None
    if call["norm"] is not None:
        rows = x.flatten(0, 1).double()
        moments = torch.stack([rows.mean(1), (rows.var(1, correction=0) + EPS).rsqrt()], 1).float()
        norm = Normal(moments, call["weight"], call["bias"])
    dweight = torch.empty(grad.shape[2], x.shape[2], dtype=product_dtype(call)) if weight else None
    dbias = torch.empty(grad.shape[2], dtype=F32) if bias else None
    for launch in launches(grad, x, dweight, dbias, row_scale=call["row_scale"], norm=norm):
        launch.run()
    return [t for t in (dweight, dbias) if t is not None]


def compared(call: dict[str, Any], launches=linear_gradient_launches) -> list[Comparison]:
    dtype = product_dtype(call)
    results = zip(("dweight", "dbias"), fused(call, launches), plain(call, F64), plain(call))
    return [
        compare(name, found, exact, own.to(found.dtype), backward=True, dtype=dtype)
        for name, found, exact, own in results
    ]


def check(call: dict[str, Any]) -> None:
    failed = [str(result) for result in compared(call) if not result.passed]
    assert not failed, failed


def test_random_shapes():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(60):
        sizes = draw(1, 3), draw(1, 50), draw(1, 70), draw(2, 70)
        dtypes = ((F16, F16), (F16, F32), (F32, F16), (F32, F32))[draw(0, 3)]
        check(make(sizes, *dtypes, *(bool(draw(0, 3)) for _ in range(3)), seed=seed))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (2, 64, 64, 64), (1, 200, 130, 16), (1, 65, 16, 130)])
def test_one_row_whole_tiles_and_several(sizes):
    check(make(sizes))


def test_only_what_is_needed_poisoned_memory_and_repetition():
    call = make()
    expected = fused(call)
    with poisoned_empty():
        (dweight,), (dbias,) = fused(call, bias=False), fused(call, weight=False)
    assert torch.equal(dweight, expected[0]) and torch.equal(dbias, expected[1])


def test_parts_follow_from_the_shape(monkeypatch):
    """They fill a GPU where the partial sums stay small, and cover the rows, each at least one."""
    monkeypatch.undo()
    linear_gradient_config.cache_clear()
    for rows, outputs, inputs, parts in (
        (401408, 64, 64, 131),
        (100352, 128, 128, 29),
        (25088, 256, 256, 4),
        (7, 512, 512, 1),
    ):
        config = linear_gradient_config(rows, outputs, inputs, 2)
        assert config.parts == parts
        covered = config.parts * config.steps * config.block_n
        assert covered - config.steps * config.block_n < rows <= covered


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "scale of the first image": ("row_scale + row // scale_rows", "row_scale + row * 0"),
    "sums of one step": ("total_grad += tl.sum", "total_grad = tl.sum"),
    "sums of the first part": ("sums + part * OUT + o", "sums + o"),
    "rows of the first part": ("(part * steps + step)", "step"),
    "part of the first": ("products + part * (OUT * IN)", "products + 0 * (OUT * IN)"),
    "mean of the wrong row": ("moments + 2 * row, row", "moments + 2 * (row // 2), row"),
    "no bias of LayerNorm": ("x += tl.load(bias + c, c < C, 0.0).to(tl.float32)", "x += 0.0"),
    "inputs of the first tile": ("rows, first_in, IN", "rows, 0, IN"),
}  # fmt: skip


def wrong_results(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernel's source is changed."""
    *_, kernels = mutate(monkeypatch, tmp_path, [tiles, norm, linear_gradient], old, new)
    monkeypatch.setattr(kernels, "_PARTIALS", 1.0)
    with poisoned_empty():
        results = compared(make((3, 70, 20, 70)), kernels.linear_gradient_launches)
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    assert wrong_results(monkeypatch, tmp_path, "(first_in == 0)", "(first_in == 0)") == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a wrong kernel computes
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert wrong_results(monkeypatch, tmp_path, *MUTATIONS[name])
