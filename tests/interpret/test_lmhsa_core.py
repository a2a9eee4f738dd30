"""The core of the attention sub-layer in training, in Triton's interpreter: fused and composed, every gradient against float64."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mutation import mutate
from torch import Tensor

from cmt_fast.ops._triton import attend, linear_gradient, norm, tiles
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops.attention import configs as attention_configs
from cmt_fast.ops.lmhsa import configs, triton_train_launch
from cmt_fast.ops.lmhsa.schema import lmhsa_core_bwd, lmhsa_core_fwd
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare

F16, F32 = torch.float16, torch.float32
ROOT = Path(__file__).parents[2]
GRADIENTS = ("dy", "dkv", "dtable", "dwq", "dbq", "dwo", "dbo")

#: Arguments of ``lmhsa_core_fwd`` by name, and dz.
Call = dict[str, object]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """As for a device with one multiprocessor: many programs take long here. Parts of 16 tokens."""
    limits = dataclasses.replace(ARCHITECTURES[80], multiprocessors=1)
    monkeypatch.setattr(triton_train_launch, "device_limits", lambda device: limits)
    monkeypatch.setattr(attention_configs, "_LEAST_QUERIES", 16)
    for config in (configs.core_backward_config, attention_configs.backward_config):
        config.cache_clear()
    yield
    for config in (configs.core_backward_config, attention_configs.backward_config):
        config.cache_clear()


def make(
    sizes: tuple[int, ...] = (2, 2, 20, 9, 24, 12, 10),
    products: torch.dtype = F16,
    stream: torch.dtype = F16,
    norm: bool = True,
    biases: bool = True,
    drop_path: bool = True,
    shortcut: bool = True,
    seed: int = 0,
) -> Call:
    """sizes: images, heads, tokens, keys, channels, dims of a head of q and k, and of v."""
    b, h, n, m, c, d, dv = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = F32) -> Tensor:
        return (torch.randn(size, generator=generator) * std + mean).to(dtype)

    return dict(
        x=normal(b, n, c, mean=0.5, dtype=stream),
        norm_weight=normal(c, std=0.2, mean=1.0) if norm else None,
        norm_bias=normal(c, std=0.2) if norm else None,
        eps=1e-6 if norm else None,
        query_weight=normal(h * d, c, std=c**-0.5, dtype=products),
        query_bias=normal(h * d, std=0.2) if biases else None,
        keys_values=normal(b, m, h * (d + dv), dtype=products),
        table=normal(h, n, m),
        out_weight=normal(c, h * dv, std=(h * dv) ** -0.5, dtype=products),
        out_bias=normal(c, std=0.2) if biases else None,
        row_scale=torch.tensor([1.25, 0.0])[:b] if drop_path else None,
        scale=d**-0.5,
        shortcut=shortcut,
        dz=normal(b, n, c, dtype=stream if shortcut else products),
    )


def plain(call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """z and the gradients by plain PyTorch, in ``dtype`` or in those of the call, rounding where autocast would."""
    a = {name: t.to(dtype or t.dtype) if isinstance(t, Tensor) else t for name, t in call.items()}
    products, h = a["query_weight"].dtype, len(a["table"])
    y = a["x"]
    if a["eps"] is not None:
        wide = torch.promote_types(y.dtype, F32)
        y = F.layer_norm(y.to(wide), y.shape[2:], a["norm_weight"], a["norm_bias"], a["eps"])
    names = ("keys_values", "table", "query_weight", "query_bias", "out_weight", "out_bias")
    leaves = [y.to(products)] + [a[name] for name in names]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y, keys_values, table, query_weight, query_bias, out_weight, out_bias = leaves

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (h, -1)).transpose(1, 2)

    def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(t, weight, None if bias is None else bias.to(weight.dtype))

    k, v = (heads(t) for t in keys_values.split([len(query_weight), out_weight.shape[1]], -1))
    logits = (heads(linear(y, query_weight, query_bias)) @ k.transpose(-2, -1)) * a["scale"] + table
    o = (logits.softmax(-1).to(products) @ v).transpose(1, 2).flatten(2)
    z = linear(o, out_weight, out_bias)
    if a["row_scale"] is not None:
        z = z * a["row_scale"].to(z.dtype)[:, None, None]
    if a["shortcut"]:
        z = a["x"] + z
    found = torch.autograd.grad(z, [t for t in leaves if t is not None], a["dz"].to(z.dtype))
    present = [name for name, t in zip(GRADIENTS, leaves) if t is not None]
    return dict(z=z.detach(), **dict(zip(present, found)))


def fused(call: Call, needs: list[bool] | None = None) -> dict[str, Tensor]:
    arguments = {name: t for name, t in call.items() if name != "dz"}
    z, lse = lmhsa_core_fwd(*arguments.values())
    both = [t for name, t in arguments.items() if name not in ("out_bias", "shortcut", "scale")]
    needs = needs or [True] * 4 + [call["query_bias"] is not None, True, call["out_bias"] is not None]
    found = lmhsa_core_bwd(call["dz"], *both, lse, call["scale"], needs)
    return dict(z=z, **{name: t for name, t, need in zip(GRADIENTS, found, needs) if need})


def compared(call: Call) -> list[Comparison]:
    exact, own, found = plain(call, torch.float64), plain(call), fused(call)
    assert found.keys() == own.keys()
    # the gradients of the logits cancel to 0 over the keys, and with them what is linear in them
    terms = {name: exact["dkv"].abs().max().item() for name in ("dy", "dtable", "dwq", "dbq")}
    return [
        compare(
            name,
            t.to(own[name].dtype),
            exact[name],
            own[name],
            backward=name != "z",
            dtype=call["query_weight"].dtype,
            scale=terms.get(name),
        )
        for name, t in found.items()
    ]


def check(call: Call) -> None:
    failed = [str(result) for result in compared(call) if not result.passed]
    assert not failed, failed


@pytest.mark.parametrize("part", range(8))
def test_random_shapes(part):
    """Fused where the products are 16 bit, composed in float32; the stream in either."""
    generator = torch.Generator().manual_seed(part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(13):
        sizes = draw(1, 2), draw(1, 2), draw(1, 24), draw(1, 20), draw(2, 40), draw(1, 20), draw(1, 20)
        products = (F16, F16, F32)[draw(0, 2)]
        flags = [bool(draw(0, 3)) for _ in range(4)]
        check(make(sizes, products, (products, F32)[draw(0, 1)], *flags, seed=seed))


@pytest.mark.parametrize("stream", [F16, F32], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 5, 70, 16, 8, 8), (1, 1, 5, 4, 272, 8, 8), (1, 1, 40, 9, 136, 8, 8)],
    ids=["keys", "wide", "chunks"],
)
def test_many_keys_and_channels(sizes, stream):
    """Keys that stream and more than 256 channels are composed; three chunks of channels are fused."""
    check(make(sizes, F16, stream))


def test_fused_or_composed(monkeypatch):
    """Stages a, b and c of the aligned variant in 16 bit are fused; stage d, float32 and many keys are not."""
    monkeypatch.undo()
    for width, keys, itemsize, expected in (
        (64, 49, 2, True),
        (256, 49, 2, True),
        (512, 49, 2, False),
        (64, 49, 4, False),
        (64, 1050, 2, False),
    ):
        sizes = 128, width // 64, 196, keys, width, 64, 64, itemsize, False
        for limits in ARCHITECTURES.values():
            assert (configs.core_forward_config(*sizes, limits) is not None) == expected
            assert (configs.core_backward_config(*sizes, limits) is not None) == expected


@pytest.mark.parametrize("products", [F16, F32], ids=str)
def test_only_what_is_needed(products):
    call = make((1, 1, 18, 5, 16, 8, 8), products)
    expected = fused(call)
    for i, name in enumerate(GRADIENTS):
        found = fused(call, [j == i for j in range(7)])
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("products", [F16, F32], ids=str)
def test_strides_poisoned_memory_and_repetition(products):
    call = make((2, 1, 18, 5, 16, 8, 8), products, products)
    expected = fused(call)
    turned = {
        name: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
        if isinstance(t, Tensor)
        else t
        for name, t in call.items()
    }
    with poisoned_empty():
        found = fused(turned)
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    call["dz"] = torch.ones(1).to(products).expand_as(call["dz"])
    check(call)
    empty = {name: t[:0] if name in ("x", "keys_values", "row_scale", "dz") else t for name, t in call.items()}
    assert fused(empty)["z"].shape == (0, 18, 16) and not fused(empty)["dwq"].any()


def test_opcheck():
    call = make((1, 1, 2, 3, 8, 4, 4), F16, F32)
    quick = ("test_schema", "test_faketensor")
    arguments = {name: t for name, t in call.items() if name != "dz"}
    for shortcut in (True, False):
        torch.library.opcheck(lmhsa_core_fwd, (*(arguments | dict(shortcut=shortcut)).values(),), test_utils=quick)
    _, lse = lmhsa_core_fwd(*arguments.values())
    both = [t for name, t in arguments.items() if name not in ("out_bias", "shortcut", "scale")]
    for needs in ([True] * 7, [False, True] * 3 + [False]):
        torch.library.opcheck(lmhsa_core_bwd, (call["dz"], *both, lse, call["scale"], needs), test_utils=quick)


@pytest.mark.parametrize("stage", stage_shapes("cmt_s", 128)[:3], ids=lambda s: s.name)
def test_bytes_that_move_are_the_plan_s(stage, monkeypatch):
    """In units of a map, the plan has: forward, one read and one written; backward, two read and three written (dy, dq and the output of the
    attention), four read by the products of both weights, and the gradient of the logits, 64 columns a row, written and read again."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.launches")
    (forward,), backward = (
        make(stage, torch.bfloat16, ARCHITECTURES[90]) for make in (launches.lmhsa_core_fwd, launches.lmhsa_core_bwd)
    )
    unit = stage.batch * stage.queries * stage.dim * 2
    arguments = forward.arguments
    keys_values, table, lse = (arguments[name].nbytes for name in ("keys_values", "table", "lse"))
    assert 2 * unit <= forward.reads + forward.writes <= 1.1 * (2 * unit + keys_values + table + lse)
    logits = stage.batch * stage.heads * stage.queries * 64 * 2
    plan = (2 + 3 + 4) * unit + 2 * logits + 2 * keys_values + 2 * table + lse
    product = 0 if stage.heads == 1 else 2 * unit + arguments["query_weight"].nbytes  # dy = dq Wq
    moved = sum(launch.reads + launch.writes for launch in backward) + product
    assert plan <= moved <= 1.1 * plan


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no stochastic depth": ("        total *= tl.load(row_scale + image).to(tl.float32)", "        total *= 1.0"),
    "no shortcut": ("        total += load_tile(x, C, 0, left, 0, C, BLOCK_N, BLOCK_C).to(tl.float32)", "        total += 0.0"),
    "no bias of LayerNorm": ("x += tl.load(bias + c, c < C, 0.0).to(tl.float32)", "x += 0.0"),
    "log-sum-exp of the first head": ("lse + (image * HEADS + head) * tokens + first + row", "lse + image * HEADS * tokens + first + row"),
    "gradient without stochastic depth": ("BLOCK_N, BLOCK_C).to(tl.float32) * factor", "BLOCK_N, BLOCK_C).to(tl.float32)"),
    "moments of the first tile": ("moments + 2 * (token + row) + 1", "moments + 2 * (image * tokens + row) + 1"),
    "dk without scale": ("dk * scale", "dk"),
    "table of the first head": ("table + head * table_head + first", "table + first"),
    "dy of the queries": ("rows = tl.dot(found, weight, input_precision=PRECISION)", "rows = tl.dot(query, weight, input_precision=PRECISION)"),
    "no norm before the query's weight": ("(normal.to(tl.float32) - mean) * rstd", "normal.to(tl.float32)"),
    "weights of the first head": ("out_weight + head * VALUE_DIM, HEADS * VALUE_DIM, start", "out_weight, HEADS * VALUE_DIM, start"),
}  # fmt: skip


def wrong_results(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    from cmt_fast.ops.lmhsa import triton_train_kernels

    modules = [tiles, norm, attend, linear_gradient, triton_train_kernels]
    *_, gradient, kernels = mutate(monkeypatch, tmp_path, modules, old, new)
    monkeypatch.setattr(triton_train_launch, "linear_gradient_launches", gradient.linear_gradient_launches)
    for name in ("core_forward_kernel", "core_backward_kernel"):
        monkeypatch.setattr(triton_train_launch, name, getattr(kernels, name))
    results = compared(make((2, 2, 36, 9, 24, 12, 10))) + compared(make((2, 1, 18, 9, 24, 12, 10)))
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    assert wrong_results(monkeypatch, tmp_path, "dk * scale", "dk * scale") == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a wrong kernel computes
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert wrong_results(monkeypatch, tmp_path, *MUTATIONS[name])
