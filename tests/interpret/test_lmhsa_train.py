"""The attention sub-layer in training, in the interpreter: every gradient and buffer against float64, and all that PyTorch does around it."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import plain_lmhsa
import pytest
import torch
from layers import draw
from mutation import mutate
from processes import in_two_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cmt_fast
from cmt_fast.functional import lmhsa
from cmt_fast.modules import DropPath, convert_sync_batchnorm
from cmt_fast.ops._triton import batch_norm, norm, statistics
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.batch_norm.schema import merge_moments_triton
from cmt_fast.ops.lmhsa import autograd, reduce_configs, triton_reduce_kernels, triton_reduce_launch
from cmt_fast.ops.lmhsa.autograd import LMHSAFunction
from cmt_fast.ops.lmhsa.reduce_schema import norm_reduce_backward_triton, norm_reduce_triton, normalise_triton
from cmt_fast.testing.inputs import Case, LMHSASubLayer, randomise, strided_randn
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare
from cmt_fast.testing.verification import Check, verify_case

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PRECISIONS = ("float32", "float16", "autocast-float16")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Large tiles: the interpreter's time is that of programs times operations. ``test_small_tiles`` has the others."""
    monkeypatch.setattr(reduce_configs, "_PROGRAMS", 1)


def shape(b: int, h: int, w: int, dim: int, heads: int, k: int, qk_ratio: int = 1, bias: bool = True) -> StageShape:
    return StageShape("", b, h, w, dim, heads, dim, k, qk_ratio, bias)


def case(s: StageShape, build=LMHSASubLayer) -> Case:
    return Case("lmhsa", f"{s}, k = {s.sr_ratio}", partial(build, s), {"x": (s.batch, s.height, s.width, s.dim)}, True)


def checks(s: StageShape, p: str, training: bool, build=LMHSASubLayer) -> list[Check]:
    """Output, gradients (the output's is not contiguous) and buffers, in memory filled with NaN, beside plain PyTorch's own errors."""
    return verify_case(case(s, build), precision(p), ["triton"], CPU, training)


def check(s: StageShape, p: str, training: bool, build=LMHSASubLayer) -> None:
    found = checks(s, p, training, build)
    assert len(found) >= 10
    assert all(c.passed for c in found), [str(c) for c in found if not c.passed]


# ---- against float64 -----------------------------------------------------------------------------------------------------------


def too_far(found: list[Check]) -> list[str]:
    """Checks of many small cases that leave the policy. Of ten numbers plain PyTorch's error may be small by luck: the own error that counts is
    the largest, in rounding units, over all cases of the same precision and quantity."""
    own: dict[tuple[str, str], float] = {}
    units = {id(c): c.bound - 3 * c.own_error for c in found}  # as compare() adds one
    for c in found:
        if units[id(c)] > 0:
            key = c.dtype, c.quantity
            own[key] = max(own.get(key, 0.0), c.own_error / units[id(c)])
    return [str(c) for c in found if not c.passed and not c.error <= (3 * own[c.dtype, c.quantity] + 1) * units[id(c)]]


@pytest.mark.parametrize("part", range(5))
def test_random_shapes(part):
    """k = 1, 2, 4, 8; rows and columns beyond the last window; q and k as wide as v or half; with and without biases."""
    generator = torch.Generator().manual_seed(part)
    found = []
    for i in range(10):
        k = 8 if i + part == 0 else (1, 2, 1, 2, 1, 2, 1, 2, 1, 4)[i % 10]
        height, width = draw(generator, 2 * k, 2 * k + min(k - 1, 2)), draw(generator, k, 2 * k - 1 + 2 // k)
        heads, qk_ratio, bias = draw(generator, 1, 2), draw(generator, 1, 2), bool(draw(generator, 0, 1))
        dim = heads * qk_ratio * draw(generator, 4, 9)
        batch = draw(generator, 1, 3)
        s = shape(batch, height, width, dim, heads, k, qk_ratio, bias)
        few = k > 1 and batch * s.keys < 6  # BatchNorm of so few values is ill-conditioned
        found += checks(s, PRECISIONS[i % 3], bool(draw(generator, 0, 1)) and not few)
    assert len(found) > 100
    assert too_far(found) == []


@pytest.mark.parametrize(("tile", "programs"), [(2048, 256), (16, 1)], ids=["one window each", "several tiles each"])
def test_small_tiles(tile, programs, monkeypatch):
    """Many programs, whose sums have to be added and merged; and programs of several tiles, the last of them partly empty."""
    monkeypatch.setattr(reduce_configs, "TILE", tile)
    monkeypatch.setattr(reduce_configs, "_PROGRAMS", programs)
    monkeypatch.setattr(statistics, "GROUP", 4)
    check(shape(2, 5, 7, 6, 2, 2), "float32", True)


@pytest.mark.parametrize(
    "s",
    [shape(2, 1, 6, 8, 2, 1), shape(2, 7, 2, 8, 2, 2), shape(2, 4, 6, 150, 3, 2)],
    ids=["one row", "one column of keys", "150 channels"],
)
def test_edges(s):
    check(s, "float16", True)
    check(s, "float32", False)


class Variant(LMHSASubLayer):
    """A sub-layer with parts that differ from a block's."""

    def __init__(self, s: StageShape, change) -> None:
        super().__init__(s)
        change(self)


VARIANTS = {
    "norm without parameters": lambda m: setattr(m, "norm", nn.LayerNorm(6, elementwise_affine=False)),
    "norm without bias": lambda m: setattr(m, "norm", nn.LayerNorm(6, bias=False)),
    "no norm": lambda m: setattr(m, "norm", None),
    "convolution without bias": lambda m: m.attn.sr.__setitem__(0, nn.Conv2d(6, 6, 2, stride=2, groups=6, bias=False)),
    "cumulative statistics": lambda m: m.attn.sr.__setitem__(1, nn.BatchNorm2d(6, momentum=None)),
    "no running statistics": lambda m: m.attn.sr.__setitem__(1, nn.BatchNorm2d(6, track_running_stats=False)),
    "drop path that drops nothing": lambda m: setattr(m, "drop_path", DropPath(0.0)),
    "projection without bias": lambda m: setattr(m.attn, "proj", nn.Linear(6, 6, bias=False)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_parts(name):
    for training in (True, False) if "statistics" in name else (True,):
        check(shape(2, 4, 5, 6, 2, 2), "float32", training, partial(Variant, change=VARIANTS[name]))


def test_branch_alone():
    class Alone(LMHSASubLayer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.attn(x.flatten(1, 2), *x.shape[1:3], self.relative_pos, norm=self.norm)
            return y.unflatten(1, x.shape[1:3])

    check(shape(2, 4, 5, 6, 2, 2), "float32", True, Alone)
    check(shape(2, 2, 3, 6, 2, 1), "autocast-float16", True, Alone)


# ---- a module with its gradients --------------------------------------------------------------------------------------------------


def sublayer(s: StageShape, seed: int = 0) -> LMHSASubLayer:
    return randomise(LMHSASubLayer(s), torch.Generator().manual_seed(seed))


def inputs(s: StageShape, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (s.batch, s.height, s.width, s.dim)
    return torch.randn(sizes, generator=generator), strided_randn(sizes, generator)


def run(module: nn.Module, x: Tensor, grad: Tensor, backend: str = "triton", call=None) -> dict[str, Tensor]:
    """Output, gradients and buffers, of a copy."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    with cmt_fast.use_backend(backend):
        out = (call or (lambda module, x: module(x)))(module, x)
        out.backward(grad)
    found = {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())
    return {"output": out.detach(), "x": x.grad, **found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


SHAPE = shape(2, 5, 6, 8, 2, 2)


def test_repeats_bit_for_bit():
    module, (x, grad) = sublayer(SHAPE), inputs(SHAPE)
    first = run(module, x, grad)
    assert_same(run(module, x, grad), first)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert_same(run(module, strided, grad.contiguous()), first)


@pytest.mark.parametrize("k", [1, 2])
def test_subsets_of_gradients(k, monkeypatch):
    """What is frozen gets no gradient, everything else the same bits, and no kernel runs for nothing."""
    s = shape(2, 5, 6, 8, 2, k)
    module, (x, grad) = sublayer(s), inputs(s)
    every = run(module, x, grad)
    launched = []
    launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.kernel.__name__), launch(self)))
    names = [name for name, _ in module.named_parameters()]
    backward = "norm_reduce_backward_kernel"
    groups = {
        "norm": True,
        "relative_pos": False,
        "attn.q": False,
        "attn.k": False,
        "attn.v.bias": False,
        "attn.proj": False,
        **({"attn.sr.0": True, "attn.sr.1": False} if k > 1 else {}),
    }
    for group, expected in groups.items():
        launched.clear()
        alone = copy.deepcopy(module)
        for name, parameter in alone.named_parameters():
            parameter.requires_grad_(name.startswith(group))
        with cmt_fast.use_backend("triton"):
            alone(x).backward(grad)
        for name in names:
            gradient = alone.get_parameter(name).grad
            assert (gradient is not None) == name.startswith(group), name
            assert gradient is None or torch.equal(gradient, every[name]), name
        assert (backward in launched) == expected, group
        assert ("gradient_sums_kernel" in launched) == group.startswith(("norm", "attn.sr")) * (k > 1), group


def test_frozen_norms_of_a_trained_model():
    """BatchNorm in eval mode inside a model in training: running statistics, frozen."""
    module, (x, grad) = sublayer(SHAPE).train(), inputs(SHAPE)
    module.attn.sr[1].eval().requires_grad_(False)
    exact = run(copy.deepcopy(module).double(), x.double(), grad.double(), "reference")
    plain = run(module, x, grad, "reference")
    for name, actual in run(module, x, grad).items():
        if actual is None:
            assert exact[name] is None
            continue
        result = compare(name, actual, exact[name], plain[name], backward=True)
        assert result.passed, str(result)


def test_drop_path_draws_as_the_module_would():
    module, (x, grad) = sublayer(shape(8, 2, 2, 8, 2, 1)), inputs(shape(8, 2, 2, 8, 2, 1))
    drop_path = DropPath(0.4).train()

    def call(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        tokens = module.attn(
            x.flatten(1, 2), 2, 2, module.relative_pos, norm=module.norm, drop_path=drop_path, shortcut=True
        )
        return tokens.view_as(x)

    exact = run(copy.deepcopy(module).double(), x.double(), grad.double(), "reference", call)
    plain = run(module, x, grad, "reference", call)
    actual = run(module, x, grad, call=call)
    dropped = (actual["output"] == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()
    for name in actual:
        beside = exact["attn.k.weight"].abs().max().item() if name == "attn.k.bias" else None
        result = compare(name, actual[name], exact[name], plain[name], backward=True, scale=beside)
        assert result.passed, str(result)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_as_without(reentrant):
    """The same bits; the statistics move as often as a plain BatchNorm's would: once more in the recomputation."""
    module, (x, grad) = sublayer(SHAPE).train(), inputs(SHAPE)

    def squared(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square()

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(squared, module, x, use_reentrant=reentrant)

    plain, expected = run(module, x, grad, call=squared), run(module, x, grad, "reference", call)
    actual = run(module, x, grad, call=call)
    buffers = {name for name, _ in module.named_buffers()}
    assert_same(
        {k: v for k, v in actual.items() if k not in buffers}, {k: v for k, v in plain.items() if k not in buffers}
    )
    assert actual["attn.sr.1.num_batches_tracked"] == expected["attn.sr.1.num_batches_tracked"] == 2
    torch.testing.assert_close(actual["attn.sr.1.running_var"], expected["attn.sr.1.running_var"])


def test_differentiated_twice_is_an_error_that_says_what_to_do():
    module, (x, grad) = sublayer(SHAPE), inputs(SHAPE)
    x.requires_grad_()
    with cmt_fast.use_backend("triton"):
        out = module(x)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*use_backend"):
        torch.autograd.grad(out, x, grad, create_graph=True)


def test_one_value_a_channel_is_an_error():
    s = shape(1, 2, 2, 6, 1, 2)
    with cmt_fast.use_backend("triton"), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        sublayer(s).train()(inputs(s)[0])


@pytest.mark.parametrize("k", [1, 2])
def test_compiles_into_one_graph(k):
    s = shape(2, 4, 4, 6, 2, k)
    module, (x, grad) = sublayer(s).train(), inputs(s)

    def compiled(module: nn.Module, x: Tensor) -> Tensor:
        return torch.compile(module, fullgraph=True, backend="aot_eager")(x)

    torch._dynamo.reset()
    assert_same(run(module, x, grad.contiguous(), call=compiled), run(module, x, grad))


def test_opcheck():
    x, vector, taps = torch.randn(2, 3, 5, 4), torch.randn(4), torch.randn(4, 4)
    arguments = (x, vector, vector, 1e-6, taps, vector, 2, torch.float16, True)
    torch.library.opcheck(norm_reduce_triton, arguments)
    torch.library.opcheck(
        norm_reduce_triton, (x.transpose(1, 2), None, None, None, None, None, 1, torch.float32, False)
    )
    reduced = torch.randn(2, 1, 2, 4)
    stats = torch.rand(6, 4)
    torch.library.opcheck(normalise_triton, (reduced, stats))
    map_ = torch.randn(2, 3, 5, 4)
    arguments = (x, map_, map_, reduced, reduced, stats, torch.randn(2, 4), vector, vector, 1e-6, taps, 2)
    torch.library.opcheck(norm_reduce_backward_triton, (*arguments, (True, True, True)))
    torch.library.opcheck(norm_reduce_backward_triton, (*arguments, (False, False, True)))


def formulas(monkeypatch) -> None:
    """Plain PyTorch in the place of every kernel, so that the Function runs in float64."""
    for name, function in dict(
        norm_reduce_triton=plain_lmhsa.norm_reduce,
        normalise_triton=plain_lmhsa.normalise,
        norm_reduce_backward_triton=plain_lmhsa.norm_reduce_backward,
        batch_norm_gradient_sums_triton=plain_lmhsa.gradient_sums,
        statistics=plain_lmhsa.statistics,
        lmhsa_core_fwd=plain_lmhsa.core_fwd,
        lmhsa_core_bwd=plain_lmhsa.core_bwd,
    ).items():
        monkeypatch.setattr(autograd, name, function)


@pytest.mark.parametrize("mode", ["batch statistics", "running statistics", "k = 1"])
def test_gradcheck_of_the_formulas(mode, monkeypatch):
    """The Function in float64, the kernels' formulas in their place, against finite differences: every input."""
    formulas(monkeypatch)
    k = 1 if mode == "k = 1" else 2
    module = sublayer(shape(2, 2, 2 * k, 4, 2, k)).double()
    parts = [
        module.norm,
        module.attn.q,
        module.attn.k,
        module.attn.v,
        module.attn.proj,
        *(module.attn.sr or [None, None]),
    ]
    parameters = [p for part in parts for p in ((None, None) if part is None else (part.weight, part.bias))]
    running = (parts[-1].running_mean, parts[-1].running_var) if mode == "running statistics" else (None, None)
    row_scale = torch.tensor([0.0, 2.0], dtype=torch.float64) + 0.5
    x = torch.randn(2, 2, 2 * k, 4, dtype=torch.float64, requires_grad=True)
    numbers = (torch.float64, 1e-6, 1e-5, None, 0.7, True)

    def branch(x: Tensor, table: Tensor, *parameters: Tensor | None) -> Tensor:
        return LMHSAFunction.apply(x, table, row_scale, *parameters, *running, *numbers)[0]

    assert torch.autograd.gradcheck(branch, (x, module.relative_pos, *parameters))


# ---- what is kept, and what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_what_is_kept_is_what_the_plan_keeps(k):
    """The stream, the reduced map, keys and values, the logarithms of softmax's sums; and vectors, a few percent."""
    s = shape(2, 16, 16, 32, 2, k)
    module, x = sublayer(s).half().train(), inputs(s)[0].half().requires_grad_()
    parameters = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.nbytes
        return t

    with cmt_fast.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    reduced = s.batch * s.keys * s.dim * 2
    plan = x.nbytes + (reduced if k > 1 else 0) + 2 * reduced + s.batch * s.heads * s.queries * 4
    assert plan <= sum(kept.values()) <= 1.1 * plan


@pytest.mark.parametrize("stage", stage_shapes("cmt_s", 256), ids=lambda s: s.name)
def test_bytes_that_move_are_the_plan_s(stage, monkeypatch):
    """Of the sub-layer's kernels, forward and backward. Around the core the plan has, in units of a map: forward reads one and writes the reduced one,
    which BatchNorm reads again; backward its sums take two reduced ones, and the last kernel two of these and four whole ones. Stage d writes
    LayerNorm's output for the product of keys and values, where the plan normalises on load."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.launches")

    def moved(*makers: Callable) -> float:
        found = [launch for make in makers for launch in make(stage, torch.bfloat16, ARCHITECTURES[90])]
        unit = stage.batch * stage.queries * stage.dim * 2
        return sum(launch.reads + launch.writes for launch in found) / unit

    small = 1 / stage.sr_ratio**2
    around = moved(launches.lmhsa_reduce_fwd, launches.lmhsa_reduce_bwd, launches.lmhsa_merges)
    plan = (1 + 2 * small) + 2 * small + (4 + 2 * small) if stage.sr_ratio > 1 else 1 + 5
    core = moved(launches.lmhsa_core_fwd, launches.lmhsa_core_bwd)
    assert plan + core <= around + core <= (1.1 if stage.sr_ratio > 1 else 1.15) * (plan + core)


# ---- over two processes -------------------------------------------------------------------------------------------------------------


def _worker(rank: int) -> dict[str, Tensor]:
    module = convert_sync_batchnorm(sublayer(SHAPE).train())
    x, grad = inputs(shape(4, 5, 6, 8, 2, 2))
    half = slice(0, 3) if rank == 0 else slice(3, 4)  # batches of different sizes
    return run(module, x[half], grad[half])


def test_two_processes_are_one(tmp_path):
    """SyncBatchNorm on gloo: statistics, buffers and gradients of both halves together are those of the whole batch in one process."""
    parts = in_two_processes(_worker, tmp_path)
    module = sublayer(SHAPE).train()
    x, grad = inputs(shape(4, 5, 6, 8, 2, 2))
    exact = run(copy.deepcopy(module).double(), x.double(), grad.double(), "reference")
    plain = run(module, x, grad, "reference")
    buffers = {name for name, _ in module.named_buffers()}
    for name in exact:
        if name in buffers:
            assert torch.equal(parts[0][name], parts[1][name])
            actual = parts[0][name]
        elif name in ("output", "x"):
            actual = torch.cat([part[name] for part in parts])
        else:
            actual = parts[0][name] + parts[1][name]
        beside = name.removesuffix("bias") + "weight"
        scale = exact[beside].abs().max().item() if name.endswith("bias") and beside in exact else None
        result = compare(name, actual, exact[name], plain[name], backward=True, scale=scale)
        assert result.passed, str(result)


# ---- when it is chosen ---------------------------------------------------------------------------------------------------------------


def reasons(change, x: Tensor | None = None) -> str:
    module = sublayer(SHAPE)
    change(module)
    with cmt_fast.use_backend("triton"), pytest.raises(cmt_fast.BackendError) as error:
        module(inputs(SHAPE)[0] if x is None else x)
    return str(error.value)


class Adapter(nn.Linear):
    pass


REASONS = {
    "subclass": (lambda m: setattr(m.attn, "q", Adapter(8, 8)), "q is a Adapter, not a plain Linear"),
    "hook": (lambda m: m.attn.v.register_forward_hook(lambda *args: None), "v has hooks"),
    "norm": (lambda m: setattr(m, "norm", nn.RMSNorm(8)), "norm is a RMSNorm, not a plain LayerNorm"),
    "batch norm": (
        lambda m: m.attn.sr.__setitem__(1, nn.Identity()),
        "reduction's norm is a Identity, not a plain BatchNorm2d",
    ),
    "reduction": (
        lambda m: setattr(m.attn, "sr", nn.Conv2d(8, 8, 2, 2)),
        "reduction is a Conv2d, not a plain Sequential",
    ),
    "convolution": (
        lambda m: m.attn.sr.__setitem__(0, nn.Conv2d(8, 8, 2, 2)),
        "reduction's convolution must be Conv2d(8, 8, k,",
    ),
    "weights dropped": (lambda m: setattr(m.attn.attn_drop, "p", 0.1), "attn_drop drops with p = 0.1"),
    "output dropped": (lambda m: setattr(m.attn.proj_drop, "p", 0.1), "proj_drop drops with p = 0.1"),
    "other dropout": (lambda m: setattr(m.attn, "proj_drop", nn.ReLU()), "proj_drop is a ReLU"),
    "float64": (lambda m: m.double(), "x and the parameters must have one dtype"),
    "mixed": (lambda m: m.attn.half(), "x and the parameters must have one dtype"),
    "no image": (lambda m: None, "x must hold an image"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    change, message = REASONS[name]
    assert message in reasons(change, torch.empty(0, 5, 6, 8) if name == "no image" else None)


def test_reasons_of_the_call(monkeypatch):
    module, x = sublayer(SHAPE), inputs(SHAPE)[0]
    arguments = dict(q=module.attn.q, k=module.attn.k, v=module.attn.v, proj=module.attn.proj, num_heads=2, scale=1.0)

    def message(**changes) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            lmhsa(x, module.relative_pos, reduction=module.attn.sr, **arguments, **changes, backend="triton")
        return str(error.value)

    assert "drop_path is a function" in message(drop_path=lambda z: z)
    assert "drop_path is a ReLU" in message(drop_path=nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        x = x.half()
        assert "under autocast float32 or autocast's" in message()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message()


def test_auto_takes_it_in_training_and_evaluation():
    module, x = sublayer(SHAPE), inputs(SHAPE)[0]
    for training in (True, False):
        assert ("lmhsa", "triton") in cmt_fast.explain(module.train(training), x).calls
        with torch.no_grad():
            assert ("lmhsa", "triton") in cmt_fast.explain(module, x).calls


def test_a_transform_takes_the_reference():
    module, (x, _) = sublayer(SHAPE).eval(), inputs(SHAPE)
    with cmt_fast.use_backend("reference"):
        expected = module(x)
    assert torch.equal(torch.vmap(lambda x: module(x[None])[0])(x).round(decimals=3), expected.round(decimals=3))


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "bias of the norm once for all taps": ("total += weights * tl.load(norm_bias", "total += tl.load(norm_bias"),
    "windows overlap": ("i * K) * width + j * K) * C + c", "i) * width + j) * C + c"),
    "moments of the tile alone": (
        "merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)\n    if partials",
        "(tile_count, tile_mean, tile_m2)\n    if partials",
    ),
    "moments of rows outside": ("tl.maximum(tl.minimum(pixels - first, BLOCK_N), 0)", "(pixels * 0 + BLOCK_N)"),
    "incomplete windows get keys' gradients": (
        "through = tl.where(complete, batch",
        "through = tl.where(complete | (c < C), batch",
    ),
    "no shortcut": ("y_grad += tl.load(grad + offset", "y_grad += 0.0 * tl.load(grad + offset"),
    "last row lost": ("(i * K + tap // K < height)", "(i * K + tap // K < height - 1)"),
    "taps' gradient of x alone": ("through * (normal * gamma + beta)", "through * (normal * gamma)"),
    "one tap's gradient": ("tl.where(index == tap,", "tl.where(index == 0,"),
    "bias gradient of one tile": ("bias_sum += tl.sum(through, 0)", "bias_sum = tl.sum(through, 0)"),
    "mean of the gradient kept": ("shared = (tl.sum(grad, 1) / channels)[:, None] + normal", "shared = normal"),
    "gradient of a shifted map": (
        "normal = (x - mean[None, :]) * rstd[None, :]\n    return",
        "normal = x * rstd[None, :]\n    return",
    ),
}


def compared() -> list[Comparison]:
    """The three kernels alone, with and without a reduction, against their formulas in float64."""
    results = []
    for k, h, w in ((2, 5, 7), (1, 3, 4)):
        generator = torch.Generator().manual_seed(k)

        def normal(*sizes: int, generator=generator) -> Tensor:
            return torch.randn(*sizes, 6, generator=generator) + 0.5

        x, grad, query_grad = normal(3, h, w), normal(3, h, w), normal(3, h, w)
        norm_weight, norm_bias, bias = normal(), normal(), normal()
        taps = normal(k * k) if k > 1 else None
        arguments = (x, norm_weight, norm_bias, 1e-6, taps, bias if k > 1 else None, k, torch.float32, k > 1)
        reduced, partials, counts = norm_reduce_triton(*arguments)
        exact = plain_lmhsa.norm_reduce(*(double(a) for a in arguments))
        plain = plain_lmhsa.norm_reduce(*arguments)
        results.append(compare("reduced", reduced, exact[0], plain[0]))
        stats = sums = None
        if k > 1:
            merged, count = merge_moments_triton(partials, counts)
            results.append(compare("mean", merged[0, 0], exact[1][0, 0], plain[1][0, 0], scale=1.0))
            results.append(compare("M2", merged[0, 1], exact[1][0, 1], plain[1][0, 1]))
            results.append(compare("count", count, exact[2], plain[2]))
            stats, sums = normal(6).abs() + 0.1, normal(2)
            results.append(
                compare(
                    "normalised",
                    normalise_triton(reduced, stats),
                    *(
                        plain_lmhsa.normalise(double(reduced) if wide else reduced, double(stats) if wide else stats)
                        for wide in (True, False)
                    ),
                )
            )
        shared = (x, grad, query_grad, normal(3, h // k, w // k), reduced if k > 1 else None, stats, sums)
        arguments = (*shared, norm_weight, norm_bias, 1e-6, taps, k, (True, True, k > 1))
        found = norm_reduce_backward_triton(*arguments)
        exact = plain_lmhsa.norm_reduce_backward(*(double(a) for a in arguments))
        plain = plain_lmhsa.norm_reduce_backward(*arguments)
        for name, *tensors in zip(("x", "norm", "taps"), found, exact, plain):
            if name != "taps" or k > 1:
                results.append(compare(f"{name}, k = {k}", *tensors, backward=True))
    return results


def double(argument: object) -> object:
    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if isinstance(argument, Tensor) else argument


def failures(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    *_, pieces, kernels = mutate(monkeypatch, tmp_path, [norm, batch_norm, triton_reduce_kernels], old, new)
    for name in ("normalise_kernel", "norm_reduce_backward_kernel", "norm_reduce_kernel"):
        monkeypatch.setattr(triton_reduce_launch, name, getattr(kernels, name))
    for name in ("add_partials_kernel", "merge_moments_kernel"):
        monkeypatch.setattr(statistics, name, getattr(pieces, name))
    monkeypatch.setattr(reduce_configs, "TILE", 16)
    with poisoned_empty():
        return [str(result) for result in compared() if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, "bias_sum += tl.sum(through, 0)", "bias_sum += tl.sum(through, 0)") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, *MUTATIONS[name])
