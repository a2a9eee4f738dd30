"""The steps of a packed model in the compiled library, each against the same step in float64 torch ops."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast import _native
from cmt_fast.inference import program
from cmt_fast.inference.native import schema
from cmt_fast.inference.native.layout import _lay_out
from cmt_fast.inference.native.linear_steps import NATIVE_BETWEEN
from cmt_fast.inference.native.steps import NATIVE
from cmt_fast.inference.program import round_up
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=f"native: {_native.load()}")

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = 16  # of a case in each dtype
WIDTHS = (1, 3, 16, 46, 52, 76, 165)


@dataclass(frozen=True)
class Call:
    """One call of a step.

    Attributes:
        step: a field of StepFunctions.
        arguments: of it: the step (and the one before it) and maps.
        channels: of the outputs that are not padding.
        between: the kernels between PyTorch's matrix products, instead of those with the products in them.
    """

    step: str
    arguments: tuple[Any, ...]
    channels: int
    between: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with every tensor changed."""
        return dataclasses.replace(self, arguments=tuple(_map(a, change) for a in self.arguments))

    def replace(self, index: int, **fields: Any) -> Call:
        """The same with other fields of an argument, or (``value``) another argument."""
        arguments = list(self.arguments)
        arguments[index] = fields["value"] if "value" in fields else dataclasses.replace(arguments[index], **fields)
        return dataclasses.replace(self, arguments=tuple(arguments))

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments[-1].dtype

    @property
    def images(self) -> int:
        return next(a for a in self.arguments if isinstance(a, Tensor)).shape[0]

    def torch(self) -> list[Tensor]:
        return _listed(getattr(TORCH, self.step)(*self.arguments))

    def native(self) -> list[Tensor]:
        if self.between:
            return _listed(getattr(NATIVE_BETWEEN, self.step)(*self.arguments))
        arguments = [_lay_out(argument) for argument in self.arguments]
        if self.step == "depthwise_project":  # what stands between the pixels of the hidden map must not matter
            hidden = arguments[1]
            arguments[1] = F.pad(hidden, (0, hidden_stride(hidden.shape[-1]) - hidden.shape[-1]), value=math.nan)
        result = _listed(getattr(NATIVE, self.step)(*arguments))
        return [y[..., : len(arguments[0].bias)] for y in result] if self.step == "expand" else result


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _map(getattr(value, field.name), change) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def hidden_stride(channels: int) -> int:
    return round_up(channels, schema.PANEL) + schema.PANEL


# ---- random steps --------------------------------------------------------------------------------------------------------


class Draw:
    """Random sizes and tensors; matrices and maps in ``dtype``, what is added to sums in float32."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.dtype = seed, dtype

    def size(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def width(self, high: int = 200) -> tuple[int, int]:
        """Channels and their padded width."""
        channels = WIDTHS[self.size(0, len(WIDTHS) - 1)] if self.size(0, 1) else self.size(1, high)
        channels = min(channels, high)
        return channels, round_up(channels, (1, 8, 16)[self.size(0, 2)])

    def grid(self, low: int = 1) -> tuple[int, int, int]:
        """Images, height and width: no image, one row, one column, one pixel are among the first."""
        b, h, w = self.size(1, 3), self.size(low, 9), self.size(low, 19)
        return {0: (0, h, w), 1: (b, low, w), 2: (b, h, low), 3: (b, low, low)}.get(self.seed, (b, h, w))

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std + mean

    def map(self, b: int, h: int, w: int, channels: int, width: int) -> Tensor:
        return pad(self.normal(b, h, w, channels, mean=0.3), width).to(self.dtype)

    def matrix(self, out: int, rows: int, channels: int, columns: int) -> Tensor:
        """(out, channels) in a matrix (rows, columns)."""
        return pad(self.normal(out, channels, std=channels**-0.5), rows, columns).to(self.dtype)

    def grouped(self, groups: int, out: int, rows: int, channels: int, columns: int) -> Tensor:
        """(groups * rows, columns): matrices one below the other."""
        return torch.cat([self.matrix(out, rows, channels, columns) for _ in range(groups)])

    def vector(self, channels: int, width: int, mean: float = 0.0) -> Tensor:
        return pad(self.normal(channels, std=0.3, mean=mean), width)


def pad(x: Tensor, *sizes: int) -> Tensor:
    """Zeros at the end of the last dimensions, up to ``sizes``."""
    widths = [(0, size - have) for have, size in zip(x.shape[-len(sizes) :], sizes)]
    return F.pad(x, [n for pair in reversed(widths) for n in pair])


def eps_of(channels: int) -> float:
    """Large for few channels: normalised, they may be all but equal, and what is divided by nothing is an error of its own."""
    return 1e-5 if channels >= 16 else 0.1


def stem(draw: Draw) -> Call:
    b, h, w = draw.grid()
    chans = draw.size(1, 4)
    s, width = draw.width(40)
    kernels = [
        pad(draw.normal(s, 3, 3, c, std=(9 * c) ** -0.5), width, 3, 3, wide)
        for c, wide in ((chans, chans), (s, width), (s, width))
    ]
    w1, w2, w3 = (k.to(draw.dtype) for k in kernels)
    b1, b2, b3, shift1, shift2 = (draw.vector(s, width) for _ in range(5))
    scale1, scale2 = (draw.vector(s, width, mean=1.0) for _ in range(2))
    x = draw.normal(b, h, w, chans).permute(0, 3, 1, 2) if draw.size(0, 1) else draw.normal(b, chans, h, w)
    return Call("stem", (program.Stem(w1, b1, scale1, shift1, w2, b2, scale2, shift2, w3, b3), x.to(draw.dtype)), s)


def patch_embed(draw: Draw) -> Call:
    b, h, w = draw.grid(low=2)
    (c_in, width_in), (c, width) = draw.width(100), draw.width()
    weight = torch.cat([draw.matrix(c, width, c_in, width_in) for _ in range(4)], 1)
    vectors = (draw.vector(c, width), draw.vector(c, width, mean=1.0), draw.vector(c, width))
    return Call(
        "patch_embed", (program.PatchEmbed(weight, *vectors, c, eps_of(c)), draw.map(b, h, w, c_in, width_in)), c
    )


def lpu(k: int) -> Callable[[Draw], Call]:
    def case(draw: Draw) -> Call:
        b, h, w = draw.grid(low=k)
        h, w = (h, w) if draw.seed < 4 else (h + k, w + k)
        c, width = draw.width()
        taps = pad(draw.normal(9, c, std=0.3), width)
        reduction = pad(draw.normal(k * k, c, std=1 / k), width) if k > 1 else None
        step = program.LPU(taps, draw.vector(c, width), reduction, k, c, eps_of(c))
        return Call("lpu", (step, draw.map(b, h, w, c, width)), c)

    return case


def kv(draw: Draw) -> Call:
    b, h, w = draw.grid()
    c, width = draw.width()
    heads, key_dim, value_dim = draw.size(1, 4), draw.size(1, 40), draw.size(1, 40)
    rows = heads * (key_dim + value_dim)
    step = program.KV(draw.matrix(rows, rows, c, width), heads, key_dim, value_dim, 0)
    return Call("kv", (step, draw.map(b, h, w, c, width)), rows)


def attention(absorbed: bool, base2: bool) -> Callable[[Draw], Call]:
    def case(draw: Draw) -> Call:
        b, h, w = draw.grid()
        c, width = draw.width(100 if absorbed else 200)
        heads = draw.size(1, 4)
        keys = 1 if draw.seed == 4 else draw.size(1, 60)
        query_weight = query_bias = out_weight = None
        if absorbed:
            key_dim = value_dim = width
            bias_dim = round_up(heads, 8)
            real = [(heads, c, width), (heads, c, width)]
            kv_step = program.KV(torch.zeros(2 * heads * width + bias_dim, width), heads, width, width, bias_dim)
        else:
            d_qk, d_v = draw.size(1, 20), draw.size(1, 40)
            key_dim, value_dim = (round_up(d, draw.size(1, 16)) for d in (d_qk, d_v))
            query_weight = draw.grouped(heads, d_qk, key_dim, c, width)
            query_bias = torch.cat([draw.vector(d_qk, key_dim) for _ in range(heads)])
            out_weight = torch.cat([draw.matrix(c, width, d_v, value_dim) for _ in range(heads)], 1)
            real = [(heads, d_qk, key_dim), (heads, d_v, value_dim)]
            kv_step = program.KV(torch.zeros(heads * (key_dim + value_dim), width), heads, key_dim, value_dim, 0)
        step = program.Attention(
            query_weight, query_bias, out_weight, draw.vector(c, width), heads, base2, c, eps_of(c)
        )
        groups = [pad(draw.normal(b, keys, n, d, std=d**-0.5), wide).flatten(2) for n, d, wide in real]
        if absorbed:
            groups.append(pad(draw.normal(b, keys, heads), kv_step.bias_dim))
        keys_values = torch.cat(groups, -1).to(draw.dtype)
        table = draw.normal(heads, h * w, keys).to(draw.dtype)
        return Call("attention", (step, kv_step, draw.map(b, h, w, c, width), keys_values, table), c)

    return case


def expand(draw: Draw) -> Call:
    b, h, w = draw.grid()
    (c, width), (r, hidden) = draw.width(), draw.width()
    vectors = (draw.vector(r, hidden), draw.vector(r, hidden, mean=1.0), draw.vector(r, hidden))
    step = program.Expand(draw.matrix(r, hidden, c, width), *vectors, c, eps_of(c))
    return Call("expand", (step, draw.map(b, h, w, c, width)), r)


def depthwise_project(draw: Draw) -> Call:
    b, h, w = draw.grid()
    (c, width), (r, hidden) = draw.width(), draw.width()
    taps = pad(draw.normal(9, r, std=0.3), hidden)
    step = program.DepthwiseProject(
        taps, draw.vector(r, hidden), draw.matrix(c, width, r, hidden), draw.vector(c, width)
    )
    return Call("depthwise_project", (step, draw.map(b, h, w, r, hidden), draw.map(b, h, w, c, width)), c)


def head(draw: Draw) -> Call:
    b, h, w = draw.grid()
    (c, width), (f, features), (p, hidden) = draw.width(), draw.width(), draw.width(50)
    classes, pool = draw.size(0, 30), bool(draw.size(0, 3))
    weight, bias = draw.matrix(f, features, c, width), draw.vector(f, features)
    hidden_weight = hidden_bias = class_weight = class_bias = None
    out, columns = f, features
    if pool and draw.size(0, 1):
        hidden_weight, hidden_bias = draw.matrix(p, hidden, f, features), draw.vector(p, hidden)
        out, columns = p, hidden
    if pool and classes:
        class_weight, class_bias = draw.matrix(classes, classes, out, columns), draw.vector(classes, classes)
    step = program.Head(weight, bias, hidden_weight, hidden_bias, class_weight, class_bias, out, pool)
    return Call("head", (step, draw.map(b, h, w, c, width)), classes or out)


def between(case: Callable[[Draw], Call]) -> Callable[[Draw], Call]:
    return lambda draw: dataclasses.replace(case(draw), between=True)


CASES = {
    "stem": stem,
    "patch_embed": patch_embed,
    "lpu, k = 1": lpu(1),
    "lpu, k = 2": lpu(2),
    "lpu, k = 4": lpu(4),
    "lpu, k = 8": lpu(8),
    "kv": kv,
    "attention, absorbed": attention(absorbed=True, base2=False),
    "attention, absorbed, base2": attention(absorbed=True, base2=True),
    "attention, projected": attention(absorbed=False, base2=False),
    "attention, projected, base2": attention(absorbed=False, base2=True),
    "expand": expand,
    "depthwise_project": depthwise_project,
    "head": head,
    "attention between products, absorbed": between(attention(absorbed=True, base2=False)),
    "attention between products": between(attention(absorbed=False, base2=False)),
    "attention between products, base2": between(attention(absorbed=False, base2=True)),
    "expand between products": between(expand),
    "depthwise_project between products": between(depthwise_project),
}
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- values --------------------------------------------------------------------------------------------------------------


def check(calls: list[Call]) -> None:
    """Within the policy as one result, each call in units of its largest value: few numbers have the errors that luck gives them.

    Padding is exactly 0.
    """
    results: list[list[Tensor]] = [[], [], []]
    for call in calls:
        exact, plain = call.map(torch.Tensor.double).torch(), call.torch()
        for actual, expected, own in zip(call.native(), exact, plain):
            assert actual.shape == expected.shape and actual.dtype == own.dtype == call.dtype
            assert actual.isfinite().all()
            if call.step not in ("kv", "head"):
                assert actual[..., call.channels :].count_nonzero() == 0
            if actual.numel():
                unit = expected.abs().max().item() or 1.0  # one channel normalised is 0
                for kind, result in zip(results, (actual, expected, own)):
                    kind.append((result.double() / unit).flatten())
    actual, expected, own = (torch.cat(kind) for kind in results)
    dtype = calls[0].dtype
    assert_within(calls[0].step, actual, expected, own, dtype=dtype)


@pytest.fixture
def poisoned_library():
    """PyTorch fills the memory that C++ allocates with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_case
@each_dtype
def test_against_float64(case, dtype, poisoned_library):
    check([CASES[case](Draw(seed, dtype)) for seed in range(SHAPES)])


@each_dtype
def test_long_sums(dtype):
    """Widths of the published models: the error must not grow with the number of terms more than that of PyTorch's products."""
    draw = Draw(100, dtype)
    for terms in (736, 1472, 2048, 5120):
        step = program.KV(draw.matrix(40, 40, terms, terms), 1, 20, 20, 0)
        check([Call("kv", (step, draw.map(1, 5, 40, terms, terms)), 40)])


# Through bias and table every value reaches the elementary functions as it is: with a weight of 0 nothing is added to it.


def test_gelu():
    """The exact GELU; saturated where erf is 1 in float32."""
    for end in (0.1, 0.5, 1, 2, 3, 4, 5, 6, 8, 20, 1e2, 1e4):
        x = torch.linspace(-end, end, 50_001)
        n = len(x)
        step = program.Expand(torch.zeros(n, 1), x, torch.ones(n), torch.zeros(n), 1, 1e-5)
        (y,) = (result.flatten() for result in Call("expand", (step, torch.ones(1, 1, 1, 1)), n).native())
        assert_within(f"gelu up to {end}", y, F.gelu(x.double()), F.gelu(x))
        assert y[x < -6].count_nonzero() == 0
        assert torch.equal(y[x > 6], x[x > 6])


@pytest.mark.parametrize("base2", [False, True])
def test_exp2(base2):
    """Relative to its value down to the smallest normal number: the weight of the second of two keys with logits 0 and -x."""
    one, unit = torch.ones(1, 1), math.log(2.0) if base2 else 1.0
    step = program.Attention(one, torch.zeros(1), one, torch.zeros(1), 1, base2, 1, 1e-5)
    kv_step = program.KV(torch.zeros(2, 1), 1, 1, 1, 0)
    keys_values = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])

    def weights(x: Tensor) -> tuple[Tensor, Tensor]:
        """And the same table's softmax in plain PyTorch."""
        table = torch.stack([torch.zeros_like(x), -x], -1)[None]
        call = Call("attention", (step, kv_step, torch.zeros(1, 1, len(x), 1), keys_values, table), 1)
        return call.native()[0].flatten(), (table[0] * unit).softmax(-1)[:, 1]

    for low, high in itertools.pairwise((0, 1, 4, 16, 64, 125 if base2 else 86)):
        x = torch.linspace(low, high, 40_000)
        exact = 1 / (1 + (x.double() * unit).exp())
        actual, own = ((w / exact) for w in weights(x))
        # e^x rounds x log2(e), by which the result is off in proportion to x
        scale = None if base2 else high
        assert_within(f"2^-x up to {high}", actual.float(), torch.ones_like(exact), own.float(), scale=scale)
    assert weights(torch.tensor([130.0, 1e4, 3e38, math.inf]))[0].count_nonzero() == 0


# ---- not a number, infinity ----------------------------------------------------------------------------------------------


@each_case
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(case, dtype, value):
    """What is not finite comes out where it does in plain PyTorch, and in no other image."""
    for seed in (20, 21, 22):
        call = CASES[case](Draw(seed, dtype))
        if call.images < 2:
            continue
        clean = call.native()
        for index, argument in enumerate(call.arguments):
            if not isinstance(argument, Tensor):
                continue
            broken = argument.clone()
            broken[(0,) * broken.dim()] = value
            changed = call.replace(index, value=broken)
            for i, (actual, expected) in enumerate(zip(changed.native(), changed.torch())):
                where = f"argument {index}, output {i}, seed {seed}"
                real = slice(None) if call.step in ("kv", "head") else slice(call.channels)
                assert torch.equal(actual[..., real].isfinite(), expected[..., real].isfinite()), where
                is_table = call.step == "attention" and index == 4
                if not is_table:
                    assert torch.equal(actual[1:], clean[i][1:]), where


# ---- threads, instruction sets -------------------------------------------------------------------------------------------


def assert_threads_do_not_matter(function: Callable[[], list[Tensor]]) -> None:
    expected = function()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        try:
            actual = function()
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected)), threads


@pytest.mark.parametrize("case", [name for name in CASES if "between products" not in name])
@each_dtype
def test_threads_do_not_change_a_bit(case, dtype):
    for seed in (0, 3, 4, 30, 31, 32):  # no image, one pixel, one key, others
        assert_threads_do_not_matter(CASES[case](Draw(seed, dtype)).native)


@each_dtype
@pytest.mark.parametrize(
    "name", ["packed_attention_core", "packed_normalise", "packed_gelu_affine", "packed_depthwise_gelu"]
)
def test_threads_do_not_change_a_bit_between_products(name, dtype):
    """PyTorch's products, between which these stand, may."""
    arguments = operator_arguments(name, dtype)
    assert_threads_do_not_matter(lambda: [getattr(schema, name)(*arguments.values())])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """What this CPU does not have, the library replaces by the best that it has."""
    code = """
        import torch
        from test_native_steps import CASES, DTYPES, Draw, check
        torch.use_deterministic_algorithms(True)
        for case in CASES.values():
            for dtype in DTYPES:
                check([case(Draw(seed, dtype)) for seed in range(40, 44)])
    """
    assert_runs(code, CMT_FAST_CPU_ISA=isa)


def assert_runs(code: str, **environment: str) -> None:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


# ---- arguments -----------------------------------------------------------------------------------------------------------


@each_case
def test_every_argument_counts(case):
    """The stable ABI passes arguments by position and checks no types: each must arrive where it belongs."""
    call = CASES[case](Draw(30, torch.float32))
    before = call.native()
    changed = []
    for index, argument in enumerate(call.arguments):
        if isinstance(argument, Tensor):
            changed.append((f"argument {index}", call.replace(index, value=other(argument))))
            continue
        for field in dataclasses.fields(argument):
            value = getattr(argument, field.name)
            if isinstance(value, Tensor):
                value = other(value)
            elif isinstance(value, bool):
                value = not value
            elif isinstance(value, float):
                value = value + 0.1
            elif field.name == "channels" and value > 2:
                value = value - 1
            else:
                continue  # a size, which the shapes of tensors depend on
            if (call.step, index) == ("attention", 1) or (call.step, field.name) == ("head", "pool"):
                continue  # only sizes of it are used; another shape
            changed.append((field.name, call.replace(index, **{field.name: value})))
    assert changed
    for name, altered in changed:
        after = altered.native()
        assert not all(torch.equal(a, b) for a, b in zip(after, before)), name
        check([altered]) if name != "channels" else None


def other(x: Tensor) -> Tensor:
    """Other values of the same shape; what is 0 stays 0, as padding does."""
    return x * (1 + torch.rand(x.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype))


# ---- operators -----------------------------------------------------------------------------------------------------------

OPERATORS = tuple(schema._SCHEMAS)


def test_every_operator_has_cases():
    assert set(GOOD) == set(OPERATORS) == {name for name, *_ in ERRORS}


def operator_arguments(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """By name, of the first call of an operator that a step makes."""
    operator, seen = getattr(schema, name), []

    def watch(*args: Any) -> Any:
        seen.append(args)
        return operator(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, name, watch)
        for case in CASES.values():
            case(Draw(50, dtype)).native()
            if seen:
                break
    return dict(zip((argument.name for argument in operator._schema.arguments), seen[0]))


@each_dtype
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype, poisoned_library):
    arguments = tuple(operator_arguments(name, dtype).values())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # The channels between the pixels of the hidden map are never written, and no two runs have the same there.
    torch.library.opcheck(getattr(schema, name), arguments, test_utils=checks[: 3 if name == "packed_expand" else 4])


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_are_checked(name):
    """Each tensor of each operator: its dimensions, its dtype, that it is contiguous."""
    operator, arguments = getattr(schema, name), operator_arguments(name)
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    assert tensors
    for key, tensor in tensors.items():
        wide = torch.stack([tensor, tensor], -1)[..., 0]
        for wrong, message in (
            (tensor[None], f"{key} must have shape"),
            (tensor.double(), r"must have dtype \w+, got|must be float32 or bfloat16, got Double"),
            (wide, f"{key} must be a contiguous tensor on the CPU"),
        ):
            with pytest.raises(RuntimeError, match=message):
                operator(*(arguments | {key: wrong}).values())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


#: Arguments that fit together, one set an operator.
GOOD: dict[str, dict[str, Any]] = {
    "packed_linear": dict(x=zeros(3, 5), weight=zeros(2, 5, 16), bias=zeros(32), out=20),
    "packed_conv3x3_gelu": dict(
        x=zeros(1, 4, 6, 2), weight=zeros(1, 18, 16), bias=zeros(16), scale=zeros(16), shift=zeros(16), out=9, stride=2
    ),
    "packed_patch_embed": dict(
        x=zeros(1, 4, 6, 2),
        weight=zeros(1, 8, 16),
        bias=zeros(16),
        scale=zeros(16),
        shift=zeros(16),
        out=9,
        channels=7,
        eps=1e-5,
    ),
    "packed_lpu": dict(
        x=zeros(1, 4, 6, 5), taps=zeros(9, 5), bias=zeros(5), reduction=zeros(4, 5), k=2, channels=5, eps=1e-5
    ),
    "packed_attention": dict(
        y=zeros(1, 4, 6, 5),
        keys_values=zeros(1, 3, 14),
        table=zeros(2, 24, 3),
        query_weight=zeros(1, 5, 16),
        query_bias=zeros(16),
        out_weight=zeros(1, 8, 16),
        out_bias=zeros(16),
        heads=2,
        key_dim=3,
        value_dim=4,
        channels=5,
        eps=1e-5,
        base2=False,
    ),
    "packed_expand": dict(
        x=zeros(1, 4, 6, 5),
        weight=zeros(2, 5, 16),
        bias=zeros(32),
        scale=zeros(32),
        shift=zeros(32),
        out=20,
        channels=5,
        eps=1e-5,
    ),
    "packed_depthwise_project": dict(
        hidden=zeros(1, 4, 6, 48),
        shortcut=zeros(1, 4, 6, 5),
        taps=zeros(9, 20),
        bias=zeros(20),
        weight=zeros(1, 20, 16),
        out_bias=zeros(16),
    ),
}
GOOD |= {
    "packed_attention_core": dict(
        q=zeros(1, 4, 6, 6),
        keys_values=zeros(1, 3, 14),
        table=zeros(2, 24, 3),
        heads=2,
        key_dim=3,
        value_dim=4,
        base2=False,
    ),
    "packed_normalise": dict(x=zeros(1, 4, 6, 5), channels=5, eps=1e-5),
    "packed_gelu_affine": dict(x=zeros(1, 4, 6, 5), scale=zeros(5), shift=zeros(5)),
    "packed_depthwise_gelu": dict(hidden=zeros(1, 4, 6, 5), taps=zeros(9, 5), bias=zeros(5)),
}
NO_WEIGHTS = dict(query_weight=None, query_bias=None, out_weight=None)
ERRORS = (
    ("packed_linear", dict(x=zeros(1, 3, 5)), r"x must have shape \(rows, in\), got \(1, 3, 5\)"),
    ("packed_linear", dict(x=zeros(3, 6)), r"weight must have shape \(2, 6, 16\), got \(2, 5, 16\)"),
    ("packed_linear", dict(bias=zeros(20)), r"bias must have shape \(32\), got \(20\)"),
    ("packed_linear", dict(out=0), "weight must have at least one input and output, got 5 and 0"),
    ("packed_linear", dict(x=zeros(3, 0), weight=zeros(2, 0, 16)), "at least one input and output, got 0 and 20"),
    (
        "packed_conv3x3_gelu",
        dict(x=zeros(1, 0, 6, 2)),
        "x must have shape .* with at least one row, column and channel",
    ),
    ("packed_conv3x3_gelu", dict(stride=3), "stride must be 1 or 2, got 3"),
    ("packed_conv3x3_gelu", dict(shift=None), "scale and shift must be given together or not at all"),
    ("packed_patch_embed", dict(x=zeros(1, 1, 6, 2)), r"at least two rows and columns, got \(1, 1, 6, 2\)"),
    ("packed_patch_embed", dict(channels=10), "channels must be 1 to 9, got 10"),
    ("packed_lpu", dict(k=5, reduction=zeros(25, 5)), r"no larger than the map, got k = 5 and x \(1, 4, 6, 5\)"),
    ("packed_lpu", dict(k=0), "k must be at least 1"),
    ("packed_lpu", dict(reduction=None), "reduction must be given for k > 1, and only then"),
    ("packed_lpu", dict(k=1), "reduction must be given for k > 1, and only then"),
    ("packed_lpu", dict(channels=0), "channels must be 1 to 5, got 0"),
    (
        "packed_attention",
        dict(query_bias=None),
        "query_weight, query_bias and out_weight must be given together or not",
    ),
    ("packed_attention", dict(table=zeros(24, 3)), r"table must have shape \(heads, queries, keys\), got \(24, 3\)"),
    ("packed_attention", dict(table=zeros(2, 24, 4)), r"keys_values must have shape \(1, 4, 14\), got \(1, 3, 14\)"),
    (
        "packed_attention",
        dict(table=zeros(2, 24, 0)),
        "heads, key_dim, value_dim and the number of keys must be positive",
    ),
    ("packed_attention", dict(keys_values=zeros(3, 14)), r"keys_values must have shape \(B, keys, columns\), got"),
    (
        "packed_attention",
        dict(key_dim=4),
        "keys_values must have at least 16 columns for 2 heads of 4 and 4 channels, got 14",
    ),
    (
        "packed_attention",
        NO_WEIGHTS,
        "keys_values must have at least 16 columns for 2 heads of 3 and 4",
    ),  # no columns for the key biases
    (
        "packed_attention",
        dict(keys_values=zeros(1, 3, 16)) | NO_WEIGHTS,
        "absorbed keys and values must have the 5 channels of y, got 3 and 4",
    ),
    ("packed_expand", dict(channels=6), "channels must be 1 to 5, got 6"),
    ("packed_expand", dict(x=zeros(4, 6, 5)), r"x must have shape \(B, H, W, C\) .* got \(4, 6, 5\)"),
    (
        "packed_depthwise_project",
        dict(hidden=zeros(1, 4, 6, 4)),
        r"hidden must have at least the \d+ channels of taps, got",
    ),
    ("packed_depthwise_project", dict(shortcut=zeros(1, 4, 5, 5)), r"shortcut must have shape \(1, 4, 6, 5\), got"),
    ("packed_attention_core", dict(q=zeros(1, 4, 6, 7)), r"q must have 2 \* 3 channels, got \(1, 4, 6, 7\)"),
    ("packed_normalise", dict(channels=6), "channels must be 1 to 5, got 6"),
    ("packed_gelu_affine", dict(scale=zeros(16)), r"scale must have shape \(5\), got \(16\)"),
    ("packed_depthwise_gelu", dict(taps=zeros(9, 16)), r"taps must have shape \(9, 5\), got \(9, 16\)"),
    ("packed_depthwise_project", dict(taps=zeros(180)), r"taps must have shape \(9, R\), got \(180\)"),
)


@pytest.mark.parametrize("name, change, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(name, change, message):
    operator = getattr(schema, name)
    operator(*GOOD[name].values())
    with pytest.raises(RuntimeError, match=message):
        operator(*(GOOD[name] | change).values())


@pytest.mark.parametrize("name", GOOD)
def test_half_is_refused(name):
    """By the name of the map that has it."""
    arguments = {k: v.half() if isinstance(v, Tensor) else v for k, v in GOOD[name].items()}
    with pytest.raises(RuntimeError, match=r"must (be float32 or bfloat16|have dtype Float), got Half"):
        getattr(schema, name)(*arguments.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_need_no_data(name):
    """Shapes and dtypes of an operator on the meta device are those of its result."""
    operator, arguments = getattr(schema, name), operator_arguments(name, torch.bfloat16)
    real = operator(*arguments.values())
    meta = operator(*(v.to("meta") if isinstance(v, Tensor) else v for v in arguments.values()))
    for ours, fake in zip(_listed(real), _listed(meta)):
        assert (ours.shape, ours.dtype, ours.stride()) == (fake.shape, fake.dtype, fake.stride())
