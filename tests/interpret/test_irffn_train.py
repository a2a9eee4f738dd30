"""The training kernels of the IRFFN in the interpreter: outputs, every gradient and every buffer against float64, and what autograd asks of them."""

import copy
import functools
from functools import partial

import pytest
import torch
from expected import compared, expected_of
from irffn_layers import Factors, SubLayer, few_programs, forget, made_layer, parts
from layers import Adapter, assert_equal, draw, gradient, results
from mutation import mutate
from processes import in_two_processes
from torch import Tensor, nn
from torch.utils import checkpoint

import cmt_fast
from cmt_fast import functional
from cmt_fast.modules import DropPath, convert_sync_batchnorm
from cmt_fast.ops._triton import batch_norm
from cmt_fast.ops.irffn import train_configs, train_schema, triton_train_kernels, triton_train_launch
from cmt_fast.testing.inputs import Case


@pytest.fixture(autouse=True)
def small(monkeypatch):
    with few_programs(monkeypatch):
        yield


def case(*shape: int, hidden: int, strided: bool = False, **options) -> Case:
    build = partial(SubLayer, shape[3], hidden, **options)
    return Case("irffn", f"{shape}, {hidden}", build, {"x": shape}, stateful=True, strided=strided)


def check(case: Case, dtype: str, training: bool) -> None:
    found = compared(case, dtype, training, expected_of(case, dtype, training))
    assert len(found) == 25  # output, 15 gradients, 9 buffers
    for result in found:
        assert result.passed, f"{case.name}, {dtype}: {result}"


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part, monkeypatch):
    generator = torch.Generator().manual_seed(part)
    for i in range(10):
        monkeypatch.setattr(train_configs, "PROGRAMS", (1, 1, 8)[draw(generator, 0, 2)])
        monkeypatch.setattr(triton_train_launch, "WHOLE_ROW", (8, 256)[i % 2])
        forget()
        height, width = draw(generator, 1, 4), draw(generator, 1, 5)
        batch = -(-16 // (height * width)) + draw(generator, 0, 1)
        dim, hidden = draw(generator, 3, 20), draw(generator, 4, 32)  # fewer, and a norm leaves nothing of a gradient
        options = dict(drop_path=(None, Factors())[draw(generator, 0, 1)], shortcut=draw(generator, 0, 3) > 0)
        dtype = ("float32", "float16", "autocast-float16")[draw(generator, 0, 2)]
        check(case(batch, height, width, dim, hidden=hidden, **options), dtype, training=draw(generator, 0, 2) > 0)


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype"),
    [
        ((2, 2, 3, 46), 165, "float16"),
        ((1, 2, 3, 20), 331, "float32"),
        ((1, 3, 4, 76), 37, "float16"),
        ((2, 3, 3, 37), 5, "float32"),
        ((9, 1, 1, 10), 12, "float16"),
        ((2, 1, 7, 20), 33, "float32"),
        ((2, 9, 1, 20), 33, "float16"),
        ((1, 17, 2, 4), 5, "float32"),
    ],
    ids=["tiny", "tiny b", "base", "odd", "one pixel an image", "one row", "one column", "several strips"],
)
def test_widths_and_edges(shape, hidden, dtype):
    check(case(*shape, hidden=hidden), dtype, training=True)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(256, "float32"), (256, "float16"), (257, "float32"), (260, "autocast-float16")]
)
def test_whole_rows_and_wider_ones(dim, dtype):
    """LayerNorm's gradient in the product's kernel, and behind it."""
    check(case(2, 3, 4, dim, hidden=21), dtype, training=True)


def test_three_values_a_channel():
    check(case(3, 1, 1, 6, hidden=8), "float32", training=True)


def test_strided_input():
    check(case(2, 3, 4, 6, hidden=8, strided=True), "float16", training=True)


def test_one_norm_frozen():
    """BN2 in eval mode in a model that trains."""
    check(case(2, 3, 4, 6, hidden=7, frozen=True), "float32", training=True)


def test_large_means_do_not_cancel():
    """Channels whose values are far from 0 beside their spread: moments are merged, not sums of squares."""
    layer, x = made_layer(2, 4, 5, 6, hidden=7)
    with torch.no_grad():
        layer.mlp.conv1[0].bias += 1000.0
        layer.mlp.proj.bias += 1000.0
    found = results(layer, x)
    with cmt_fast.use_backend("reference"):
        exact = results(copy.deepcopy(layer).double(), x.double())
    for name in ("mlp.conv1.2.running_var", "mlp.proj_bn.running_var"):
        torch.testing.assert_close(
            found[name].double(), exact[name], rtol=1e-4, atol=0
        )  # squares of 1000 would lose 0.1


# ---- bit for bit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_recomputing_changes_no_bit_and_a_run_repeats(dtype):
    layer, x = made_layer(2, 3, 3, 6, hidden=9, dtype=dtype, drop_path=Factors())
    expected = results(layer, x)
    assert_equal(results(layer, x), expected)
    layer.mlp.recompute = True
    assert_equal(results(layer, x), expected)


SUBSETS = {
    "none": [],
    "LayerNorm": ["norm.bias"],
    "expansion": ["mlp.conv1.0.weight"],
    "BN1": ["mlp.conv1.2.weight"],
    "convolution": ["mlp.proj.bias"],
    "BN2": ["mlp.proj_bn.bias"],
    "projection": ["mlp.conv2.0.weight"],
    "BN3": ["mlp.conv2.1.weight"],
}


@pytest.mark.parametrize("training", [True, False])
def test_subsets_of_gradients(training):
    layer, x = made_layer(2, 2, 2, 3, hidden=4)
    layer.train(training)
    expected = results(layer, x)
    for i, wanted in enumerate(SUBSETS.values()):
        needs_x = i % 2 == training
        if not training and i % 2:  # the others have been seen in training
            continue
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in wanted)
        found = results(layer, x.requires_grad_(needs_x))
        gradients = [*wanted, *(["x"] if needs_x else [])]
        assert found.keys() == {"output", *gradients, *dict(layer.named_buffers())}
        for name in gradients:
            assert torch.equal(found[name], expected[name]), name


# ---- BatchNorm, as PyTorch has it ----------------------------------------------------------------------------------------


def against_reference(layer: SubLayer, x: Tensor, steps: int = 2) -> None:
    """Buffers and outputs after some steps are those of the reference, to float32's rounding."""
    other = copy.deepcopy(layer)
    for _ in range(steps):
        out = layer(x)
        with cmt_fast.use_backend("reference"):
            expected = other(x)
        torch.testing.assert_close(out, expected)
    for (name, buffer), (_, wanted) in zip(layer.named_buffers(), other.named_buffers()):
        torch.testing.assert_close(buffer, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_cumulative_average():
    layer, x = made_layer(2, 3, 4, 5, hidden=6)
    for bn in (layer.mlp.conv1[2], layer.mlp.proj_bn, layer.mlp.conv2[1]):
        bn.momentum = None
    against_reference(layer, x, steps=3)


@pytest.mark.parametrize("training", [True, False])
def test_no_running_statistics(training):
    layer, x = made_layer(2, 3, 4, 5, hidden=6)
    layer.mlp.proj_bn = nn.BatchNorm2d(6, track_running_stats=False, affine=False)
    layer.mlp.conv1[2] = nn.BatchNorm2d(6, affine=False)
    layer.train(training)
    against_reference(layer, x)
    layer.mlp.recompute = True
    results(layer, x)


def test_one_value_a_channel_is_an_error_of_training_alone():
    layer, x = made_layer(1, 1, 1, 5, hidden=6)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        layer(x)
    layer.eval()
    against_reference(layer, x)


def test_missing_biases_and_affine():
    layer, x = made_layer(2, 3, 4, 5, hidden=6)
    layer.mlp.conv1[0] = nn.Conv2d(5, 6, 1, bias=False)
    layer.mlp.proj = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    layer.mlp.conv2[0] = nn.Conv2d(6, 5, 1, bias=False)
    layer.norm = nn.LayerNorm(5, elementwise_affine=False)
    against_reference(layer, x)


def test_drop_path_is_the_modules_own_draw():
    layer, x = made_layer(5, 2, 3, 4, hidden=6, drop_path=DropPath(0.5))
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    with cmt_fast.use_backend("reference"):
        torch.testing.assert_close(found, layer(x))
    dropped = (found == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()


def test_checkpointing_updates_statistics_once_or_as_plain_pytorch_does():
    """Recomputation stops after the function, before the statistics are updated; where it must not stop, they are updated again."""

    def buffers(backend: str, early_stop: bool) -> dict[str, Tensor]:
        layer, x = made_layer(2, 2, 2, 3, hidden=4)
        with cmt_fast.use_backend(backend), checkpoint.set_checkpoint_early_stop(early_stop):
            checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
        return dict(layer.named_buffers())

    once = results(*made_layer(2, 2, 2, 3, hidden=4))
    for name, buffer in buffers("triton", True).items():
        assert torch.equal(buffer, once[name])
    expected = buffers("reference", False)
    for name, buffer in buffers("triton", False).items():
        torch.testing.assert_close(buffer, expected[name])


# ---- over two processes --------------------------------------------------------------------------------------------------


def worker(rank: int) -> dict[str, Tensor]:
    layer, x = made_layer(4, 2, 3, 4, hidden=5)
    part = slice(0, 3) if rank == 0 else slice(3, 4)  # batches of different sizes
    with cmt_fast.use_backend("triton"):
        return results(convert_sync_batchnorm(layer), x[part], gradient(x)[part])


def test_two_processes_are_one(tmp_path):
    """Outputs and statistics are those of the whole batch, and gradients of the parameters add up to its."""
    layer, x = made_layer(4, 2, 3, 4, hidden=5)
    expected = results(layer, x)
    first, second = in_two_processes(worker, tmp_path)
    buffers = dict(layer.named_buffers())
    for name, wanted in expected.items():
        if name in ("output", "x"):
            actual = torch.cat([first[name], second[name]])
        else:
            actual = first[name] if name in buffers else first[name] + second[name]
        scale = max(
            1.0, wanted.double().abs().max().item()
        )  # a bias before a BatchNorm has gradient 0, a sum of such terms
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * scale)


# ---- autograd, operators, torch.compile ----------------------------------------------------------------------------------


def test_second_derivatives_are_refused():
    layer, x = made_layer(2, 2, 3, 4, hidden=5)
    out = layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*use_backend\(\"reference\"\)"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_for_the_backward_pass(recompute):
    """x, u, y, and h unless it is recomputed; beside them, vectors and the parameters themselves."""
    layer, x = made_layer(2, 4, 5, 6, hidden=24)
    layer.mlp.recompute = recompute
    known = {p.data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x.requires_grad_())
    pixels, vectors = x.numel() // 6, 6 * (24 + 24 + 6)
    assert sum(kept.values()) == pixels * (6 + 24 + 6 + (0 if recompute else 24)) + vectors
    assert out.requires_grad


def test_compiles_into_one_graph():
    layer, x = made_layer(2, 2, 2, 3, hidden=4, drop_path=Factors())
    compiled = copy.deepcopy(layer)
    compiled.forward = torch.compile(SubLayer.forward, fullgraph=True, backend="aot_eager").__get__(compiled)
    out, leaf = layer(x.requires_grad_()), x.detach().clone().requires_grad_()
    again = compiled(leaf)
    out.square().sum().backward()
    again.square().sum().backward()
    pairs = [(out, again), (x.grad, leaf.grad), *zip(layer.buffers(), compiled.buffers())]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), compiled.parameters())]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    b, height, width, c, r = 2, 2, 3, 4, 5
    generator = torch.Generator().manual_seed(0)

    def map_(channels: int) -> Tensor:
        return torch.randn(b, channels, height, width, generator=generator).to(dtype).permute(0, 2, 3, 1)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, h, y, factor = map_(c), map_(r), map_(c), matrix(b)
    n, s, n3, s3 = torch.rand(6, r), torch.rand(2, r), torch.rand(6, c), torch.rand(2, c)
    w1, w2, taps, vector, moments = (
        matrix(r, c),
        matrix(c, r),
        matrix(r, 1, 3, 3),
        matrix(r),
        torch.rand(b * height * width, 2),
    )
    calls = {
        "expand": (x, w1, vector.float(), 1e-6, True),
        "dw": (h, n, taps, vector, True),
        "project": (h, n, w2, None, False),
        "output": (y, n3, factor, x.float()),
        "output_sums": (x, y, n3, factor),
        "output_gradient": (x, y, n3, s3, None),
        "project_weight": (x, y, n3, s3, factor, h, n, w2, vector, None),
        "project_input": (y, w2, h, n, s),
        "dw_gradient": (h, h + 1, n, taps),
        "expand_input": (h, h + 1, n, s, w1, x, None, 1e-6),
        "expand_weight": (h, h + 1, n, s, x, moments, w1, factor.new_ones(c), matrix(c)),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(train_schema, name), arguments, test_utils=("test_schema", "test_faketensor"))


# ---- when it is chosen ---------------------------------------------------------------------------------------------------


def test_auto_takes_it_with_and_without_gradients():
    layer, x = made_layer(2, 3, 4, 5, hidden=6)
    cmt_fast.set_backend("auto")
    for training in (True, False):
        layer.train(training)
        assert ("irffn", "triton") in cmt_fast.explain(layer, x).calls
        with torch.no_grad():
            assert ("irffn", "triton") in cmt_fast.explain(layer, x).calls


REASONS = {
    "no norm": (dict(norm=None), "norm is None, and the kernels begin with a LayerNorm"),
    "other norm": (dict(norm=nn.LayerNorm([4, 5])), "norm must be LayerNorm(5) with a positive eps"),
    "subclass": (dict(dw=Adapter(6, 6, 3, padding=1, groups=6)), "dw is a Adapter, not a plain Conv2d"),
    "stride": (dict(dw=nn.Conv2d(6, 6, 3, groups=6)), "dw must be Conv2d(6, 6, 3, padding=1, groups=6), got"),
    "kernel": (
        dict(project=nn.Conv2d(6, 5, 3, padding=1)),
        "project must be Conv2d(6, 5, 1, padding=0, groups=1), got",
    ),
    "tanh": (dict(act1=nn.GELU("tanh")), "act1 must be the exact GELU, F.gelu or a plain nn.GELU, got GELU"),
    "activation": (dict(act2=torch.relu), "act2 must be the exact GELU, F.gelu or a plain nn.GELU, got"),
    "dropout": (dict(drop=nn.Dropout(0.1)), "drop drops with p = 0.1, which needs plain PyTorch"),
    "other dropout": (dict(drop=lambda y: y), "drop is a function or has hooks: kernels do not know what it does"),
    "drop path": (dict(drop_path=lambda y: y), "drop_path is a function: kernels do not know what it does"),
    "norm class": (dict(bn2=nn.InstanceNorm2d(6)), "bn2 is a InstanceNorm2d, not a plain BatchNorm2d"),
    "norm width": (dict(bn3=nn.BatchNorm2d(6)), "bn3 must have 5 channels, got 6"),
    "dtype": (dict(expand=nn.Conv2d(5, 6, 1).half()), "x and the parameters must have one dtype"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    changes, message = REASONS[name]
    with pytest.raises(cmt_fast.BackendError) as error:
        functional.irffn(torch.randn(2, 3, 4, 5), **parts(**changes))
    assert message in str(error.value)


def test_reasons_of_the_call(monkeypatch):
    def message(x: Tensor) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            functional.irffn(x, **parts())
        return str(error.value)

    assert "x holds no image" in message(torch.randn(0, 3, 4, 5))
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(torch.randn(2, 3, 4, 5).double())
    huge = torch.empty(1).expand(1, 1 << 16, 1 << 16, 5)
    assert "the map of one image must have less than 2^31 elements" in message(huge)
    monkeypatch.setattr(train_configs, "MAX_CHANNELS", 4)
    assert "x must have at most 4 channels, got 5" in message(torch.randn(2, 3, 4, 5))
    layer, x = made_layer(2, 3, 4, 5, hidden=6)
    layer.mlp.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(cmt_fast.BackendError, match="expand is a Sequential, not a plain"):
        layer(x)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no shortcut around the convolution": ("1, 9, True, False, PAIRS", "1, 9, False, False, PAIRS"),
    "taps of the gradient not turned": ("1, 9, True, True, PAIRS", "1, 9, True, False, PAIRS"),
    "a border that is not 0": ("tl.where(left & there, (gelu(a, EXACT) - mean) * scale + added, 0.0)", "(gelu(a, EXACT) - mean) * scale + added"),
    "moments before GELU": ("partials, counts, program, True, EXACT", "partials, counts, program, False, EXACT"),
    "moments of every lane": ("_merge_lanes(mean_o, m2_o, inside_o, count)", "_merge_lanes(mean_o, m2_o, inside_e, count)"),
    "columns' means forgotten": ("distance * distance * count", "0.0 * distance"),
    "moments of rows that are not there": ("tile_moments(values, row < rows, count)", "tile_moments(values, row >= 0, count)"),
    "gradient of a dropped branch": ("_branch_gradient(grad, factor, row, rows, pixels, offset, inside)\n    wide", "tl.load(grad + offset, inside, 0.0).to(tl.float32)\n    wide"),
    "BN3's gradient where no row is": ("tile = tl.where(inside, wide, 0.0)", "tile = wide"),
    "BN3's sums without the factor": ("branch = _branch_gradient(grad, factor, row, rows, pixels, offset, inside)\n        plain", "branch = tl.load(grad + offset, inside, 0.0).to(tl.float32)\n        plain"),
    "upper and lower taps exchanged": ("add_products(lower, *above, t_e, t_o)", "add_products(lower, *below, t_e, t_o)"),
    "bias of even columns": ("sum_du += here[1] + here[4]", "sum_du += here[1]"),
    "BN1's sum of even columns": ("sum_dt += dt_e + dt_o", "sum_dt += dt_e"),
    "one strip's sums lost": ("(tile * strips + strip).to(tl.int64) * (12 * R)", "(tile * strips).to(tl.int64) * (12 * R)"),
    "no GELU'": ("return slope * batch_norm_gradient(", "return batch_norm_gradient("),
    "projection's input not normalised": ("((value - mean[None, :]) * rstd[None, :])", "(value)"),
    "norm's bias not in the weight's gradient": ("+ bias[:, None] * shift[None, :]", ""),
    "rows that are not there": ("dh = tl.where((row < rows)[:, None], dh, 0.0)", "dh = dh"),
    "LayerNorm's means lost": ("tl.sum(wide, 1) / C, row < rows", "0.0 * tl.sum(wide, 1), row < rows"),
    "LayerNorm's gradient forgotten": ("normal_rows_gradient(dz, normal, rstd, C)", "dz * rstd[:, None]"),
    "the first columns' product everywhere": ("store_tile(dz + first * C + c,", "store_tile(dz + first * C,"),
    "no gradient passes by": ("out += tl.load(shortcut", "out += 0.0 * tl.load(shortcut"),
    "one process's share of the products": ("part += OUT * IN", "part += 0"),
}  # fmt: skip

#: The case, programs to fill, and how many channels are a whole row of one tile.
PROBES = (
    (case(2, 3, 3, 5, hidden=6, drop_path=Factors()), 2, 256),
    (case(3, 18, 1, 3, hidden=4), 64, 256),
    (case(1, 3, 4, 37, hidden=5), 2, 16),
)


@functools.cache
def expected_of_probe(probe: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return expected_of(PROBES[probe][0], "float32", training=True)


def failures(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    _, kernels = mutate(monkeypatch, tmp_path, [batch_norm, triton_train_kernels], old, new)
    for name in [name for name in vars(triton_train_launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_train_launch, name, getattr(kernels, name))
    for probe, (case_, programs, whole_row) in enumerate(PROBES):
        monkeypatch.setattr(train_configs, "PROGRAMS", programs)
        monkeypatch.setattr(triton_train_launch, "WHOLE_ROW", whole_row)
        forget()
        found = compared(case_, "float32", True, expected_of_probe(probe))
        if wrong := [str(result) for result in found if not result.passed]:
            return wrong
    return []


def test_without_a_mutation(monkeypatch, tmp_path):
    """The calls that find the mutations pass with the kernels as they are."""
    assert failures(monkeypatch, tmp_path, "1, 9, True, True, PAIRS", "1, 9, True, True, PAIRS") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, *MUTATIONS[name])
