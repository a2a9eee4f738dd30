"""The Triton kernels of the IRFFN in the interpreter: against float64, as operators, when they are chosen, and that a wrong one is found."""

import dataclasses

import pytest
import torch
from mutation import mutate

import cmt_fast
from cmt_fast.inference import program
from cmt_fast.inference.program import Padding
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton import linear, linear_launch
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops.irffn import triton_kernels, triton_launch
from cmt_fast.ops.irffn.configs import split_width
from cmt_fast.ops.irffn.schema import depthwise_project_triton, expand_triton
from cmt_fast.testing.packed_irffn import DepthwiseProjectCall, ExpandCall, depthwise_project_call, expand_call
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare

DTYPES = (torch.float32, torch.float16)
MAKERS = (expand_call, depthwise_project_call)
steps = pytest.mark.parametrize("make", MAKERS, ids=["expand", "depthwise_project"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def ran(monkeypatch):
    """The launches that ran."""
    launches = []
    run = triton_launch.Launch.run
    monkeypatch.setattr(triton_launch.Launch, "run", lambda self: (launches.append(self), run(self))[1])
    return launches


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def shape(batch=1, height=3, width=4, dim=12, hidden=20):
    return StageShape("test", batch, height, width, dim, 1, hidden, 1)


def compared(call: ExpandCall | DepthwiseProjectCall, width: int) -> list[Comparison]:
    """``width``: how many output channels are not padding."""
    out = call.run(TRITON)
    assert out.is_contiguous()
    padding = out[..., width:].contiguous()
    zero = torch.zeros_like(padding)
    return [compare("padding", padding, zero, zero), compare("out", out, call.double().run(TORCH), call.run(TORCH))]


def check(case: StageShape, dtype: torch.dtype, make=None, **options) -> None:
    for maker in MAKERS if make is None else (make,):
        for result in compared(maker(case, dtype, **options), case.hidden if maker is expand_call else case.dim):
            assert result.passed, f"{case}: {result}"


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_of_the_variants(variant, on):
    """Their widths, on maps of two squares and a row and a column beyond; in float32 the one that takes little time."""
    on(multiprocessors=2)
    for stage in stage_shapes(variant):
        for dtype in DTYPES[stage.name[-1] != "a" :]:
            check(dataclasses.replace(stage, height=3, width=3), dtype)


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(10):
        case = shape(draw(1, 3), draw(1, 5), draw(1, 5), draw(1, (12, 70)[draw(0, 1)]), draw(1, (30, 100)[draw(0, 1)]))
        on(arch=(80, 90, 120)[draw(0, 2)], multiprocessors=(1, 3, 9)[draw(0, 2)])
        padding = (Padding(), Padding(1, 1, 1), Padding(32, 16, 32))[draw(0, 2)]
        check(case, DTYPES[draw(0, 1)], padding=padding, seed=seed)


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        shape(height=1, width=9),
        shape(height=9, width=1),
        shape(batch=3, height=1, width=1, dim=3, hidden=5),
        shape(batch=9, height=2, width=3, dim=8, hidden=16),
        shape(height=2, width=2, dim=1, hidden=1),
    ],
    ids=["one row", "one column", "one pixel", "many images", "one channel"],
)
def test_edges(case, dtype, on):
    check(case, dtype)
    on(multiprocessors=1)
    check(case, dtype)


def test_large_means():
    """LayerNorm subtracts the mean before it squares, also where it merges tiles."""
    for dim in (24, 300):
        call = expand_call(shape(dim=dim), torch.float32)
        call = dataclasses.replace(call, z=call.z.add(300).masked_fill(call.z == 0, 0))
        assert all(result.passed for result in compared(call, 20))


@steps
def test_no_image(make):
    assert make(shape(batch=0), torch.float16).run(TRITON).shape == (0, 3, 4, 32 if make is expand_call else 16)


def test_strides():
    def strided(x):
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))

    for make in MAKERS:
        call = make(shape(batch=2), torch.float16)
        tensors = {f.name: getattr(call.step, f.name) for f in dataclasses.fields(call.step)}
        step = {name: strided(t) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
        maps = {f.name: strided(getattr(call, f.name)) for f in dataclasses.fields(call) if f.name != "step"}
        other = dataclasses.replace(call, step=type(call.step)(**step), **maps)
        out = other.run(TRITON)
        assert torch.equal(out, call.run(TRITON)) and out.is_contiguous()
        assert out.data_ptr() not in {x.data_ptr() for x in maps.values()}


def test_not_a_number_reaches_its_neighbours_only():
    call = expand_call(shape(height=5, width=6), torch.float32)
    call.z[0, 2, 3, 4] = float("nan")
    touched = torch.zeros(1, 5, 6, 32, dtype=torch.bool)
    touched[0, 2, 3] = True
    assert torch.equal(call.run(TRITON).isnan(), touched)
    call = depthwise_project_call(shape(height=5, width=6), torch.float32)
    call.hidden[0, 2, 3, 4] = float("nan")
    touched = torch.zeros(1, 5, 6, 16, dtype=torch.bool)
    touched[0, 1:4, 2:5] = True
    assert torch.equal(call.run(TRITON).isnan(), touched)


def test_nothing_else_is_written(on):
    """The outputs lie inside a larger buffer, and the inputs between NaN."""
    on(multiprocessors=1)
    for dtype in DTYPES:
        call = expand_call(shape(batch=2, height=3, width=5), dtype)
        expected, s = call.run(TRITON), call.step
        x, weight, out = inside_nan(call.z), inside_nan(s.weight), inside_nan(expected).zero_()
        parameters = (weight, s.bias, s.scale, s.shift)
        triton_launch.expand_launch(x, *parameters, out, s.channels, s.eps, ARCHITECTURES[90]).run()
        check_buffer(out, expected)
        call = depthwise_project_call(shape(batch=2, height=3, width=5), dtype)
        expected, s = call.run(TRITON), call.step
        hidden, weight, z, out = (inside_nan(t) for t in (call.hidden, s.weight, call.z, expected))
        parameters = (s.taps, s.bias, weight, s.out_bias, z)
        for launch in triton_launch.depthwise_project_launches(hidden, *parameters, out.zero_(), ARCHITECTURES[90]):
            launch.run()
        check_buffer(out, expected)


def check_buffer(out, expected):
    assert torch.equal(out, expected)
    assert out._base.isnan().sum() == out._base.numel() - out.numel()


def inside_nan(x):
    """A copy of ``x`` with NaN before and behind it."""
    buffer = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype)
    return buffer[GUARD:-GUARD].view(x.shape).copy_(x)


GUARD = 1024


# ---- which kernels, and which tiles --------------------------------------------------------------------------------------


def kernels(ran) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in ran]


def test_forms(ran, on):
    on(multiprocessors=1)
    one, two = ["depthwise_project"], ["depthwise_gelu", "linear"]
    for dim, dtype, arch, expected in (
        (256, torch.float16, 90, one),
        (512, torch.float16, 90, one),
        (512, torch.float16, 80, two),
        (520, torch.float16, 90, two),
        (16, torch.float32, 90, two),
    ):
        ran.clear()
        on(arch=arch, multiprocessors=1)
        check(shape(height=2, width=2, dim=dim, hidden=16), dtype, depthwise_project_call)
        assert kernels(ran) == expected
    for dtype, held in ((torch.float16, True), (torch.float32, False)):
        ran.clear()
        expand_call(shape(), dtype).run(TRITON)
        assert ran[0].constants["HELD"] == held


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_keeps_the_rows(ran, tf32):
    check(shape(dim=40), torch.float32)
    assert [launch.constants.get("PRECISION") for launch in ran] == ["tf32", None, "tf32"] and ran[0].constants["HELD"]


def test_tiles_shrink_to_the_device(ran, on):
    case = shape(height=12, width=12, dim=64, hidden=128)
    for shared_memory in (227 << 10, 30 << 10, 12 << 10, 1 << 10):
        on(shared_memory=shared_memory, multiprocessors=1)
        check(case, torch.float16, expand_call)
    tiles = [(c["HELD"], c["BLOCK_N"], c["BLOCK_R"]) for c in (launch.constants for launch in ran)]
    assert tiles[0] > tiles[1] > tiles[2] > tiles[3] and not tiles[3][0]


def test_small_batches_fill_the_device(ran, on):
    case = shape(height=8, width=8, dim=64, hidden=64)
    for multiprocessors in (1, 3, 8):
        on(multiprocessors=multiprocessors)
        check(case, torch.float16)
    grids = [launch.grid[0] for launch in ran]
    assert grids[::2] == [1, 2, 2] and grids[1::2] == [1, 4, 8]


def test_widths_are_cut_into_two_tiles():
    assert [split_width(n, 256) for n in (5, 16, 48, 80, 104, 256, 304, 512, 608)] == [
        *((16, 0), (16, 0), (32, 16), (64, 16), (128, 0), (256, 0), (256, 64), (256, 256), (512, 128))
    ]


# ---- as operators, and when they are chosen ------------------------------------------------------------------------------


@dtypes
def test_opcheck(dtype):
    call = expand_call(shape(batch=2), dtype)
    s = call.step
    arguments = (s.weight, s.bias, s.scale, s.shift, s.channels, s.eps)
    torch.library.opcheck(expand_triton, (call.z, *arguments))
    strided = (call.z.transpose(1, 2), *arguments)
    torch.library.opcheck(expand_triton, strided, test_utils=("test_schema", "test_faketensor"))
    call = depthwise_project_call(shape(batch=2), dtype)
    s = call.step
    arguments = (s.taps, s.bias, s.weight, s.out_bias)
    torch.library.opcheck(depthwise_project_triton, (call.hidden, *arguments, call.z))
    strided = (call.hidden.transpose(1, 2), *arguments, call.z.transpose(1, 2))
    torch.library.opcheck(depthwise_project_triton, strided, test_utils=("test_schema", "test_faketensor"))


@steps
def test_auto_takes_it_where_no_gradient_is_needed(make):
    cmt_fast.set_backend("auto")
    call = make(shape(), torch.float32)
    name = "packed " + make.__name__.removesuffix("_call")
    assert (name, "triton") in cmt_fast.explain(call.run, TRITON).calls
    call.step.bias.requires_grad_()
    assert (name, "triton") not in cmt_fast.explain(call.run, TRITON).calls
    with torch.no_grad():
        assert (name, "triton") in cmt_fast.explain(call.run, TRITON).calls


@steps
def test_compiles_into_one_graph(make):
    call = make(shape(), torch.float32)
    compiled = torch.compile(lambda z: dataclasses.replace(call, z=z).run(TRITON), fullgraph=True, backend="eager")
    assert torch.equal(compiled(call.z), call.run(TRITON))


@steps
def test_reasons(make, monkeypatch):
    def message(call) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.run(TRITON)
        return str(error.value)

    call = make(shape(), torch.float32)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "taps, biases, scale and shift must be float32" in message(call.double())
    other = dataclasses.replace(call.step, weight=call.step.weight.half())
    assert "weight and shortcut must have the dtype of the map, torch.float32" in message(
        dataclasses.replace(call, step=other)
    )
    if isinstance(call.step, program.DepthwiseProject):
        large = {
            name: torch.empty(1).expand(1, 1 << 14, 1 << 14, getattr(call, name).shape[-1]) for name in ("hidden", "z")
        }
        assert "the map of one image must have less than 2^31 elements, got" in message(
            dataclasses.replace(call, **large)
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in message(call)
    call.step.bias.requires_grad_()
    assert "gradients are needed, and this version's Triton kernels are for inference only" in message(call)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "expand: no bias": ("hidden += tl.load(bias + r, r < R, 0.0)", "pass"),
    "expand: no scale": ("gelu(hidden, EXACT) * tl.load(scale + r, r < R, 0.0)", "gelu(hidden, EXACT)"),
    "expand: no shift": (" + tl.load(shift + r, r < R, 0.0)", ""),
    "expand: one tile of channels": ("if BLOCK_REST:\n                weights = load_tile(weight + start", "if False:\n                weights = load_tile(weight + start"),
    "expand: hidden channels of the first chunk": (
        "weights = load_tile(weight + start * C, C, 0, R - start, 0, C, BLOCK_R, BLOCK_C)",
        "weights = load_tile(weight, C, 0, R, 0, C, BLOCK_R, BLOCK_C)",
    ),
    "expand: statistics of padding": (
        "mean, std = row_statistics(x, left, eps, C, CHANNELS,",
        "mean, std = row_statistics(x, left, eps, C, C,",
    ),
    "expand: mean not subtracted": ("normal = (tile.to(tl.float32) - mean[:, None]) * scale", "normal = tile.to(tl.float32) * scale"),
    "project: no shortcut": ("total = tl.load(shortcut + (token * C + c), mask, 0.0)", "total = 0.0 * tl.load(shortcut + (token * C + c), mask, 0.0)"),
    "project: no output bias": ("total += tl.load(out_bias + c, c < C, 0.0)", "pass"),
    "project: rest without weights": ("rest = tl.dot(g, tl.trans(weights), rest", "rest = tl.dot(g * 0, tl.trans(weights), rest"),
    "project: outputs of the first tile": (
        "load_tile(weight, R, column, C, start, R, BLOCK_C, BLOCK_R)",
        "load_tile(weight, R, 0, C, start, R, BLOCK_C, BLOCK_R)",
    ),
    "depthwise: no bias": ("y00 = tl.load(bias + same, channel, 0.0)", "y00 = 0.0 * tl.load(bias + same, channel, 0.0)"),
    "depthwise: no left border": ("there & (j > 0)", "there & (j >= 0)"),
    "depthwise: no right border": ("there & (j + 1 < width)", "there & (j + 1 <= width)"),
    "depthwise: no upper border": ("channel & (i + row >= 0)", "channel & (i + row >= -1)"),
    "depthwise: no lower border": ("& (i + row < height)\n", "& (i + row <= height)\n"),
    "depthwise: taps of the row above": ("taps + (row * 3 * R + same)", "taps + ((row + 1) % 3 * 3 * R + same)"),
    "depthwise: columns for rows": ("tl.permute(square, (0, 3, 2, 1))", "tl.permute(square, (0, 2, 3, 1))"),
    "depthwise: squares of the first image": ("((image - first_image) * height + 2 * i)", "(2 * i)"),
}  # fmt: skip


def failures(monkeypatch, tmp_path, on, makers, old: str, new: str) -> list[str]:
    """What leaves the policy when the source of a kernel is changed."""
    shared, kernels = mutate(monkeypatch, tmp_path, [linear, triton_kernels], old, new)
    monkeypatch.setattr(linear_launch, "linear_kernel", shared.linear_kernel)
    for name in ("expand_kernel", "depthwise_project_kernel", "depthwise_gelu_kernel"):
        monkeypatch.setattr(triton_launch, name, getattr(kernels, name))
    results = []
    for multiprocessors, dtype, dim in ((1, torch.float16, 42), (6, torch.float16, 60), (1, torch.float32, 10)):
        on(multiprocessors=multiprocessors)
        case = shape(batch=2, height=3, width=5, dim=dim, hidden=90)
        for make in makers:
            call = make(case, dtype)
            name = "z" if make is expand_call else "hidden"
            call = dataclasses.replace(call, **{name: guarded(getattr(call, name))})
            results += compared(call, case.hidden if make is expand_call else case.dim)
    return [str(result) for result in results if not result.passed]


def guarded(x):
    """The same between NaN: a wrong kernel may read a row too far."""
    row = x[0, :2].numel()
    memory = torch.full((x.numel() + 2 * row,), float("nan"), dtype=x.dtype)
    memory[row:-row] = x.flatten()
    return memory[row:-row].view(x.shape)


def test_without_a_mutation(monkeypatch, tmp_path, on):
    """The calls that find the mutations pass with the kernels as they are."""
    same = "tl.permute(square, (0, 3, 2, 1))"
    assert failures(monkeypatch, tmp_path, on, MAKERS, same, same) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    make = expand_call if name.startswith("expand") else depthwise_project_call
    assert failures(monkeypatch, tmp_path, on, [make], *MUTATIONS[name])
