"""The Triton kernels of the head in the interpreter: against float64, as operators, and when they are chosen."""

import dataclasses

import pytest
import torch
from layers import draw
from mutation import mutate

import cmt_fast
from cmt_fast.inference.program import Padding
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton import tiles
from cmt_fast.ops.head import triton_kernels, triton_launch
from cmt_fast.ops.head.schema import head_features_triton, head_linear_triton
from cmt_fast.testing.packed_head import HeadCall, head_call
from cmt_fast.testing.tolerance import Comparison, compare

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def compared(call: HeadCall) -> Comparison:
    return compare("result", call.run(TRITON), call.double().run(TORCH), call.run(TORCH))


def check(call: HeadCall) -> None:
    result = compared(call)
    assert result.passed, str(result)


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype, on):
    on(multiprocessors=1)
    check(head_call((3, 7, 7, VARIANTS[variant].config["embed_dims"][-1]), dtype, features=150, classes=20))


FORMS = {
    "classes": dict(),
    "features": dict(classes=None),
    "hidden layer": dict(hidden=21),
    "hidden layer without classes": dict(hidden=21, classes=None),
    "map of features": dict(classes=None, pool=False),
    "map of classes": dict(pool=False),
    "map of a hidden layer": dict(hidden=21, classes=None, pool=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype):
    call = head_call((2, 3, 4, 20), dtype, **{"features": 37, "classes": 10, **FORMS[form]})
    check(call)
    assert call.run(TRITON).stride() == (call.run(TORCH) + 0).stride()


@pytest.mark.parametrize("part", range(4))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(8):
        on(multiprocessors=(1, 4)[draw(generator, 0, 1)])
        shape = (draw(generator, 1, 5), draw(generator, 1, 12), draw(generator, 1, 12), draw(generator, 1, 80))
        widths = dict(features=draw(generator, 1, 140), classes=(None, 1, 10)[draw(generator, 0, 2)])
        call = dict(pool=bool(draw(generator, 0, 2)), padding=Padding(channels=(1, 8)[draw(generator, 0, 1)]))
        check(head_call(shape, DTYPES[draw(generator, 0, 1)], seed=seed, **widths, **call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8), (9, 1, 2, 8), (2, 1, 65, 8), (2, 130, 1, 8)], ids=["one pixel", "many images", "one row", "one column"]
)  # fmt: skip
def test_edges(shape, dtype, on):
    for multiprocessors in (1, 132):
        on(multiprocessors=multiprocessors)
        check(head_call(shape, dtype, features=20, classes=3))


def test_no_image():
    assert head_call((0, 2, 3, 8), torch.float32, features=20, classes=3).run(TRITON).shape == (0, 3)
    assert head_call((0, 2, 3, 8), torch.float32, features=20, classes=None, pool=False).run(TRITON).shape == (0, 20, 2, 3)  # fmt: skip


def test_strides():
    call = head_call((2, 4, 6, 10), torch.float16, features=20, classes=3)
    strided = dataclasses.replace(call, x=call.x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))
    assert torch.equal(strided.run(TRITON), call.run(TRITON))


def test_images_of_a_batch_do_not_mix(on):
    call = head_call((5, 7, 7, 40), torch.float16, features=70, classes=9)
    on(multiprocessors=1)
    expected = call.run(TRITON)
    alone = [dataclasses.replace(call, x=call.x[i : i + 1]).run(TRITON) for i in range(5)]
    assert torch.equal(torch.cat(alone), expected)


def test_not_a_number_reaches_its_own_image_only():
    call = head_call((3, 5, 5, 20), torch.float32, features=20, classes=3)
    call.x[1, 2, 3, 4] = float("nan")
    assert call.run(TRITON).isnan().all(-1).tolist() == [False, True, False]
    assert call.run(TRITON).isnan().any(-1).tolist() == [False, True, False]


# ---- as operators, and when they are chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = head_call((2, 2, 3, 5), dtype, features=6, classes=3)
    step = call.step
    pool = dtype == torch.float32
    torch.library.opcheck(head_features_triton, (call.x.transpose(1, 2), step.weight, step.bias, pool))
    x = torch.randn(2, 8) if pool else torch.randn(8, 2, 2).permute(1, 2, 0)
    torch.library.opcheck(head_linear_triton, (x.to(dtype), step.class_weight, step.class_bias))


def test_auto_takes_them():
    cmt_fast.set_backend("auto")
    call = head_call((1, 2, 3, 5), torch.float32, features=6, classes=3)
    assert ("packed head", "triton") in cmt_fast.explain(call.run, TRITON).calls


@pytest.mark.parametrize("form", ["hidden layer", "map of features"])
def test_compiles_into_one_graph(form):
    call = head_call((1, 2, 3, 5), torch.float32, **{"features": 6, "classes": 3, **FORMS[form]})
    step = torch.compile(lambda x: HeadCall(call.step, x).run(TRITON), fullgraph=True, backend="eager")
    assert torch.equal(step(call.x), call.run(TRITON))


def test_reasons(monkeypatch):
    def message(call: HeadCall) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.run(TRITON)
        return str(error.value)

    call = head_call((1, 2, 3, 5), torch.float16, features=6, classes=3)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "biases must be float32" in message(call.double())
    mixed = dataclasses.replace(call.step, class_weight=call.step.class_weight.float())
    assert "the weights must have the dtype of the map, torch.float16" in message(HeadCall(mixed, call.x))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in message(call)
    call.step.class_bias.requires_grad_()
    assert "gradients are needed, and this version's Triton kernels are for inference only" in message(call)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no bias": ("total += biases", "total += 0.0"),
    "no swish": ("total *= 1.0 / (1.0 + tl.exp2(total * -1.4426950408889634))", "total *= 1.0"),
    "exponents of 2": ("total * -1.4426950408889634", "-total"),
    "pixels beyond the last one": ("tl.where(inside, total, 0.0)", "total"),
    "the sum": ("mean = sums / pixels", "mean = sums"),
    "mean over the tile": ("mean = sums / pixels", "mean = sums / BLOCK_N"),
    "the first tile of pixels again": ("pixel = start + place % BLOCK_N", "pixel = place % BLOCK_N"),
    "the first image again": ("image = first + place // BLOCK_N", "image = first"),
    "the first channels again": ("c = channel + tl.arange(0, BLOCK_C)[None, :]", "c = tl.arange(0, BLOCK_C)[None, :]"),
    "the first features again": ("weight + column * C, C, 0, F - column", "weight, C, 0, F"),
}


def failures(monkeypatch, tmp_path, on, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernel's source is changed."""
    _, kernels = mutate(monkeypatch, tmp_path, [tiles, triton_kernels], old, new)
    monkeypatch.setattr(triton_launch, "features_kernel", kernels.features_kernel)
    on(multiprocessors=1)
    calls = [
        head_call((2, 5, 5, 100), torch.float16, features=140, classes=None),
        head_call((2, 9, 8, 12), torch.float16, features=20, classes=None),
        head_call((2, 5, 5, 12), torch.float16, features=20, classes=None, pool=False),
    ]
    results = [compared(call) for call in calls]
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path, on):
    """The calls that find the mutations pass with the kernel as it is."""
    assert failures(monkeypatch, tmp_path, on, "total += biases", "total += biases") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    assert failures(monkeypatch, tmp_path, on, *MUTATIONS[name])
