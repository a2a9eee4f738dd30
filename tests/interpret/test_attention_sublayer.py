"""The attention sub-layer of a packed model in Triton's interpreter: every form against float64, and that a wrong kernel is found."""

import dataclasses

import pytest
import torch
from mutation import mutate

from cmt_fast import CMT, BackendError, use_backend
from cmt_fast.inference import Padding, pack, run
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON, align_tables
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops.lmhsa import triton_launch
from cmt_fast.testing.inputs import in_double, randomise
from cmt_fast.testing.packed_attention import AttentionCall, attention_call
from cmt_fast.testing.shapes import StageShape
from cmt_fast.testing.tolerance import assert_within, compare

DTYPES = (torch.float32, torch.float16)


def shape(batch=1, height=4, width=5, dim=24, heads=2, sr_ratio=1, qk_ratio=1):
    return StageShape("test", batch, height, width, dim, heads, 0, sr_ratio, qk_ratio)


def check(call: AttentionCall) -> None:
    exact, plain = call.double().run(TORCH), call.run(TORCH)
    with use_backend("triton"):
        actual = call.run(TRITON)
    assert_within("out", actual, exact, plain)
    assert not actual[..., call.step.channels :].any(), "padding must stay 0"
    assert actual.is_contiguous()


@pytest.fixture
def form(monkeypatch):
    """Which kernels ran."""
    ran = []
    launch = triton_launch.Launch.run
    monkeypatch.setattr(triton_launch.Launch, "run", lambda self: (ran.append(self), launch(self))[1])
    return ran


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", range(4), ids="abcd".__getitem__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_of_the_variants(variant, stage, dtype, on):
    """Their channels, heads and number of keys, on a map as small as the keys'."""
    on(multiprocessors=1)
    config, side = VARIANTS[variant].config, VARIANTS[variant].resolution // 32
    dim, heads = config["embed_dims"][stage], config["num_heads"][stage]
    check(attention_call(shape(1, side, side, dim, heads), dtype, absorbed=stage < 2))


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(10):
        heads, height, width = draw(1, 3), draw(1, 9), draw(1, 9)
        random = shape(
            batch=draw(1, 2),
            height=height,
            width=width,
            dim=2 * heads * draw(1, 20),
            heads=heads,
            sr_ratio=draw(1, min(3, height, width)),
            qk_ratio=draw(1, 2),
        )
        on(arch=(80, 90, 120)[draw(0, 2)], multiprocessors=(1, 4, 132)[draw(0, 2)])
        call = attention_call(
            random,
            DTYPES[draw(0, 1)],
            absorbed=bool(draw(0, 1)),
            base2=bool(draw(0, 1)),
            padding=(Padding(), Padding(1, 1, 1), Padding(32, 16, 32))[draw(0, 2)],
            seed=seed,
        )
        check(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
@pytest.mark.parametrize(
    "case",
    [
        shape(batch=2, height=4, width=4, sr_ratio=4),
        shape(height=1, width=19),
        shape(height=19, width=1, heads=1),
        shape(batch=3, height=1, width=1, dim=3, heads=1),
        shape(height=9, width=15, dim=16, heads=2),
    ],
    ids=["one key", "one row", "one column", "one pixel", "many keys"],
)
def test_edges(case, absorbed, dtype, on):
    on(multiprocessors=1)
    for base2 in (True, False):
        check(attention_call(case, dtype, absorbed=absorbed, base2=base2))


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
def test_growing_logits_in_a_stream(absorbed):
    """Each tile of keys has larger logits than all before it, and the last ones count alone."""
    call = attention_call(shape(height=9, width=15, dim=16), torch.float16, absorbed=absorbed)
    ramp = torch.linspace(-300, 300, call.table.shape[-1])
    check(dataclasses.replace(call, table=(call.table + ramp).half()))
    check(dataclasses.replace(call, table=(call.table - ramp).half()))


def test_large_means():
    """LayerNorm subtracts the mean before it squares, chunk by chunk in the split form."""
    for absorbed in (True, False):
        call = attention_call(shape(dim=140, heads=2), torch.float32, absorbed=absorbed)
        check(dataclasses.replace(call, y=call.y.add(300).masked_fill(call.y == 0, 0)))


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
def test_strides(absorbed):
    call = attention_call(shape(batch=2, height=3, width=5), torch.float16, absorbed=absorbed)
    expected = call.run(TRITON)
    other = dataclasses.replace(
        call,
        y=call.y.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        keys_values=call.keys_values.transpose(1, 2).contiguous().transpose(1, 2),
        table=call.table.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    assert torch.equal(other.run(TRITON), expected)
    longer = torch.full((*call.table.shape[:2], 32), float("nan"), dtype=call.table.dtype)
    longer[..., 3:18] = call.table
    assert torch.equal(dataclasses.replace(call, table=longer[..., 3:18]).run(TRITON), expected)
    assert call.run(TRITON).data_ptr() != call.y.data_ptr()


def test_no_image():
    call = attention_call(shape(batch=2), torch.float16, absorbed=True)
    empty = dataclasses.replace(call, y=call.y[:0], keys_values=call.keys_values[:0])
    assert empty.run(TRITON).shape == (0, *call.y.shape[1:])


def test_nothing_else_is_written(on):
    """The output lies inside a larger buffer, and the inputs between NaN."""
    on(multiprocessors=1)
    for absorbed in (True, False):
        call = attention_call(shape(batch=2, height=3, width=7, dim=20), torch.float16, absorbed=absorbed)
        expected, step, numbers = call.run(TRITON), call.step, (call.step.base2, call.step.channels, call.step.eps)
        y, keys_values, table, buffer = (inside_nan(t) for t in (call.y, call.keys_values, call.table, expected))
        out = buffer.zero_()
        if absorbed:
            launch = triton_launch.absorbed_launch(
                y, keys_values, table, step.out_bias, out, *numbers, ARCHITECTURES[90]
            )
        else:
            weights = step.query_weight, step.query_bias, keys_values, table, step.out_weight, step.out_bias
            launch = triton_launch.projected_launch(y, *weights, out, *numbers, ARCHITECTURES[90])
        launch.run()
        assert torch.equal(out, expected)
        assert out._base.isnan().sum() == out._base.numel() - out.numel()


def inside_nan(x):
    """A copy of ``x`` with a row of NaN before and behind it."""
    buffer = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype)
    return buffer[GUARD:-GUARD].view(x.shape).copy_(x)


GUARD = 1024


def test_a_packed_model(on):
    on(multiprocessors=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model()
    packed = align_tables(pack(model, dtype=torch.float16, base2=True))
    assert {stage.table.stride(1) % 16 for stage in packed.stages} == {0}
    images = torch.randn(1, 3, 64, 32)
    exact, plain = in_double(model)(images.half().double()), run(packed, images.half())
    assert_within("scores", run(packed, images.half(), TRITON), exact, plain)


def small_model():
    model = CMT(
        img_size=(64, 32),
        num_classes=5,
        embed_dims=(12, 12, 24, 36),
        stem_channel=5,
        fc_dim=18,
        num_heads=(1, 2, 2, 2),
        depths=(1,) * 4,
        mlp_ratios=(2,) * 4,
        sr_ratios=(4, 2, 2, 1),
    )
    return randomise(model, torch.Generator().manual_seed(3)).eval().half()


# ---- which kernels -------------------------------------------------------------------------------------------------------


def kernels(form) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in form]


def test_forms(form):
    attention_call(shape(dim=64, heads=1), torch.float16, absorbed=True).run(TRITON)
    attention_call(shape(dim=256, heads=4), torch.float16, absorbed=False).run(TRITON)
    assert kernels(form) == ["absorbed_attention", "projected_attention"]
    form.clear()
    attention_call(shape(dim=304, heads=4), torch.float16, absorbed=False).run(TRITON)
    attention_call(shape(dim=64, heads=1), torch.float32, absorbed=False).run(TRITON)
    assert kernels(form) == ["linear", "reduced_kv_attention", "linear"] * 2


def test_tiles_shrink_to_the_device(form, on):
    call = attention_call(shape(height=9, width=8, dim=64, heads=1), torch.float16, absorbed=True)
    for shared_memory in (227 << 10, 30 << 10, 12 << 10):
        on(shared_memory=shared_memory, multiprocessors=1)
        check(call)
    tiles = [(launch.constants["BLOCK_N"], launch.constants["BLOCK_M"]) for launch in form]
    assert tiles[0] > tiles[1] > tiles[2]
    on(shared_memory=1 << 10)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=r"64 channels in torch.float16 .* 1024 bytes .* absorb="),
    ):
        call.run(TRITON)
    assert torch.equal(call.run(TRITON), call.run(TORCH)), "auto takes plain PyTorch"


def test_small_batches_fill_the_device(form, on):
    call = attention_call(shape(height=12, width=12, dim=8, heads=1, sr_ratio=4), torch.float16, absorbed=True)
    for multiprocessors in (1, 8):
        on(multiprocessors=multiprocessors)
        check(call)
    assert [launch.grid[0] for launch in form] == [2, 9]


# ---- as operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
def test_opcheck(absorbed, dtype):
    call = attention_call(shape(batch=2, height=2, width=3, dim=8), dtype, absorbed=absorbed)
    step, numbers = call.step, (call.step.base2, call.step.channels, call.step.eps)
    if absorbed:
        arguments = (call.y, call.keys_values, call.table, step.out_bias)
        op = torch.ops.cmt_fast_triton.absorbed_attention.default
    else:
        weights = step.query_weight, step.query_bias, call.keys_values, call.table, step.out_weight, step.out_bias
        arguments = (call.y, *weights)
        op = torch.ops.cmt_fast_triton.projected_attention.default
    torch.library.opcheck(op, (*arguments, *numbers))
    strided = (call.y.transpose(1, 2), *arguments[1:])
    torch.library.opcheck(op, (*strided, *numbers), test_utils=("test_schema", "test_faketensor"))


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------
MUTATIONS = {
    "wrong scale": ("input_precision=PRECISION) * scale", "input_precision=PRECISION) * (scale * 1.05)"),
    "wrong base": ("1.0 if BASE2 else 1.4426950408889634", "1.0"),
    "keys beyond the last": ('tl.where(key < keys, logits, float("-inf"))', "logits"),
    "no key bias": ("if key_bias is not None:", "if False:"),
    "no table": ("if bias is not None:\n        row", "if False:\n        row"),
    "table of the first head": ("        total += values\n        table += table_head", "        total += values"),
    "not rescaled": ("out * shrink[:, None]", "out"),
    "no shortcut": ("branch += tl.load(x + row * C + c", "0.0 * tl.load(x + row * C + c"),
    "no shortcut, split": ("if shortcut is not None:", "if False:"),
    "no output bias": ("branch += tl.load(bias + c", "0.0 * tl.load(bias + c"),
    "statistics of padding": ("normalise_rows(wide, counted, CHANNELS,", "normalise_rows(wide, counted, C,"),
    "statistics of one chunk": (
        "squares += tl.sum(centred * centred, 1) +",
        "squares = tl.sum(centred * centred, 1) +",
    ),
}


def test_without_a_mutation(monkeypatch, tmp_path, on):
    """The calls that find the mutations pass with the kernels as they are."""
    assert failures(monkeypatch, tmp_path, on, "Args:\n        q: (rows,", "Args:\n        q: (rows,") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    assert failures(monkeypatch, tmp_path, on, *MUTATIONS[name])


def failures(monkeypatch, tmp_path, on, old, new) -> list[str]:
    """Which forms of the sub-layer leave the policy when the kernels' source is changed."""
    from cmt_fast.ops._triton import attend, linear, linear_launch
    from cmt_fast.ops.attention import triton_kernels as attention_kernels
    from cmt_fast.ops.attention import triton_launch as attention_launch
    from cmt_fast.ops.lmhsa import triton_kernels

    modules = [attend, attention_kernels, linear, triton_kernels]
    _, attention_kernels, linear, kernels = mutate(monkeypatch, tmp_path, modules, old, new)
    monkeypatch.setattr(attention_launch, "reduced_kv_attention_kernel", attention_kernels.reduced_kv_attention_kernel)
    monkeypatch.setattr(linear_launch, "linear_kernel", linear.linear_kernel)
    for name in ("absorbed_attention_kernel", "projected_attention_kernel"):
        monkeypatch.setattr(triton_launch, name, getattr(kernels, name))
    on(multiprocessors=1)
    wrong = []
    for height, dtype, absorbed in (
        (5, torch.float16, True),
        (5, torch.float16, False),
        (5, torch.float32, False),
        (20, torch.float16, True),
    ):
        call = attention_call(
            shape(batch=2, height=height, dim=140), dtype, absorbed=absorbed, base2=height == 5 and not absorbed
        )
        result = compare("out", call.run(TRITON), call.double().run(TORCH), call.run(TORCH))
        if not result.passed:
            wrong.append(str(result))
    return wrong
