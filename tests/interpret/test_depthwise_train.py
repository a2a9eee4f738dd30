"""The Triton kernels of the depthwise convolutions and their gradients in the interpreter: against float64, as operators, and when chosen."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from layers import draw
from mutation import mutate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cmt_fast
from cmt_fast.functional import depthwise_conv3x3, depthwise_reduce, lpu
from cmt_fast.modules import Block
from cmt_fast.ops._triton import sliding
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops.depthwise import configs, triton_kernels, triton_launch, triton_train_kernels, triton_train_launch
from cmt_fast.ops.depthwise.schema import conv3x3_bwd_triton, conv3x3_fwd_triton, reduce_bwd_triton, reduce_fwd_triton
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.tolerance import Comparison, compare
from cmt_fast.testing.verification import verify

DTYPES = (torch.float32, torch.float16)
CHANNELS = (1, 3, 5, 12, 46, 52)


@pytest.fixture(autouse=True)
def insist() -> Iterator[None]:
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


@pytest.fixture
def on(monkeypatch):
    """Choose tiles as for another device, and cut sums as for another number of programs: few of them mean long strips."""

    def set_limits(multiprocessors: int = 132, sums: int = 400) -> None:
        limits = dataclasses.replace(ARCHITECTURES[90], multiprocessors=multiprocessors)
        monkeypatch.setattr(triton_launch, "device_limits", lambda device: limits)
        monkeypatch.setattr(triton_train_launch, "device_limits", lambda device: limits)
        monkeypatch.setattr(configs, "PROGRAMS_WITH_SUMS", sums)
        forget()

    def forget() -> None:
        configs.conv3x3_backward_config.cache_clear()
        configs.reduce_backward_config.cache_clear()

    yield set_limits
    monkeypatch.undo()
    forget()


@dataclasses.dataclass
class Call:
    """One convolution, and the gradient that arrives at its result: 3x3 with padding if ``k`` is None, else k x k with stride k."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    k: int | None
    shortcut: bool

    def to(self, dtype: torch.dtype) -> "Call":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.k is None:
            return depthwise_conv3x3(x, weight, bias, shortcut=self.shortcut)
        return depthwise_reduce(x, weight, bias)

    def run(self, backend: str = "triton") -> dict[str, Tensor]:
        """y and every gradient."""
        names = ["x", "weight"] if self.bias is None else ["x", "weight", "bias"]
        leaves = [getattr(self, name).detach().requires_grad_() for name in names]
        with cmt_fast.use_backend(backend):
            y = self.apply(*leaves)
        gradients = torch.autograd.grad(y, leaves, self.grad)
        return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(names, gradients)}}

    def compared(self) -> list[Comparison]:
        with poisoned_empty():
            actual = self.run()
        exact, plain = self.to(torch.float64).run("reference"), self.run("reference")
        scales = {}
        if self.x.dtype == torch.float32:  # in which the sums are made, and their terms may cancel
            sizes = dataclasses.replace(self, x=self.x.abs(), grad=self.grad.abs()).run("reference")
            scales = {name: sizes[name].max().item() for name in ("dweight", "dbias") if name in sizes}
        return [
            compare(name, actual[name], exact[name], plain[name], backward=name != "y", scale=scales.get(name))
            for name in exact
        ]

    def check(self) -> None:
        for result in self.compared():
            assert result.passed, f"{tuple(self.x.shape)}, k {self.k}: {result}"


def make_call(
    shape: tuple[int, int, int, int],
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    shortcut: bool = True,
    seed: int = 0,
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    (images, height, width, channels), side = shape, k or 3
    out = shape if k is None else (images, height // k, width // k, channels)
    shapes = (shape, (channels, 1, side, side), (channels,), out)
    x, weight, b, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return Call(x, weight, b if bias else None, grad, k, shortcut)


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_random_shapes_3x3(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(16):
        on((1, 132)[seed % 7 == 0], (1, 400)[seed % 7 == 1])
        height, width = draw(generator, 1, 3), draw(generator, 1, 6)
        shape = draw(generator, 1, 2), height, width, CHANNELS[draw(generator, 0, 5)]
        make_call(shape, None, DTYPES[seed % 2], draw(generator, 0, 3) > 0, bool(draw(generator, 0, 1)), seed).check()


@pytest.mark.parametrize("part", range(4))
def test_random_shapes_reduction(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(22):
        on((1, 132)[seed % 7 == 0], (1, 400)[seed % 7 == 1])
        k = (1, 1, 2, 2, 3, 4)[draw(generator, 0, 5)]
        height, width = draw(generator, k, 2 * k + 2), draw(generator, k, 2 * k + 2)
        shape = draw(generator, 1, 2), height, width, CHANNELS[draw(generator, 0, 5)]
        make_call(shape, k, DTYPES[seed % 2], draw(generator, 0, 3) > 0, seed=seed).check()


EDGES = {
    "one row": (2, 1, 9, 20),
    "one column": (2, 5, 1, 20),
    "one pixel": (3, 1, 1, 5),
    "one channel": (1, 4, 3, 1),
    "two tiles of channels": (1, 2, 3, 76),
    "three tiles of channels": (1, 2, 1, 165),
    "many images": (40, 2, 3, 8),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name, on):
    on(1, 400)
    make_call(EDGES[name], None, torch.float32).check()
    on(1, 1)
    make_call(EDGES[name], None, torch.float16).check()
    make_call(EDGES[name], 1).check()


@pytest.mark.parametrize("k", [2, 4, 8])
def test_rows_and_columns_beyond_the_last_window(k):
    """They have gradient 0, and nobody reads them."""
    for height, width in ((k, 2 * k - 1), (k + 1, k)):
        call = make_call((2, height, width, 5), k, DTYPES[width > k])
        call.check()
        call.x[:, height // k * k :] = call.x[:, :, width // k * k :] = float("nan")
        results = call.run()
        assert all(result.isfinite().all() for result in results.values())
        beyond = results["dx"].clone()
        beyond[:, : height // k * k, : width // k * k] = 0
        assert beyond.count_nonzero() == 0


def test_no_image():
    for k in (None, 2):
        call = make_call((2, 3, 4, 5), k)
        call.x, call.grad = call.x[:0], call.grad[:0]
        results, expected = call.run(), call.run("reference")
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_not_a_number_reaches_its_neighbours_only():
    call = make_call((2, 6, 8, 10))
    call.x[0, 2, 3, 4] = call.grad[1, 3, 4, 5] = float("nan")
    results = call.run()
    touched = torch.zeros(2, 6, 8, 10, dtype=torch.bool)
    touched[0, 1:4, 2:5, 4] = True
    assert torch.equal(results["y"].isnan(), touched)
    touched = torch.zeros(2, 6, 8, 10, dtype=torch.bool)
    touched[1, 2:5, 3:6, 5] = True
    assert torch.equal(results["dx"].isnan(), touched)
    assert results["dweight"].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [4, 5]
    assert results["dbias"].isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("k", [None, 2])
def test_a_run_repeats_bit_for_bit_on_any_device(k, on):
    """No sum depends on how many multiprocessors there are."""
    call = make_call((2, 4, 5, 20), k, torch.float16)
    results = []
    for multiprocessors in (1, 132, 132):
        on(multiprocessors)
        results.append(call.run())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# ---- as functions of autograd --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)][1:], ids=str)
def test_only_what_is_needed(needs, k):
    call = make_call((2, 3, 4, 5), k)
    full = call.run()
    leaves = [t.clone().requires_grad_(bool(need)) for t, need in zip((call.x, call.weight, call.bias), needs)]
    call.apply(*leaves).backward(call.grad)
    for leaf, need, name in zip(leaves, needs, ("dx", "dweight", "dbias")):
        assert (leaf.grad is not None) == bool(need)
        if need:  # dx alone comes from the kernel of the forward pass, whose sums have another order
            torch.testing.assert_close(leaf.grad, full[name])


def strided(t: Tensor) -> Tensor:
    """The same values with other strides, an offset, and NaN between them."""
    wide = t.new_full(tuple(2 * n + 1 for n in t.shape), float("nan"))
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


@pytest.mark.parametrize("k", [None, 2])
def test_strided_inputs_and_gradients(k):
    call = make_call((2, 3, 4, 5), k, torch.float16)
    expected = call.run()
    changed = {name: strided(getattr(call, name)) for name in ("x", "weight", "bias", "grad")}
    assert not any(t.is_contiguous() for t in changed.values())
    for name, actual in dataclasses.replace(call, **changed).run().items():
        assert torch.equal(actual, expected[name])
    one = call.grad.new_ones(1).expand(call.grad.shape)  # the gradient of a sum: strides 0
    expected = dataclasses.replace(call, grad=one.contiguous()).run()
    assert all(torch.equal(dataclasses.replace(call, grad=one).run()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("k", [None, 2])
def test_saved_input_is_guarded(k):
    call = make_call((1, 3, 4, 5), k)
    y = call.apply(call.x, call.weight.requires_grad_())
    call.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("k", [None, 2])
def test_second_derivatives(k):
    """A gradient penalty does not depend on the backend."""
    call = make_call((1, 3, 4, 5), k)

    def penalty(call: Call, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (call.x, call.weight, call.bias)]
        with cmt_fast.use_backend(backend):
            first = torch.autograd.grad(call.apply(*leaves).pow(3).sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    results = penalty(call, "triton"), penalty(call.to(torch.float64), "reference"), penalty(call, "reference")
    for actual, exact, plain in zip(*results):
        result = compare("second derivative", actual, exact, plain, backward=True)
        assert result.passed, str(result)


@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("k, shortcut", [(None, True), (None, False), (2, False)])
def test_autocast(k, shortcut, stream):
    """The dtypes of plain PyTorch: of a convolution autocast's, which a shortcut in float32 promotes; of parameters their own."""
    call = make_call((2, 3, 4, 5), k, torch.float16, shortcut=shortcut).to(torch.float32)
    call.x = call.x.to(stream)

    def run(call: Call, backend: str, enabled: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (call.x, call.weight, call.bias)]
        with cmt_fast.use_backend(backend), torch.autocast("cpu", torch.float16, enabled=enabled):
            y = call.apply(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, call.grad.to(y.dtype))]

    exact = run(call.to(torch.float64), "reference", False)
    for actual, e, plain in zip(run(call, "triton", True), exact, run(call, "reference", True)):
        result = compare("autocast", actual, e, plain, backward=True, dtype=torch.float16)
        assert result.passed, str(result)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # the autograd function stands outside
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = make_call((1, 2, 3, 4), None, dtype)
    x, weight, bias, grad = call.x, call.weight, call.bias, call.grad
    torch.library.opcheck(conv3x3_fwd_triton, (strided(x), weight, bias, True))
    torch.library.opcheck(conv3x3_bwd_triton, (strided(grad), x, weight, True, True, True, True))
    torch.library.opcheck(conv3x3_bwd_triton, (grad, x, weight.float(), False, False, False, True))
    call = make_call((1, 2, 3, 4), 2, dtype)
    x, weight, bias, grad = call.x, call.weight, call.bias, call.grad
    torch.library.opcheck(reduce_fwd_triton, (strided(x), weight, bias))
    torch.library.opcheck(reduce_bwd_triton, (strided(grad), x, weight, True, True, True))


@pytest.mark.parametrize("k, dynamic", [(None, False), (2, True)])
def test_compiles_into_one_graph(k, dynamic):
    torch.compiler.reset()
    call = make_call((1, 2, 3, 4), k)
    compiled = torch.compile(
        lambda x, w, b: call.apply(x * 2, w, b).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for shape in ((1, 2, 3, 4), (1, 4, 5, 4)):
        leaves = [t.requires_grad_() for t in (make_call(shape, k).x, call.weight, call.bias)]
        y = compiled(*leaves)
        expected = call.apply(leaves[0] * 2, *leaves[1:]).sin()
        assert torch.equal(y, expected)
        for ours, wanted in zip(*(torch.autograd.grad(z.sum(), leaves) for z in (y, expected))):
            assert torch.equal(ours, wanted)


def test_checkpointing():
    call = make_call((1, 3, 4, 5))
    leaves = [t.requires_grad_() for t in (call.x, call.weight, call.bias)]
    expected = torch.autograd.grad(call.apply(*leaves), leaves, call.grad)
    for reentrant in (False, True):
        y = checkpoint(call.apply, *leaves, use_reentrant=reentrant)
        y.backward(call.grad)
        for leaf, wanted in zip(leaves, expected):
            assert torch.equal(leaf.grad, wanted)
            leaf.grad = None


# ---- when they are chosen ------------------------------------------------------------------------------------------------


def test_auto_takes_them_with_and_without_gradients():
    cmt_fast.set_backend("auto")
    for leaves in (False, True):
        for k, name in ((None, "depthwise_conv3x3"), (2, "depthwise_reduce")):
            call = make_call((1, 2, 3, 4), k)
            call.weight.requires_grad_(leaves)
            assert (name, "triton") in cmt_fast.explain(call.apply, call.x, call.weight).calls
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=4).requires_grad_(leaves)
        assert ("lpu", "triton") in cmt_fast.explain(lpu, call.x, conv).calls


def test_a_block_trains_with_it():
    cmt_fast.set_backend("auto")
    block = Block(8, 1, sr_ratio=2)
    x, table = torch.randn(1, 16, 8, requires_grad=True), torch.zeros(1, 16, 4)
    assert ("lpu", "triton") in cmt_fast.explain(block, x, 4, 4, table).calls
    block(x, 4, 4, table).sum().backward()
    assert block.proj.weight.grad is not None and x.grad is not None


@pytest.mark.parametrize("op, dtype", [("lpu", "float16"), ("depthwise_reduce", "autocast-float16")])
def test_verify(op, dtype):
    checks = verify(["triton"], [op], [dtype], quick=True)
    assert {check.quantity for check in checks} >= {"output", "grad x", "grad conv.weight", "grad conv.bias"}
    assert all(check.passed for check in checks), [str(check) for check in checks if not check.passed]


def test_reasons(monkeypatch):
    def message(call: Call) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.apply(call.x, call.weight, call.bias)
        return str(error.value)

    for k in (None, 2):
        call = make_call((1, 2, 3, 4), k)
        assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.to(torch.float64))
        with torch.autocast("cpu", torch.float16):
            mixed = dataclasses.replace(call, bias=call.bias.double())
            assert "weight and bias must both be bfloat16, float16 or float32, got torch.float32 and" in message(mixed)
    large = dataclasses.replace(make_call((1, 2, 3, 8)), x=torch.empty(1).expand(1, 1 << 16, 1 << 16, 8))
    assert "the map of one image must have less than 2^31 elements, got 35433480192" in message(large)
    wide = make_call((1, 1, 1, 1), 1)
    wide.x, wide.weight = torch.empty(1).expand(1, 65, 65, 1), torch.empty(1, 1, 65, 65)
    assert "k must be at most 64, got 65" in message(wide)
    wide.x, wide.weight = torch.empty(1).expand(1, 1 << 15, 1 << 15, 1), torch.empty(1, 1, 1, 1)
    assert "there must be less than 2^30 windows, got 1073807361" in message(wide)
    wide.x = torch.empty(1).expand(1, 1, 1 << 31, 1)
    assert "k rows of the map must have less than 2^31 elements, got 2147483648" in message(wide)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no shortcut": ("t4 += 1.0", "t4 += 0.0"),
    "taps not turned": ("    if TURN:", "    if False:"),
    "no left border": ("left = inside_e & (j_e > 0)", "left = inside_e"),
    "no right border": ("right = inside_o & (j_o < width - 1)", "right = inside_o"),
    "no upper border": ("(first - 1) * row_size, first > 0", "(first - 1) * row_size, first >= 0"),
    "products with the rows of others": ("h + 3 < end", "h + 3 < height"),
    "products with the row beside": (
        "upper = add_products(upper, e0, e1, e2, o0, o1, o2, x0_e, x0_o)",
        "upper = add_products(upper, e0, e1, e2, o0, o1, o2, x1_e, x1_o)",
    ),
    "left for right": ("sums[0] + e2 * x_e + o2 * x_o", "sums[0] + e0 * x_e + o0 * x_o"),
    "the first row without bias": ("tl.where(first == 0, e1 + o1, 0.0)", "0.0"),
    "halo rows with bias": ("tl.where(first == 0, e1 + o1, 0.0)", "e1 + o1"),
    "one partial sum a tile": ("(tile * strips + strip).to(tl.int64)", "tile.to(tl.int64)"),
    "windows that overlap": ("row % down * K", "row % down"),
    "no sum over columns of a window": ("tl.sum(products, 1, keep_dims=True)", "tl.max(products, 1, keep_dims=True)"),
    "windows that the border cuts": ("(p < down) & (q < across)", "(p < down)"),
    "rows beyond the last window unwritten": ("(p * K + i < height) &", "(p < down) &"),
    "taps of the first row": ("c * (K * K) + i * K + j, taps, 0.0)", "c * (K * K) + j, taps, 0.0)"),
    "one tile a program": ("tile * WINDOWS + tl", "program * TILES * WINDOWS + tl"),
}


def guarded(x: Tensor) -> Tensor:
    """The same between NaN: a wrong kernel may read a row too far."""
    row = x[0, :2].numel()
    memory = torch.full((x.numel() + 2 * row,), float("nan"), dtype=x.dtype)
    memory[row:-row] = x.flatten()
    return memory[row:-row].view(x.shape)


def failures(monkeypatch, tmp_path, on: Callable[..., None], old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    modules = [sliding, triton_kernels, triton_train_kernels]
    _, kernels, train_kernels = mutate(monkeypatch, tmp_path, modules, old, new)
    for name in ("conv3x3_kernel", "reduce_kernel"):
        monkeypatch.setattr(triton_launch, name, getattr(kernels, name))
    for name in ("conv3x3_backward_kernel", "reduce_backward_kernel"):
        monkeypatch.setattr(triton_train_launch, name, getattr(train_kernels, name))
    results = []
    for shape, k, sums in (((2, 4, 3, 5), None, 3), ((2, 5, 5, 70), 2, 1)):
        monkeypatch.setattr(configs, "REDUCE_BACKWARD_TILE", 256)  # more tiles than one
        on(1, sums)
        call = make_call(shape, k)
        call.x, call.grad = guarded(call.x), guarded(call.grad)
        results += call.compared()
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path, on):
    """The calls that find the mutations pass with the kernels as they are."""
    assert failures(monkeypatch, tmp_path, on, "t4 += 1.0", "t4 += 1.0") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    assert failures(monkeypatch, tmp_path, on, *MUTATIONS[name])
