"""The compiled depthwise 3x3 convolution: against float64, as an operator, as an autograd function, and when it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn

import cmt_fast
from cmt_fast import _native
from cmt_fast.functional import depthwise_conv3x3, lpu
from cmt_fast.ops.depthwise.autograd import DepthwiseConv3x3Function
from cmt_fast.ops.depthwise.reference import depthwise_conv3x3_reference
from cmt_fast.ops.depthwise.schema import depthwise_conv3x3_bwd, depthwise_conv3x3_fwd
from cmt_fast.testing.tolerance import assert_within

needs_library = pytest.mark.skipif(_native.load() is not None, reason=f"native: {_native.load()}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# H != W; widths of the models that fill no vector; one row, one column, one pixel, one channel; no image at all
SHAPES = (
    (2, 5, 7, 46),
    (1, 1, 9, 52),
    (3, 8, 1, 76),
    (2, 6, 5, 165),
    (2, 3, 4, 1),
    (1, 1, 1, 3),
    (1, 2, 3, 15),
    (2, 20, 17, 130),
    (0, 3, 2, 5),
)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    c = shape[-1]
    shapes = (shape, (c, 1, 3, 3), (c,), shape)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def native(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    return depthwise_conv3x3(x, weight, bias, shortcut=shortcut, backend="native")


def run(function, inputs: list[Tensor], shortcut: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    x, weight, bias, grad = (t.to(dtype or t.dtype) for t in inputs)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, shortcut)
    gradients = torch.autograd.grad(y, leaves, grad)
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients)))


def check(inputs: list[Tensor], shortcut: bool) -> None:
    exact = run(depthwise_conv3x3_reference, inputs, shortcut, torch.float64)
    plain = run(depthwise_conv3x3_reference, inputs, shortcut)
    x = inputs[0]
    terms = {"y": 10, "dx": 10, "dweight": x.shape[:3].numel(), "dbias": x.shape[:3].numel()}  # of one sum
    for name, actual in run(native, inputs, shortcut).items():
        # plain float64 is its own exact result, with error 0: allow a rounding unit for each term
        scale = terms[name] * exact[name].abs().max().item() if x.dtype == torch.float64 and x.numel() else None
        assert_within(name, actual, exact[name], plain[name], backward=name != "y", scale=scale)


@needs_library
class TestValues:
    @pytest.mark.parametrize("shortcut", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_float64(self, shape, dtype, shortcut):
        check(make_inputs(shape, dtype), shortcut)

    def test_every_output_is_written(self):
        """PyTorch fills the memory that C++ allocates with NaN while deterministic algorithms are asked for."""
        torch.use_deterministic_algorithms(True)
        try:
            for shape in SHAPES:
                check(make_inputs(shape, torch.float32), shortcut=True)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_random_shapes(self):
        generator = torch.Generator().manual_seed(1)
        for seed in range(40):
            *shape, dtype = (int(torch.randint(1, top, (), generator=generator)) for top in (4, 12, 12, 150, 4))
            check(make_inputs(tuple(shape), DTYPES[dtype - 1], seed), shortcut=bool(seed % 2))

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_every_instruction_set(self, isa):
        """What this CPU does not have, the library replaces by the best that it has."""
        code = """
            from test_depthwise_native import DTYPES, check, make_inputs
            for shape in ((2, 5, 7, 46), (1, 4, 3, 1), (1, 3, 8, 165)):
                for dtype in DTYPES:
                    check(make_inputs(shape, dtype), shortcut=True)
        """
        assert_runs(code, CMT_FAST_CPU_ISA=isa)

    def test_unknown_instruction_set(self):
        code = """
            import pytest, test_depthwise_native as t
            with pytest.raises(RuntimeError, match="CMT_FAST_CPU_ISA must be one of 'baseline', 'avx2', 'avx512', got 'mmx'"):
                t.check(t.make_inputs((1, 2, 2, 4), t.torch.float32), True)
        """
        assert_runs(code, CMT_FAST_CPU_ISA="mmx")

    def test_not_a_number_and_infinity_reach_only_their_neighbours(self):
        for dtype in DTYPES:
            for value in (float("nan"), float("inf")):
                x, weight, bias, _ = make_inputs((1, 5, 6, 20), dtype)
                x[0, 2, 3, 4] = value
                y = native(x, weight, bias, False)
                touched = torch.zeros(1, 5, 6, 20, dtype=torch.bool)
                touched[0, 1:4, 2:5, 4] = True
                assert torch.equal(~y.isfinite(), touched)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_threads_do_not_change_a_bit(self, dtype):
        inputs = make_inputs((3, 28, 28, 130), dtype)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(run(native, inputs, True))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)

    def test_every_argument_counts(self):
        """The stable ABI passes arguments by position and checks no types: each must arrive where it belongs."""
        x, weight, bias, grad = make_inputs((2, 3, 4, 5), torch.float64)
        others = make_inputs((2, 3, 4, 5), torch.float64, seed=9)
        base = [x, weight, bias, True]
        y = depthwise_conv3x3_fwd(*base)
        for i, other in enumerate((others[0], others[1], None, False)):
            changed = depthwise_conv3x3_fwd(*base[:i], other, *base[i + 1 :])
            torch.testing.assert_close(changed, depthwise_conv3x3_reference(*base[:i], other, *base[i + 1 :]))
            assert not torch.equal(changed, y)
        full = depthwise_conv3x3_bwd(grad, x, weight, True, True, True, True)
        assert [t.shape for t in full] == [x.shape, weight.shape, bias.shape]
        for i in range(3):
            needs = [j == i for j in range(3)]
            only = depthwise_conv3x3_bwd(grad, x, weight, True, *needs)
            assert [t.shape[0] for t in only] == [full[j].shape[0] if needs[j] else 0 for j in range(3)]
            assert torch.equal(only[i], full[i])
        for i, other in enumerate((others[3], others[0], others[1], False)):
            arguments = [grad, x, weight, True]
            arguments[i] = other
            changed = depthwise_conv3x3_bwd(*arguments, True, True, True)
            assert [torch.equal(a, b) for a, b in zip(changed, full)] == {
                0: [False, False, False],
                1: [True, False, True],
                2: [False, True, True],
                3: [False, True, True],
            }[i]


def strided(t: Tensor) -> Tensor:
    """The same values with other strides and an offset."""
    wide = t.new_full((t.shape[0], *(2 * n + 1 for n in t.shape[1:])), float("nan"))
    view = wide[(slice(None), *(slice(1, None, 2) for _ in t.shape[1:]))] if t.dim() > 1 else t.repeat(2)[: t.shape[0]]
    return view.copy_(t)


@needs_library
class TestOperator:
    @pytest.mark.filterwarnings(
        "ignore:.*an autograd kernel was not registered"
    )  # the autograd function stands outside
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("layout", ["contiguous", "strided", "channels_first"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype, layout, requires_grad):
        x, weight, bias, grad = make_inputs((2, 3, 4, 5), dtype)
        change = {
            "contiguous": lambda t: t,
            "strided": strided,
            "channels_first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        }[layout]
        x, grad = change(x), change(grad)
        x, weight, bias = (t.detach().requires_grad_(requires_grad) for t in (x, weight, bias))
        assert x.is_contiguous() == (layout == "contiguous")
        torch.library.opcheck(depthwise_conv3x3_fwd, (x, weight, bias, True))
        torch.library.opcheck(depthwise_conv3x3_fwd, (x, weight, None, False))
        torch.library.opcheck(depthwise_conv3x3_bwd, (grad, x, weight, True, True, True, True))
        torch.library.opcheck(depthwise_conv3x3_bwd, (grad, x, weight, False, False, True, False))

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(x=torch.ones(2, 3, 4)), r"x must have shape \(B, H, W, C\), got \(2, 3, 4\)"),
            (dict(x=torch.ones(1, 0, 4, 5)), r"at least one row, column and channel, got \(1, 0, 4, 5\)"),
            (dict(weight=torch.ones(4, 1, 3, 3)), r"weight must have shape \(5, 1, 3, 3\), got \(4, 1, 3, 3\)"),
            (dict(weight=torch.ones(5, 1, 3, 3).double()), r"weight must have the dtype of x, Float, got Double"),
            (dict(bias=torch.ones(4)), r"bias must have shape \(5,\), got \(4\)"),
            (dict(bias=torch.ones(5).half()), r"bias must have the dtype of x, Float, got Half"),
        ],
    )
    def test_errors(self, change, message):
        arguments = (
            dict(x=torch.ones(1, 3, 4, 5), weight=torch.ones(5, 1, 3, 3), bias=torch.ones(5), shortcut=True) | change
        )
        with pytest.raises(RuntimeError, match=message):
            depthwise_conv3x3_fwd(*arguments.values())

    def test_errors_of_backward_and_dtype(self):
        x, weight, _, _ = make_inputs((1, 3, 4, 5), torch.float32)
        with pytest.raises(RuntimeError, match=r"grad must have the shape of x, \(1, 3, 4, 5\), got \(1, 3, 4, 1\)"):
            depthwise_conv3x3_bwd(x[..., :1], x, weight, True, True, True, True)
        with pytest.raises(RuntimeError, match="x must be float32, float64 or bfloat16, got Half"):
            depthwise_conv3x3_fwd(x.half(), weight.half(), None, True)


@needs_library
class TestAutograd:
    def test_gradcheck(self):
        for shape in ((2, 3, 4, 5), (1, 1, 3, 2), (1, 4, 1, 17)):
            x, weight, bias, _ = (t.requires_grad_() for t in make_inputs(shape, torch.float64))
            for shortcut in (False, True):
                assert torch.autograd.gradcheck(native, (x, weight, bias, shortcut))
                assert torch.autograd.gradcheck(native, (x, weight, None, shortcut))

    @pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)][1:], ids=str)
    def test_only_what_is_needed(self, needs):
        inputs = make_inputs((2, 3, 4, 5), torch.float64)
        full = run(depthwise_conv3x3_reference, inputs, True)
        leaves = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs)]
        native(*leaves, True).backward(inputs[3])
        for leaf, need, name in zip(leaves, needs, ("dx", "dweight", "dbias")):
            assert (leaf.grad is not None) == bool(need)
            if need:
                torch.testing.assert_close(leaf.grad, full[name])

    def test_strided_inputs_and_gradients(self):
        inputs = make_inputs((2, 3, 4, 5), torch.float64)
        expected = run(depthwise_conv3x3_reference, inputs, True)
        for name, actual in run(native, [strided(t) for t in inputs], True).items():
            torch.testing.assert_close(actual, expected[name])
        x, weight, bias, _ = (t.requires_grad_() for t in inputs)
        native(x, weight, bias, True).sum().backward()  # a gradient with strides 0
        (expected_dx,) = torch.autograd.grad(depthwise_conv3x3_reference(x, weight, bias, True).sum(), x)
        torch.testing.assert_close(x.grad, expected_dx)

    def test_saved_input_is_guarded(self):
        x, weight, bias, _ = make_inputs((1, 3, 4, 5), torch.float32)
        weight.requires_grad_()
        y = native(x, weight, bias, True)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("shortcut", [False, True])
    def test_second_derivatives(self, shortcut):
        """A gradient penalty must not depend on the backend."""
        x, weight, bias, _ = (t.requires_grad_() for t in make_inputs((1, 3, 4, 5), torch.float64))
        assert torch.autograd.gradgradcheck(lambda *t: native(*t, shortcut).pow(2), (x, weight, bias))
        results = []
        for function in (native, depthwise_conv3x3_reference):
            first = torch.autograd.grad(
                function(x, weight, bias, shortcut).pow(3).sum(), (x, weight), create_graph=True
            )
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias)))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected)


def conv(channels: int = 5, **changes) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, **(dict(padding=1, groups=channels) | changes))


@needs_library
class TestChoice:
    def test_auto_takes_it_on_the_cpu(self):
        x, weight, bias, _ = make_inputs((1, 3, 4, 5), torch.float32)
        assert ("depthwise_conv3x3", "native") in cmt_fast.explain(depthwise_conv3x3, x, weight, bias).calls
        assert ("lpu", "native") in cmt_fast.explain(lpu, x, conv()).calls
        with cmt_fast.use_backend("reference"):
            assert ("lpu", "reference") in cmt_fast.explain(lpu, x, conv()).calls

    def test_lpu_equals_its_reference(self):
        inputs = make_inputs((2, 3, 4, 5), torch.float64)
        module = conv().double()
        with torch.no_grad():
            module.weight.copy_(inputs[1])
            module.bias.copy_(inputs[2])
        torch.testing.assert_close(
            lpu(inputs[0], module, backend="native"), lpu(inputs[0], module, backend="reference")
        )
        module.bias = None
        torch.testing.assert_close(
            lpu(inputs[0], module, backend="native"), lpu(inputs[0], module, backend="reference")
        )

    @pytest.mark.parametrize(
        "module, reason",
        [
            (conv(dilation=2, padding=2), r"conv must be Conv2d\(5, 5, 3, padding=1, groups=5\), got Conv2d"),
            (conv(groups=1), "conv must be Conv2d"),
            (conv(padding_mode="circular"), "conv must be Conv2d"),
            (conv(padding="same"), "conv must be Conv2d"),
            (nn.Identity(), "conv is a Identity, not a plain Conv2d"),
            (nn.utils.parametrizations.weight_norm(conv()), "not a plain Conv2d"),
            (nn.utils.spectral_norm(conv()), "conv has hooks"),
            (conv().to("meta"), "runs on the CPU only, got cpu, meta, meta"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_reasons_of_the_lpu(self, module, reason):
        with pytest.raises(cmt_fast.BackendError, match=f"backend 'native' cannot run lpu: .*{reason}"):
            lpu(torch.zeros(1, 3, 4, 5), module, backend="native")

    def test_hooks_run(self):
        module, seen = conv(), []
        module.register_forward_hook(lambda *_: seen.append(1))
        lpu(torch.zeros(1, 3, 4, 5), module)
        assert seen

    def test_reasons_of_the_call(self):
        x, weight, bias, _ = make_inputs((1, 3, 4, 5), torch.float32)

        def message(x=x, weight=weight, bias=bias) -> str:
            with pytest.raises(cmt_fast.BackendError) as error:
                native(x, weight, bias, True)
            return str(error.value)

        assert "dtype must be float32, float64 or bfloat16, got torch.float16" in message(
            x.half(), weight.half(), bias.half()
        )
        assert "tensor subclasses need plain PyTorch, got Special, Tensor, Tensor" in message(x.as_subclass(Special))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast is on" in message()
            assert "one dtype, got torch.float32, torch.bfloat16, torch.float32" in message(weight=weight.bfloat16())
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            assert "a torch dispatch mode is active" in message()
            depthwise_conv3x3(x, weight, bias)
        assert counter.get_total_flops() == 2 * 9 * x.numel()
        with torch.autograd.forward_ad.dual_level():
            assert "forward-mode differentiation is active" in message()

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_transforms_and_export_get_plain_pytorch(self):
        x, weight, bias, _ = make_inputs((2, 3, 4, 5), torch.float64)
        weight, bias = weight.float(), bias.float()
        x = x.float()

        def f(x):
            return depthwise_conv3x3(x, weight, bias, shortcut=True)

        reference = depthwise_conv3x3_reference(x, weight, bias, True)
        torch.testing.assert_close(torch.func.vmap(f)(x[None])[0], reference)
        torch.testing.assert_close(torch.func.jvp(f, (x,), (x,))[0], reference)
        torch.func.grad(torch.func.grad(lambda s: f(x * s).pow(2).sum()))(torch.tensor(1.0))
        module = LPU()
        for strict in (False, True):
            program = torch.export.export(module, (x,), strict=strict)
            assert "cmt_fast_native" not in str(program.graph)
        assert "cmt_fast_native" not in str(torch.jit.trace(module, (x,)).inlined_graph)


class Special(Tensor):
    pass


class LPU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return lpu(x, self.conv)


@needs_library
class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_fullgraph_equals_eager(self, dynamic):
        graphs = []

        def backend(graph, examples):
            graphs.append(str(graph.graph))
            return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, w, b, s: depthwise_conv3x3(x * 2, w, b, shortcut=s).sin(),
            fullgraph=True,
            dynamic=dynamic,
            backend=backend,
        )
        for shape in ((2, 5, 7, 20), (3, 4, 9, 33)):
            inputs = make_inputs(shape, torch.float32)
            eager = run(lambda x, w, b, s: depthwise_conv3x3(x * 2, w, b, shortcut=s).sin(), inputs, True)
            for name, actual in run(compiled, inputs, True).items():
                torch.testing.assert_close(actual, eager[name])
        assert all("DepthwiseConv3x3Function" in g or "autograd_function" in g for g in graphs), graphs

    def test_cold_process(self):
        """The library is loaded while torch.compile traces the first call, and not by the import."""
        code = """
            import torch, cmt_fast
            from cmt_fast import _native, functional
            assert _native.load.cache_info().currsize == 0
            x, w = torch.randn(1, 3, 4, 5), torch.randn(5, 1, 3, 3)
            compiled = torch.compile(
                lambda x, w: functional.depthwise_conv3x3(x, w, backend="native"), fullgraph=True, backend="aot_eager"
            )
            y = compiled(x, w)
            assert _native.load.cache_info().currsize == 1
            torch.testing.assert_close(y, functional.depthwise_conv3x3(x, w, backend="reference"))
        """
        assert_runs(code)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: "the compiled library is not built")
    x, weight, bias, _ = make_inputs((1, 3, 4, 5), torch.float32)
    explanation = cmt_fast.explain(depthwise_conv3x3, x, weight, bias)
    assert ("depthwise_conv3x3", "reference") in explanation.calls
    with pytest.raises(cmt_fast.BackendError, match="cannot run depthwise_conv3x3: the compiled library is not built"):
        native(x, weight, bias, True)


def test_fakes_need_no_library():
    x, weight, bias, grad = (t.to("meta") for t in make_inputs((2, 3, 4, 5), torch.bfloat16))
    assert depthwise_conv3x3_fwd(x, weight, bias, True).shape == x.shape
    assert DepthwiseConv3x3Function.apply(x, weight, None, False, "native").dtype == torch.bfloat16
    dx, dweight, dbias = depthwise_conv3x3_bwd(grad, x, weight, True, False, True, True)
    assert (dx.shape[0], dweight.shape, dbias.shape) == (0, weight.shape, bias.shape)


def assert_runs(code: str, **environment: str) -> None:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
