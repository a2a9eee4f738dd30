"""The end of the IRFFN with the LPU of the next block, in the interpreter: beside float64, beside the operations that it joins, and when it is chosen."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from expected import compared, error, expected_of
from irffn_layers import Factors, SubLayer, few_programs, forget, parts
from layers import Adapter, assert_equal, draw, gradient, made, results
from mutation import mutate
from torch import Tensor, nn

import cmt_fast
from cmt_fast import functional
from cmt_fast.modules import Block
from cmt_fast.modules.block import run_blocks
from cmt_fast.ops._triton.launch import record_launches
from cmt_fast.ops.depthwise import configs
from cmt_fast.ops.depthwise.schema import conv3x3_bwd_triton, conv3x3_fwd_triton
from cmt_fast.ops.irffn import output_lpu_schema, train_schema
from cmt_fast.ops.irffn import triton_output_lpu_kernels as kernels
from cmt_fast.ops.irffn import triton_output_lpu_launch as launchers
from cmt_fast.testing.inputs import Case, randomise
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.tolerance import Comparison, compare

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(configs, "PROGRAMS_WITH_SUMS", 2)
    with few_programs(monkeypatch):
        yield


# ---- the kernels beside float64, and beside those that they join ------------------------------------------------------------


def operands(
    generator: torch.Generator, shape: tuple[int, ...], low: torch.dtype, stream: torch.dtype, **without: bool
):
    """y, n3, factor, shortcut, weight, bias and the gradient of the result; ``without`` a factor or a bias."""
    b, _, _, c = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n3 = torch.stack([normal(c), *(torch.rand(c, generator=generator) + 0.5 for _ in range(3)), normal(c), normal(c)])
    factor = None if without.get("factor") else torch.tensor([2.0, 0.0, 0.5]).repeat(b)[:b].to(low)
    bias = None if without.get("bias") else normal(c).to(stream)
    maps = normal(*shape).to(low), normal(*shape).to(stream), normal(*shape).to(stream)
    return maps[0], n3, factor, maps[1], (normal(c, 1, 3, 3) / 3).to(stream), bias, maps[2]


def in_pytorch(y, n3, factor, shortcut, weight, bias, grad, dtype: torch.dtype | None = None) -> Tensors:
    """The result and every gradient by autograd; in ``dtype``, or in the tensors' own."""
    if dtype is not None:
        y, n3, shortcut, weight, grad = (t.to(dtype) for t in (y, n3, shortcut, weight, grad))
        factor, bias = (t if t is None else t.to(dtype) for t in (factor, bias))
    mean, _, rstd, scale, added, _ = n3
    gamma = (scale / rstd).requires_grad_()
    beta = added.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    bias = bias.clone().requires_grad_()
    branch = ((y.to(n3.dtype) - mean) * rstd * gamma + beta).to(y.dtype)
    out = shortcut + (branch if factor is None else branch * factor.view(-1, 1, 1, 1))
    out.retain_grad()
    lpu = F.conv2d(out.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1) + out
    lpu.backward(grad)
    found = {"lpu": lpu.detach(), "dout": out.grad, "sums": torch.stack([beta.grad, gamma.grad])}
    return found | {"dweight": weight.grad, "dbias": bias.grad}


def by_kernels(y, n3, factor, shortcut, weight, bias, grad) -> Tensors:
    with poisoned_empty():
        lpu = output_lpu_schema.output_lpu(y, n3, factor, shortcut, weight, bias)
        needs = (True, True, True)
        dout, sums = output_lpu_schema.output_lpu_gradient(grad, y, n3, factor, shortcut, weight, *needs)
    c = len(weight)
    s3, dweight, dbias = sums.split([2 * c, 9 * c, c])
    gradients = {"dweight": dweight.view_as(weight).to(weight.dtype), "dbias": dbias.to(weight.dtype)}
    return {"lpu": lpu, "dout": dout, "sums": s3.view(2, c)} | gradients


def failures(actual: Tensors, *call: Tensor | None) -> list[str]:
    """By the policy. Under autocast plain PyTorch convolves in 16 bits, the kernels in float32, as the LPU's own do."""
    exact, plain, low = in_pytorch(*call, dtype=torch.float64), in_pytorch(*call), call[0].dtype
    found = [
        compare(name, actual[name], exact[name], plain[name], backward=name != "lpu", dtype=low, scale=scale_of(call))
        for name in exact
    ]
    return [str(result) for result in found if not result.passed]


def scale_of(call: tuple[Tensor | None, ...]) -> float:
    """Sums over pixels of terms of either sign: their terms' size."""
    return call[-1].abs().max().item()


def separate(y, n3, factor, shortcut, weight, bias, grad) -> Tensors:
    """What the operations do that are joined, one after the other."""
    out = train_schema.output(y, n3, factor, shortcut)
    lpu = conv3x3_fwd_triton(out, weight, bias, True)
    return {"lpu": lpu, "dout": conv3x3_bwd_triton(grad, out, weight, True, True, False, False)[0]}


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("part", range(4))
def test_random_shapes(part, monkeypatch):
    generator = torch.Generator().manual_seed(part)
    for _ in range(10):
        monkeypatch.setattr(configs, "PROGRAMS_WITH_SUMS", (1, 3, 8)[draw(generator, 0, 2)])
        forget()
        shape = (draw(generator, 1, 4), draw(generator, 1, 7), draw(generator, 1, 6), draw(generator, 1, 20))
        dtypes = list(DTYPES.values())[draw(generator, 0, 2)]
        without = {name: draw(generator, 0, 3) == 0 for name in ("factor", "bias")}
        call = operands(generator, shape, *dtypes, **without)
        joined = by_kernels(*call)
        assert failures(joined, *call) == [], (shape, dtypes, without)
        for name, tensor in separate(*call).items():
            assert torch.equal(joined[name], tensor), f"{name} of {shape}, {dtypes}: the joined kernel rounds otherwise"


@pytest.mark.parametrize("shape", [(3, 2, 7, 70), (1, 1, 9, 65), (1, 9, 1, 66), (9, 1, 1, 3), (1, 1, 2, 1)], ids=str)
def test_edges(shape):
    """More channels and columns than a tile has, one row, one column, one pixel."""
    call = operands(torch.Generator().manual_seed(0), shape, torch.float16, torch.float16)
    assert failures(by_kernels(*call), *call) == []


def test_strides_of_every_operand():
    call = operands(torch.Generator().manual_seed(0), (2, 3, 4, 5), torch.float32, torch.float32)
    strided = [t if t is None or t.dim() != 4 else t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in call]
    assert not strided[0].is_contiguous()
    for name, tensor in by_kernels(*call).items():
        assert torch.equal(by_kernels(*strided)[name], tensor), name


def test_what_is_not_needed_is_neither_made_nor_read():
    call = operands(torch.Generator().manual_seed(0), (2, 3, 5, 6), torch.float32, torch.float32)
    y, n3, factor, shortcut, weight, _, grad = call
    whole = output_lpu_schema.output_lpu_gradient(grad, y, n3, factor, shortcut, weight, True, True, True)
    parts_of = dict(zip(("out", "weight", "bias"), whole[1].split([2 * 6, 9 * 6, 6])))
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]:
        with record_launches() as launched:
            dout, sums = output_lpu_schema.output_lpu_gradient(grad, y, n3, factor, shortcut, weight, *needs)
        wanted = [sums for needed, sums in zip(needs, parts_of.values()) if needed]
        assert torch.equal(sums, torch.cat(wanted))
        assert torch.equal(dout, whole[0]) if needs[0] else len(dout) == 0
        maps = 2 + needs[1] + needs[0]  # grad and y, the shortcut for the taps, and dout
        small = sum(t.nbytes for t in (n3, factor, weight, launched[0].arguments["partials"]))
        assert launched[0].reads + launched[0].writes == maps * y.nbytes + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    y, n3, factor, shortcut, weight, bias, grad = operands(torch.Generator(), (2, 3, 3, 5), dtype, torch.float32)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check(output_lpu_schema.output_lpu, (y, n3, factor, shortcut, weight, bias))
    check(output_lpu_schema.output_lpu, (y, n3, None, shortcut, weight, None))
    for needs in [(True, True, True), (False, True, False), (True, False, False)]:
        check(output_lpu_schema.output_lpu_gradient, (grad, y, n3, factor, shortcut, weight, *needs))


# ---- the whole sub-layer ------------------------------------------------------------------------------------------------------


class Joined(SubLayer):
    """The IRFFN and the LPU after it."""

    def __init__(self, dim: int, hidden: int, bias: bool = True, **options) -> None:
        super().__init__(dim, hidden, **options)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        around = dict(norm=self.norm, drop_path=self.drop_path, shortcut=self.shortcut, lpu=self.conv)
        return self.mlp(x.flatten(1, 2), *x.shape[1:3], **around).unflatten(1, x.shape[1:3])


class Separate(Joined):
    """The same in two calls."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.lpu(SubLayer.forward(self, x), self.conv)


def made_pair(*shape: int, hidden: int = 6, dtype: torch.dtype = torch.float32, **options) -> tuple[Joined, Tensor]:
    return made(Joined(shape[3], hidden, **options), *shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "training"),
    [
        ((2, 3, 4, 5), dict(drop_path=Factors()), "float32", True),
        ((3, 4, 3, 7), dict(drop_path=Factors(), bias=False), "float16", True),
        ((3, 3, 3, 6), dict(drop_path=Factors()), "autocast-float16", True),
        ((2, 3, 4, 5), dict(frozen=True), "float32", True),
        ((2, 3, 4, 5), {}, "float32", False),
    ],
    ids=["float32", "float16, no bias", "autocast", "one norm frozen", "evaluation"],
)
def test_beside_float64(shape, options, dtype, training):
    """Output, gradients and buffers."""
    case = Case("irffn_lpu", str(shape), partial(Joined, shape[3], 8, **options), {"x": shape}, stateful=True)
    found: list[Comparison] = []
    expected = expected_of(case, dtype, training)
    calls = cmt_fast.explain(lambda: found.extend(compared(case, dtype, training, expected))).calls
    assert calls == {("irffn_lpu", "triton"): 1}
    assert len(found) == 27 - (not options.get("bias", True))
    for result in found:
        assert result.passed, str(result)


def test_a_run_repeats_bit_for_bit_with_any_strides_of_its_gradient():
    layer, x = made_pair(2, 3, 5, 6, drop_path=Factors())
    expected = results(layer, x)
    grad = gradient(expected["output"])
    assert_equal(results(layer, x, grad.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)), expected)
    layer.mlp.recompute = True
    assert_equal(results(layer, x), expected)


@pytest.mark.parametrize("stream", [torch.float32, torch.float16], ids=str)
def test_it_is_the_two_operations(stream):
    """Outputs and statistics bit for bit, also under autocast with a stream of either width; sums are cut otherwise."""
    layer, x = made_pair(3, 3, 4, 5, drop_path=Factors())
    other = copy.deepcopy(layer)
    other.__class__ = Separate
    with torch.autocast("cpu", torch.float16):
        found, expected = results(layer, x.to(stream)), results(other, x.to(stream))
    buffers = dict(layer.named_buffers())
    assert found["output"].dtype == stream and found["x"].dtype == stream
    for name, tensor in expected.items():
        if name == "output" or name in buffers:
            assert torch.equal(found[name], tensor), name
        else:
            unit = torch.finfo(torch.float16).eps * max(1.0, tensor.abs().max().item())
            assert error(found[name], tensor) <= unit, name


FROZEN = {
    "the LPU": (lambda name: name.startswith("conv"), True),
    "the IRFFN": (lambda name: not name.startswith("conv"), True),
    "all but the LPU": (lambda name: not name.startswith("conv"), False),
    "all but the LPU's bias": (lambda name: name != "conv.bias", False),
    "all but BN3's weight": (lambda name: name != "mlp.conv2.1.weight", False),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts(name):
    """Nobody pays for them, and everything else gets the same bits."""
    frozen, needs_x = FROZEN[name]
    layer, x = made_pair(2, 2, 3, 4)
    expected = results(layer, x)
    for parameter_name, parameter in layer.named_parameters():
        parameter.requires_grad_(not frozen(parameter_name))
    with record_launches() as launched:
        found = results(layer, x.requires_grad_(needs_x))
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert found.keys() == {"output", *trained, *dict(layer.named_buffers())} | ({"x"} if needs_x else set())
    for tensor_name in found:
        assert torch.equal(found[tensor_name], expected[tensor_name]), tensor_name
    ran = [launch.kernel.__name__ for launch in launched]
    assert ran.count("output_lpu_gradient_kernel") == 1 and "output_sums_kernel" not in ran
    assert ("dw_gradient_kernel" in ran) == needs_x


def test_kept_for_the_backward_pass():
    """What the IRFFN keeps, and no map for the LPU, which alone keeps its input."""

    def kept(layer: nn.Module, x: Tensor) -> int:
        parameters, found = {p.data_ptr() for p in layer.parameters()}, {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                found[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(x)
        assert out.requires_grad
        return sum(found.values())

    layer, x = made_pair(2, 3, 4, 6, hidden=12)
    joined = kept(layer, x)
    layer.__class__ = SubLayer
    assert kept(layer, x) == joined
    layer.__class__ = Separate
    assert kept(layer, x) == joined + x.numel()


def test_second_derivatives_are_refused():
    layer, x = made_pair(2, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*use_backend\(\"reference\"\)"):
        torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)


def test_compiles_into_one_graph():
    layer, x = made_pair(2, 2, 2, 3, hidden=4)
    compiled = copy.deepcopy(layer)
    compiled.forward = torch.compile(Joined.forward, fullgraph=True, backend="aot_eager").__get__(compiled)
    out, leaf = layer(x.requires_grad_()), x.detach().clone().requires_grad_()
    again = compiled(leaf)
    out.square().sum().backward()
    again.square().sum().backward()
    pairs = [(out, again), (x.grad, leaf.grad), *zip(layer.buffers(), compiled.buffers())]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), compiled.parameters())]
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- when it is chosen ---------------------------------------------------------------------------------------------------------

BOTH = {("irffn", "triton"): 1, ("lpu", "triton"): 1}
JOINED = {("irffn_lpu", "triton"): 1}
LPU = dict(padding=1, groups=5)


def explained(conv: nn.Module, backend: str = "auto", x: Tensor | None = None, **changes) -> dict[tuple[str, str], int]:
    x = torch.randn(2, 3, 4, 5) if x is None else x
    with cmt_fast.use_backend(backend):
        return cmt_fast.explain(lambda: functional.irffn_lpu(x, conv, **parts(), **changes)).calls


def test_it_is_chosen_with_and_without_gradients():
    conv = nn.Conv2d(5, 5, 3, **LPU)
    assert explained(conv) == explained(conv, "triton") == JOINED
    with torch.no_grad():
        assert explained(conv) == JOINED
    assert explained(conv, "reference") == {("irffn", "reference"): 1, ("lpu", "reference"): 1}


def test_where_it_cannot_run_each_part_chooses():
    """And tells its own reasons."""
    conv = nn.Conv2d(5, 5, 3, **LPU)
    assert explained(conv, shortcut=False) == BOTH
    assert explained(conv, drop=nn.Dropout(0.5)) == {("irffn", "reference"): 1, ("lpu", "triton"): 1}
    assert explained(Adapter(5, 5, 3, **LPU)) == {("irffn", "triton"): 1, ("lpu", "reference"): 1}
    with pytest.raises(cmt_fast.BackendError, match="cannot run lpu: conv is a Adapter, not a plain Conv2d"):
        explained(Adapter(5, 5, 3, **LPU), "triton")
    with pytest.raises(cmt_fast.BackendError, match=r"cannot run irffn: drop drops with p = 0\.5"):
        explained(conv, "triton", drop=nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.randn(3, 4, 5), nn.Conv2d(5, 5, 3, **LPU)), ValueError, "x must be a 4-D tensor"),
        ((torch.randn(2, 3, 4, 5), F.relu), TypeError, "conv must be a module, got function"),
        ((torch.randn(2, 3, 4, 5), nn.Conv2d(6, 6, 3, padding=1)), ValueError, "conv takes 6 channels but x has 5"),
        ((torch.randn(2, 3, 4, 5), nn.Conv2d(5, 5, 3, **LPU).half()), TypeError, "conv is torch.float16 but x is"),
    ],
)
def test_errors_are_those_of_the_parts(arguments, kind, message):
    with pytest.raises(kind, match=message):
        functional.irffn_lpu(*arguments, **parts())


def test_blocks_of_a_stage():
    """Two blocks whose middle is joined are the two blocks: outputs and buffers bit for bit."""
    generator = torch.Generator().manual_seed(0)
    blocks = nn.ModuleList(randomise(Block(4, 1, 2.0, sr_ratio=2), generator) for _ in range(2))
    x, bias = torch.randn(2, 8, 4, generator=generator), torch.randn(1, 8, 2, generator=generator)

    class InTurn(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = block(x, 2, 4, bias)
            return x

    class Stage(InTurn):
        def forward(self, x: Tensor) -> Tensor:
            return run_blocks(self, x, 2, 4, bias)

    found, expected = results(Stage(blocks), x), results(InTurn(blocks), x)
    names = {"output", *dict(Stage(blocks).named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if name in names:
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
    calls = cmt_fast.explain(Stage(blocks), x).calls
    assert calls == {("lpu", "triton"): 1, ("lmhsa", "triton"): 2, ("irffn_lpu", "triton"): 1, ("irffn", "triton"): 1}


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------------

MUTATIONS = {
    "no shortcut around the convolution": ("1, 9, True, False, PAIRS", "1, 9, False, False, PAIRS"),
    "taps of the gradient not turned": ("1, 9, True, True, PAIRS", "1, 9, True, False, PAIRS"),
    "a border that is not 0": ("tl.where(left & there, a, 0.0)", "a"),
    "a row outside of the map": ("tl.where(inside_e & there, e, 0.0)", "tl.where(inside_e, e, 0.0)"),
    "factor of the other image": ("(column + 1) // width", "column // width"),
    "the shortcut scaled too": ("* factor + shortcut.to(tl.float32))", "+ shortcut.to(tl.float32)) * factor"),
    "upper and lower taps exchanged": ("add_products(lower, *above, out_e, out_o)", "add_products(lower, *below, out_e, out_o)"),
    "BN3's sums of even columns": ("sum_branch += branch_e + branch_o", "sum_branch += branch_e"),
    "BN3's sums without the factor": ("dout_o.to(tl.float32) * factor_o", "dout_o.to(tl.float32)"),
    "values not normalised": ("branch_o * (centred_o * rstd)", "branch_o * centred_o"),
    "bias of even columns": ("sum_grad += here[1] + here[4]", "sum_grad += here[1]"),
    "one strip's sums lost": ("(tile * strips + strip).to(tl.int64)", "(tile * strips).to(tl.int64)"),
    "out of the row below": ("next_row = (i + 1) * row_size", "next_row = i * row_size"),
}  # fmt: skip


def mutant_fails(monkeypatch, tmp_path, old: str, new: str) -> bool:
    (changed,) = mutate(monkeypatch, tmp_path, [kernels], old, new)
    for name in ("output_lpu_kernel", "output_lpu_gradient_kernel"):
        monkeypatch.setattr(launchers, name, getattr(changed, name))
    monkeypatch.setattr(configs, "PROGRAMS_WITH_SUMS", 2)  # two strips of several rows
    forget()
    call = operands(torch.Generator().manual_seed(0), (3, 9, 3, 4), torch.float32, torch.float32)
    return bool(failures(by_kernels(*call), *call))


def test_without_a_mutation(monkeypatch, tmp_path):
    assert not mutant_fails(monkeypatch, tmp_path, "1, 9, True, True, PAIRS", "1, 9, True, True, PAIRS")


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert mutant_fails(monkeypatch, tmp_path, *MUTATIONS[name])


def test_rounding_of_the_map_between(monkeypatch, tmp_path):
    """Without it the result would be better than that of the two operations, and another."""
    (changed,) = mutate(monkeypatch, tmp_path, [kernels], ".to(dtype).to(tl.float32)", "")
    monkeypatch.setattr(launchers, "output_lpu_kernel", changed.output_lpu_kernel)
    call = operands(torch.Generator().manual_seed(0), (3, 4, 4, 5), torch.float16, torch.float16)
    assert not torch.equal(by_kernels(*call)["lpu"], separate(*call)["lpu"])
