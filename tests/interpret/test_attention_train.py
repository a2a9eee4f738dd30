"""Attention in training in Triton's interpreter: every gradient against float64, as an operator, as an autograd function, and when it is chosen."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from mutation import mutate
from torch import Tensor

import cmt_fast
from cmt_fast.functional import reduced_kv_attention
from cmt_fast.ops._triton import attend, parts, tiles
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops.attention import autograd, configs, triton_launch, triton_train_kernels, triton_train_launch
from cmt_fast.ops.attention.autograd import ReducedKVAttentionFunction
from cmt_fast.ops.attention.reference import reduced_kv_attention_reference
from cmt_fast.ops.attention.schema import reduced_kv_attention_bwd, reduced_kv_attention_fwd
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.tolerance import Comparison, compare

DTYPES = (torch.float32, torch.float16)
NAMES = ("out", "dq", "dk", "dv", "dbias")


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Of the forward pass: as for a device with one multiprocessor, since many programs take long here."""
    limits = dataclasses.replace(ARCHITECTURES[90], multiprocessors=1)
    monkeypatch.setattr(triton_launch, "device_limits", lambda device: limits)
    monkeypatch.setattr(triton_train_launch, "device_limits", lambda device: limits)


@pytest.fixture
def cut(monkeypatch):
    """Cut the backward pass otherwise: ``cut(few_keys=4)`` makes keys stream, ``cut(least_queries=16)`` makes parts of the queries."""
    cached = (configs.backward_config, configs.query_gradient_config)

    def set_tiles(few_keys: int = 64, least_queries: int = 256) -> None:
        monkeypatch.setattr(configs, "_backward_tile", lambda *_: (16, 16, 4))
        monkeypatch.setattr(configs, "FEW_KEYS", few_keys)
        monkeypatch.setattr(configs, "_LEAST_QUERIES", least_queries)
        for config in cached:
            config.cache_clear()

    yield set_tiles
    for config in cached:
        config.cache_clear()


def make(batch, heads, queries, keys, qk_dim, v_dim, dtype, *, bias=True, seed=0) -> list[Tensor | None]:
    """q, k, v and bias as the layers make them: (B, N, h, d) transposed, k and v parts of one tensor; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    q = normal(batch, queries, heads, qk_dim).transpose(1, 2)
    kv = normal(batch, keys, heads * (qk_dim + v_dim))
    k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in kv.split([heads * qk_dim, heads * v_dim], -1))
    table = normal(heads, queries, keys) if bias else None
    return [q, k, v, table, normal(batch, queries, heads, v_dim).transpose(1, 2)]


def run(function: Callable[..., Tensor], inputs: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, and the gradient of each input that there is."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs[:4]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], inputs[4].to(out.dtype))]


def fused(*tensors: Tensor | None) -> Tensor:
    return reduced_kv_attention(*tensors, backend="triton")


def plain(q: Tensor, *others: Tensor | None) -> Tensor:
    return reduced_kv_attention_reference(q, *others, q.shape[-1] ** -0.5)


def compared(inputs: list[Tensor | None]) -> list[Comparison]:
    """The output and every gradient. The gradients of the logits cancel to 0 over the keys: their terms are P times dP."""
    q, k, v, _, grad = (None if t is None else t.double() for t in inputs)
    terms = (grad @ v.transpose(-2, -1)).abs().max().item()
    factor = q.shape[-1] ** -0.5
    sizes = dict(dq=terms * factor * k.abs().max().item(), dk=terms * factor * q.abs().max().item(), dbias=terms)
    exact, own = run(plain, inputs, torch.float64), run(plain, inputs)
    return [
        compare(name, *values, backward=name != "out", scale=sizes.get(name))
        for name, *values in zip(NAMES, run(fused, inputs), exact, own)
    ]


def check(inputs: list[Tensor | None]) -> None:
    failed = [str(result) for result in compared(inputs) if not result.passed]
    assert not failed, failed


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(8))
def test_random_shapes(part, cut):
    """Some with streaming keys, some with queries in several parts."""
    generator = torch.Generator().manual_seed(part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(13):
        streaming, parted = not draw(0, 3), not draw(0, 2)
        cut(few_keys=4 if streaming else 64, least_queries=16 if parted else 256)
        keys = draw(17, 24) if streaming else draw(1, 32)
        batch = draw(1, 2)
        queries = draw(17, 36) if parted else draw(1, 16)
        sizes = batch, draw(1, 3 - batch), queries, keys, draw(1, 24), draw(1, 24)
        check(make(*sizes, DTYPES[draw(0, 1)], bias=bool(draw(0, 3)), seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 20, 1, 8, 8), (2, 2, 1, 7, 8, 8), (1, 1, 1, 1, 1, 1), (1, 1, 5, 70, 46, 52), (1, 1, 5, 9, 256, 200)],
    ids=["one key", "one query", "one of all", "many keys", "wide heads"],
)
def test_edges(sizes, dtype):
    check(make(*sizes, dtype))


def test_parts_follow_from_the_shape_alone():
    """Whatever the device; each a whole number of tiles, and together all queries."""
    for queries in (1, 49, 196, 784, 3136, 67200):
        for programs in (1, 2, 100, 1000):
            for block_n in (16, 64):
                parts, part_queries = configs.query_parts(programs, queries, block_n)
                assert part_queries % block_n == 0 and (parts - 1) * part_queries < queries <= parts * part_queries
    assert configs.query_parts(128, 3136, 64)[0] == 2 and configs.query_parts(256, 3136, 64)[0] == 1


def test_strides():
    """Inputs, and the gradient of the output, that are reversed in memory, expanded, or not aligned."""
    inputs = make(2, 2, 9, 7, 5, 6, torch.float16)
    expected = run(fused, inputs)
    reversed_ = [t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) for t in inputs]
    assert all(map(torch.equal, run(fused, reversed_), expected))
    shared = [inputs[0][:1].expand(2, -1, -1, -1), inputs[1][:, :1].expand(-1, 2, -1, -1), *inputs[2:4]]
    for grad in (inputs[4][:1, :, :, :1].expand(2, -1, -1, 6), torch.ones(1).half().expand(2, 2, 9, 6)):
        check([*inputs[:4], grad])
        check([*shared, grad])
    bias = torch.empty(2 * 9 * 7 + 1, dtype=torch.float16)[1:].view(2, 9, 7).copy_(inputs[3])
    assert all(map(torch.equal, run(fused, [*inputs[:3], bias, inputs[4]]), expected))
    dq, dk, dv = torch.autograd.grad(fused(*(t.requires_grad_() for t in inputs[:3]), None).sum(), inputs[:3])
    assert all(t.transpose(1, 2).is_contiguous() for t in (dq, dk, dv)), "the layers take them without a copy"


@pytest.mark.parametrize("few_keys", [64, 4])
def test_every_subset_of_gradients(few_keys, cut):
    cut(few_keys=few_keys)
    inputs = make(1, 1, 3, 17, 5, 6, torch.float32)
    expected = run(fused, inputs)[1:]
    for chosen in range(1, 15) if few_keys == 64 else (1, 2, 4, 8, 9, 14):
        needs = [bool(chosen >> i & 1) for i in range(4)]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs)]
        found = torch.autograd.grad(fused(*leaves), [t for t in leaves if t.requires_grad], inputs[4])
        assert all(map(torch.equal, found, [t for t, need in zip(expected, needs) if need])), needs


def test_nothing_to_do():
    """No image; no query."""
    inputs = make(2, 1, 3, 4, 5, 6, torch.float32)
    for images in (True, False):
        empty = [t[:0] if images else t[:, :, :0] for t in inputs[:1]] + [t[:0] if images else t for t in inputs[1:3]]
        grad = inputs[4][:0] if images else inputs[4][:, :, :0]
        bias = inputs[3] if images else inputs[3][:, :0]
        assert all(
            t.shape == u.shape and not t.any() for t, u in zip(run(fused, [*empty, bias, grad])[1:], [*empty, bias])
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is meant to happen
@pytest.mark.parametrize("few_keys", [64, 4])
def test_bias_of_minus_infinity(few_keys, cut):
    """Keys left out get no gradient; a query that nothing is left of has none that is finite, and no other suffers from it."""
    cut(few_keys=few_keys)
    inputs = make(1, 1, 18, 20, 8, 8, torch.float32)
    inputs[3][..., :17] = float("-inf")
    check(inputs)
    assert not any(t[:, :, :17].any() for t in run(fused, inputs)[2:4])
    inputs[3][:, 3] = float("-inf")
    _, dq, *_, dbias = run(fused, inputs)
    others = [row for row in range(18) if row != 3]
    assert dq[:, :, 3].isnan().all() and dq[:, :, others].isfinite().all() and dbias[:, others].isfinite().all()


@pytest.mark.parametrize("few_keys", [64, 4])
def test_repeats_bit_for_bit_and_writes_every_element(few_keys, cut):
    cut(few_keys=few_keys, least_queries=16)
    inputs = make(2, 1, 20, 20, 9, 12, torch.float16)
    expected = run(fused, inputs)
    with poisoned_empty():
        assert all(map(torch.equal, run(fused, inputs), expected))


def test_no_tensor_of_logits_in_float32(monkeypatch):
    """Of 16-bit inputs the gradient of the logits is 16 bit; without a gradient of the bias there is none at all."""
    launches = []
    launch = triton_train_launch.Launch.run
    monkeypatch.setattr(triton_train_launch.Launch, "run", lambda self: (launches.append(self), launch(self))[1])
    inputs = make(2, 1, 20, 13, 8, 8, torch.float16)
    run(fused, inputs)
    written = [t for launch in launches for t in launch.arguments.values() if isinstance(t, Tensor)]
    assert {t.dtype for t in written if t.numel() >= 2 * 20 * 13 and t.shape[-1] >= 13} == {torch.float16}
    launches.clear()
    run(fused, [*inputs[:3], None, inputs[4]])
    assert all(launch.arguments.get("dlogits") is None for launch in launches)


# ---- as an operator, and as an autograd function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [2, 65])
def test_opcheck(keys):
    quick = ("test_schema", "test_faketensor")
    q, k, v, table, grad = make(1, 2, 2, keys, 3, 4, torch.float16)
    torch.library.opcheck(reduced_kv_attention_fwd, (q, k, v, table, 0.5), test_utils=quick)
    out, lse = reduced_kv_attention_fwd(q, k, v, table, 0.5)
    arguments = (grad, q, k, v, table, lse, None if keys == 2 else out, 0.5)
    torch.library.opcheck(reduced_kv_attention_bwd, (*arguments, [True] * 4), test_utils=quick)
    torch.library.opcheck(reduced_kv_attention_bwd, (*arguments, [True, False, True, False]), test_utils=quick)
    if keys == 2:
        torch.library.opcheck(reduced_kv_attention_bwd, (*arguments, [True] * 4))


@pytest.fixture
def reference_behind(monkeypatch):
    """The function with the reference's formulas in the place of the kernels: what is left is what autograd does with them."""

    def forward(q, k, v, bias, scale):
        return reduced_kv_attention_reference(q, k, v, bias, scale), q.new_zeros(q.shape[:3], dtype=torch.float32)

    def backward(grad, q, k, v, bias, lse, out, scale, needs):
        return autograd._differentiable_bwd(grad, q, k, v, bias, scale)

    monkeypatch.setattr(autograd, "reduced_kv_attention_fwd", forward)
    monkeypatch.setattr(autograd, "reduced_kv_attention_bwd", backward)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_function(bias, reference_behind):
    inputs = [t if t is None else t.requires_grad_() for t in make(2, 2, 3, 4, 3, 2, torch.float64, bias=bias)[:4]]
    assert torch.autograd.gradcheck(ReducedKVAttentionFunction.apply, (*inputs, 0.4))
    assert torch.autograd.gradgradcheck(ReducedKVAttentionFunction.apply, (*inputs, 0.4))


def test_finite_differences():
    """Of the kernels themselves, along one random direction of all inputs, in float32: a central difference of second order."""
    inputs = make(1, 2, 6, 5, 4, 3, torch.float32)
    along = make(1, 2, 6, 5, 4, 3, torch.float32, seed=1)[:4]
    slope = sum((g.double() * d.double()).sum() for g, d in zip(run(fused, inputs)[1:], along))

    def loss(step: float) -> Tensor:
        moved = [t + step * d for t, d in zip(inputs, along)]
        return (fused(*moved).double() * inputs[4].double()).sum()

    step = 2.0**-7
    difference = (loss(step) - loss(-step)) / (2 * step)
    assert abs(difference - slope) < 1e-3 * abs(slope), "an error of step squared, 6e-5, times the third derivative"


def test_double_backward():
    inputs = make(1, 1, 3, 4, 3, 2, torch.float32)

    def second(function) -> tuple[Tensor, ...]:
        leaves = [t.double().detach().float().requires_grad_() for t in inputs[:4]]
        first = torch.autograd.grad(function(*leaves), leaves, inputs[4], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for found, expected in zip(second(fused), second(plain)):
        torch.testing.assert_close(found, expected)


def test_compiles_into_one_graph():
    inputs = make(1, 2, 9, 7, 5, 6, torch.float32)
    compiled = torch.compile(lambda *t: fused(*t).transpose(1, 2).flatten(2), fullgraph=True, backend="aot_eager")
    expected = run(fused, inputs)
    flat = [*inputs[:4], inputs[4].transpose(1, 2).flatten(2)]
    assert all(map(torch.equal, run(compiled, flat)[1:], expected[1:]))


# ---- autocast, and when it is chosen ---------------------------------------------------------------------------------------------


def test_under_autocast():
    """q, k and v are cast as for PyTorch's products, the float32 bias is not; gradients come back in float32."""
    inputs = make(2, 1, 20, 7, 8, 8, torch.float32)
    inputs = [*(t.half().float() for t in inputs[:3]), inputs[3], inputs[4].half()]

    def mixed(function):
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return function(*tensors)

        return run(call, inputs)

    for name, *values in zip(NAMES, mixed(fused), run(plain, inputs, torch.float64), mixed(plain)):
        result = compare(name, *values, backward=name != "out", dtype=torch.float16)
        assert result.passed, str(result)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert fused(*inputs[:4]).dtype == torch.float16


def test_auto_takes_it_where_gradients_are_needed():
    q, k, v, bias, _ = make(1, 1, 3, 4, 5, 6, torch.float32)
    bias.requires_grad_()
    calls = cmt_fast.explain(reduced_kv_attention, q, k, v, bias).calls
    assert ("reduced_kv_attention", "triton") in calls
    assert type(reduced_kv_attention(q, k, v, bias).grad_fn).__name__ == "ReducedKVAttentionFunctionBackward"
    assert reduced_kv_attention(q, k, v, bias.detach()).grad_fn is None


def test_keeps_the_output_only_where_keys_stream():
    for keys, kept in ((7, False), (70, True)):
        q, k, v, bias, _ = make(1, 1, 3, keys, 5, 6, torch.float32)
        out = fused(q.requires_grad_(), k, v, bias)
        saved = out.grad_fn.saved_tensors
        assert (saved[5] is not None) == kept
        assert saved[4].shape == (1, 1, 3) and saved[4].dtype == torch.float32
        exact = (q.double() @ k.double().transpose(-2, -1) * 5**-0.5 + bias).logsumexp(-1)
        torch.testing.assert_close(saved[4], exact.float())


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "log-sum-exp without the peak": (
        "input_precision=PRECISION), peak + tl.log2(total) / UNIT",
        "input_precision=PRECISION), tl.log2(total) / UNIT",
    ),
    "no row sums": ("(dweights - delta[:, None])", "dweights"),
    "row sums of the first tile": (
        "sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)",
        "sums = tl.sum(g.to(tl.float32), 1)",
    ),
    "dq without scale": (
        "store_tile(place, found, HEADS * KEY_DIM",
        "store_tile(place, found / scale, HEADS * KEY_DIM",
    ),
    "dk without scale": ("dk_sum * scale", "dk_sum"),
    "dv of the gradient of the logits": ("tl.dot(tl.trans(weights), g, dv_sum", "tl.dot(tl.trans(change), g, dv_sum"),
    "dk of the weights": ("tl.dot(tl.trans(change), query, dk_sum", "tl.dot(tl.trans(weights), query, dk_sum"),
    "last queries of a part left out": (
        "(part + 1) * part_queries, queries)",
        "(part + 1) * part_queries, queries - 8)",
    ),
    "bias of the first head": ("table += head * bias_head + first", "table += first"),
    "keys of the first head": (
        "k + image * k_image + head * k_head, k_row, start_key",
        "k + image * k_image, k_row, start_key",
    ),
    "log-sum-exp of the first image": (
        "    lse += (image * HEADS + head) * queries\n    if",
        "    lse += head * queries\n    if",
    ),
    "all parts in one place": ("first_row = (part * images + image) * keys", "first_row = image * keys"),
    "one part left out": ("for _ in tl.range(count,", "for _ in tl.range(count - 1,"),
    "sums of the first rows": ("out + (first + i // ROW) * OUT_ROW", "out + i // ROW * OUT_ROW"),
    "keys of the second tile": (
        "_, change = attend_backward(\n                query,\n                g,\n                key_rows,",
        "_, change = attend_backward(\n                query,\n                g,\n                0 * key_rows,",
    ),
}


def wrong_results(monkeypatch, tmp_path, cut, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    from cmt_fast.ops.attention import triton_kernels

    modules = [tiles, attend, parts, triton_kernels, triton_train_kernels]
    *_, added, forward, kernels = mutate(monkeypatch, tmp_path, modules, old, new)
    monkeypatch.setattr(triton_launch, "reduced_kv_attention_kernel", forward.reduced_kv_attention_kernel)
    monkeypatch.setattr(triton_train_launch, "sum_parts_launch", added.sum_parts_launch)
    for name in ("attention_backward_kernel", "query_gradient_kernel"):
        monkeypatch.setattr(triton_train_launch, name, getattr(kernels, name))
    results = []
    for few_keys in (64, 4):
        cut(few_keys=few_keys, least_queries=16)
        results += compared(make(2, 2, 20, 18, 9, 12, torch.float16))
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path, cut):
    assert wrong_results(monkeypatch, tmp_path, cut, "dk_sum * scale", "dk_sum * scale") == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a wrong kernel computes
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, cut):
    assert wrong_results(monkeypatch, tmp_path, cut, *MUTATIONS[name])
