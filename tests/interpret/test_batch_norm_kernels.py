"""BatchNorm in pieces, in the interpreter: merged moments, statistics, sums of gradients, running buffers, all against float64."""

from collections.abc import Sequence

import pytest
import torch
from mutation import mutate
from torch import Tensor, nn

from cmt_fast.ops._triton import batch_norm as kernels
from cmt_fast.ops._triton import statistics as launch
from cmt_fast.ops.batch_norm.schema import (
    add_partials_triton,
    batch_norm_gradient_sums_triton,
    batch_norm_statistics_triton,
    merge_moments_triton,
)
from cmt_fast.ops.batch_norm.training import batch_norm_plan, batch_norm_reasons, statistics, update_running
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.tolerance import Comparison, compare

ROWS = ("mean", "unbiased", "rstd", "scale", "bias", "share")


@pytest.fixture(autouse=True)
def poison():
    with poisoned_empty():
        yield


def tiles(generator: torch.Generator, programs: int, channels: int, mean: float) -> list[Tensor]:
    """The values of each program, (count, C): some none, most a few; float64 holding float32 numbers."""
    counts = torch.randint(0, 6, (programs,), generator=generator)
    counts[-1] = 3  # two values at least
    return [(torch.randn(int(n), channels, generator=generator) + mean * torch.ones(channels)).double() for n in counts]


def moments(values: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What programs would store: mean and M2 of each, and the counts."""
    parts = []
    for tile in values:
        tile = tile.to(dtype)
        mean = tile.mean(0) if len(tile) else tile.new_zeros(tile.shape[1])
        parts.append(torch.stack([mean, (tile - mean).square().sum(0)]))
    return torch.stack(parts), torch.tensor([len(tile) for tile in values]).to(dtype)


def exact_statistics(values: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    every = torch.cat(values)
    mean, variance = every.mean(0), every.var(0, correction=0)
    rstd = (variance + eps).rsqrt()
    scale = rstd * (1 if weight is None else weight.to(every))
    added = torch.zeros_like(mean) if bias is None else bias.to(every)
    return torch.stack([mean, every.var(0), rstd, scale, added, torch.full_like(mean, 1 / len(every))])


def compared(splits: Sequence[int]) -> list[Comparison]:
    """Statistics of values split over so many programs, and the sums of gradients, against float64 and plain float32.

    A mean is stored with its rounding, which is a part of every distance from it: the scale of what cancels.
    """
    results = []
    for seed, programs in enumerate(splits):
        generator = torch.Generator().manual_seed(seed)
        channels, mean = (1, 5, 32, 33, 70)[seed % 5], (0.0, 100.0)[seed % 2]
        values = tiles(generator, programs, channels, mean)
        weight, bias = torch.randn(2, channels, generator=generator) if seed % 3 else (None, None)
        actual = batch_norm_statistics_triton(*moments(values, torch.float32), weight, bias, 1e-5)
        exact = exact_statistics(values, weight, bias, 1e-5)
        plain = exact_statistics([v.float() for v in values], weight, bias, 1e-5)
        size = max(3.0, mean)  # of the values
        scales = (size, size, size, size, 0.0, 0.0)
        results += [
            compare(f"{name} {seed}", *rows, scale=scale)
            for name, scale, *rows in zip(ROWS, scales, actual, exact, plain)
        ]
        x, grad = torch.randn(2, 3 * programs, channels, generator=generator) + mean
        normal = (x.double() - exact[0]) * exact[2]
        wanted = torch.stack([grad.double().sum(0), (grad.double() * normal).sum(0)])
        normal = (x - exact[0].float()) * exact[2].float()
        plain = torch.stack([grad.sum(0), (grad * normal).sum(0)])
        sums = batch_norm_gradient_sums_triton(grad, x, exact.float())
        scale = grad.abs().sum().item() / channels * max(1.0, mean * 1e-2)
        results.append(compare(f"sums {seed}", sums, wanted, plain, backward=True, scale=scale))
    return results


def test_against_float64():
    for result in compared((1, 2, 3, 64, 65, 130, 257, 515)):
        assert result.passed, str(result)


def test_merging_in_steps_is_merging_at_once():
    """Two processes' merged moments give the statistics of all values."""
    generator = torch.Generator().manual_seed(0)
    values = tiles(generator, 400, 7, 10.0)
    halves = [merge_moments_triton(*moments(half, torch.float32)) for half in (values[:300], values[300:])]
    actual = batch_norm_statistics_triton(
        torch.cat([partial for partial, _ in halves]), torch.cat([count for _, count in halves]), None, None, 1e-3
    )
    exact = exact_statistics(values, None, None, 1e-3)
    plain = exact_statistics([v.float() for v in values], None, None, 1e-3)
    for name, *rows in zip(ROWS, actual, exact, plain):
        result = compare(name, *rows)
        assert result.passed, str(result)


@pytest.mark.parametrize("programs", [1, 2, 65, 256, 257, 700])
def test_partials_are_added_in_order(programs):
    partials = torch.randn(programs, 3, 5, generator=torch.Generator().manual_seed(programs))
    actual = add_partials_triton(partials)
    result = compare("sums", actual, partials.double().sum(0), partials.sum(0), scale=programs**0.5)
    assert result.passed, str(result)
    assert torch.equal(actual, add_partials_triton(partials))
    assert torch.equal(actual, add_partials_triton(partials.transpose(1, 2).contiguous().transpose(1, 2)))


def test_repeats_bit_for_bit():
    values = tiles(torch.Generator().manual_seed(1), 300, 9, 3.0)
    partials, counts = moments(values, torch.float32)
    first = batch_norm_statistics_triton(partials, counts, None, None, 1e-5)
    assert torch.equal(first, batch_norm_statistics_triton(partials, counts, None, None, 1e-5))


def test_opcheck():
    partials, counts = moments(tiles(torch.Generator().manual_seed(2), 3, 5, 0.0), torch.float32)
    vector = torch.randn(5)
    torch.library.opcheck(merge_moments_triton, (partials, counts))
    torch.library.opcheck(batch_norm_statistics_triton, (partials, counts, vector, None, 1e-5))
    torch.library.opcheck(batch_norm_gradient_sums_triton, (torch.randn(4, 5), torch.randn(4, 5), torch.randn(6, 5)))
    torch.library.opcheck(add_partials_triton, (partials,))


# ---- the module's rules ------------------------------------------------------------------------------------------------------


def variants() -> dict[str, nn.BatchNorm2d]:
    return {
        "plain": nn.BatchNorm2d(5),
        "cumulative": nn.BatchNorm2d(5, momentum=None),
        "momentum": nn.BatchNorm2d(5, momentum=0.3, eps=1e-3),
        "no statistics": nn.BatchNorm2d(5, track_running_stats=False),
        "no parameters": nn.BatchNorm2d(5, affine=False),
        "half": nn.BatchNorm2d(5).half(),
    }


@pytest.mark.parametrize("name", variants())
def test_buffers_and_outputs_follow_the_module(name):
    """Three training steps and one evaluation: what the module gives, and leaves in its buffers."""
    ours, plain, exact = (variants()[name] for _ in range(3))
    exact.double()
    for step in range(4):
        for bn in (ours, plain, exact):
            bn.train(step < 3)
        x = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(step)) * 2 + 1
        x = x.to(torch.float16 if name == "half" else torch.float32)
        wanted, expected = exact(x.double()), plain(x)
        plan = batch_norm_plan(ours, tuple(x.shape))
        rows = x.transpose(1, 3).reshape(6, 4, 5).double()
        stats = statistics(plan, *moments(list(rows), torch.float32), ours.weight, ours.bias)
        update_running(ours, stats)
        mean, _, _, scale, added, _ = (row.view(-1, 1, 1) for row in stats)
        actual = ((x.float() - mean) * scale + added).to(x.dtype)
        result = compare("output", actual, wanted, expected)
        assert result.passed, str(result)
        assert dict(ours.named_buffers()).keys() == dict(plain.named_buffers()).keys()
        for key, buffer in ours.named_buffers():
            assert buffer.dtype == dict(plain.named_buffers())[key].dtype
            result = compare(key, buffer, exact.get_buffer(key), plain.get_buffer(key))
            assert result.passed, str(result)


def test_one_value_a_channel_is_the_module_s_own_error():
    bn = nn.BatchNorm2d(5)
    with pytest.raises(ValueError) as ours:
        batch_norm_plan(bn, (1, 5, 1, 1))
    with pytest.raises(ValueError) as theirs:
        bn(torch.randn(1, 5, 1, 1))
    assert str(ours.value) == str(theirs.value)
    batch_norm_plan(bn.eval(), (1, 5, 1, 1))


def test_reasons():
    class Mine(nn.BatchNorm2d):
        pass

    assert batch_norm_reasons("norm", nn.BatchNorm2d(5), 5) == []
    assert batch_norm_reasons("norm", nn.SyncBatchNorm(5), 5) == []
    assert "norm is a Mine, not a plain BatchNorm2d or SyncBatchNorm" in batch_norm_reasons("norm", Mine(5), 5)
    assert "norm must have 6 channels, got 5" in batch_norm_reasons("norm", nn.BatchNorm2d(5), 6)
    hooked = nn.BatchNorm2d(5)
    hooked.register_forward_hook(lambda *args: None)
    assert "norm has hooks, which only the reference calls" in batch_norm_reasons("norm", hooked, 5)
    patched = nn.BatchNorm2d(5)
    patched.forward = lambda x: x
    assert "the forward of norm was replaced, and only the reference calls it" in batch_norm_reasons("norm", patched, 5)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no distance between tiles": ("delta * delta * (count_a * share)", "0.0 * delta"),
    "no distance between programs": ("+ distance * distance * n[:, None]", "+ 0.0 * distance"),
    "means not weighted": (
        "tl.sum(means * n[:, None], 0) / tl.maximum(tile_count, 1.0)",
        "tl.sum(means, 0) / BLOCK_P",
    ),
    "biased variance": ("m2 / (count - 1.0)", "m2 / count"),
    "no eps": ("tl.rsqrt(m2 / count + eps)", "tl.rsqrt(m2 / count)"),
    "weight not in the scale": ("scale *= tl.load(weight", "scale += 0.0 * tl.load(weight"),
    "mean not subtracted": (
        "(tl.load(x + offset, inside, 0.0).to(tl.float32) - mean[None, :])",
        "tl.load(x + offset, inside, 0.0).to(tl.float32)",
    ),
    "a group too long": ("last = tl.minimum(programs, (group + 1) * GROUP)\n    total", "last = programs\n    total"),
}


def failures(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    (changed,) = mutate(monkeypatch, tmp_path, [kernels], old, new)
    for name in ("add_partials_kernel", "gradient_sums_kernel", "merge_moments_kernel", "statistics_kernel"):
        monkeypatch.setattr(launch, name, getattr(changed, name))
    results = compared((3, 70, 300))
    partials = torch.randn(300, 5)
    results.append(compare("partials", add_partials_triton(partials), partials.double().sum(0), partials.sum(0)))
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, "scale = rstd", "scale = rstd") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, *MUTATIONS[name])
