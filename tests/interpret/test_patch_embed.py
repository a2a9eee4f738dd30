"""The Triton kernel of the patch embedding in the interpreter: against float64, as an operator, and when it is chosen."""

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
from cmt_fast.ops._triton import norm, tiles
from cmt_fast.ops.patch_embed import triton_kernels, triton_launch
from cmt_fast.ops.patch_embed.schema import patch_embed_triton
from cmt_fast.testing.packed_patch_embed import PatchEmbedCall, patch_embed_call
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernel cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def compared(call: PatchEmbedCall) -> list[Comparison]:
    tokens = call.run(TRITON)
    assert tokens.is_contiguous()
    padding = tokens[..., call.step.channels :]
    zero = torch.zeros_like(padding)
    return [
        compare("padding", padding, zero, zero),
        compare("tokens", tokens, call.double().run(TORCH), call.run(TORCH)),
    ]


def check(call: PatchEmbedCall) -> None:
    for result in compared(call):
        assert result.passed, str(result)


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype):
    for shape in stage_shapes(variant):
        check(patch_embed_call((2, 4, 6, shape.in_dim), shape.dim, dtype))


@pytest.mark.parametrize("part", range(4))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(12):
        on(multiprocessors=(1, 132)[draw(generator, 0, 1)])
        shape = (draw(generator, 1, 3), draw(generator, 2, 9), draw(generator, 2, 9), draw(generator, 1, 40))
        padding = Padding(channels=(1, 8)[draw(generator, 0, 1)])
        dim = draw(generator, 1, (16, 150)[draw(generator, 0, 1)])
        check(patch_embed_call(shape, dim, DTYPES[draw(generator, 0, 1)], padding=padding, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 8), (3, 2, 11, 8), (3, 11, 2, 8), (20, 3, 3, 8)], ids=["one token", "one row", "one column", "many images"]
)  # fmt: skip
def test_edges(shape, dtype, on):
    check(patch_embed_call(shape, 12, dtype))
    on(multiprocessors=1)
    check(patch_embed_call(shape, 12, dtype))


def test_no_token():
    for shape, tokens in (((0, 4, 6, 8), (0, 2, 3)), ((2, 1, 6, 8), (2, 0, 3))):
        assert patch_embed_call(shape, 12, torch.float32).run(TRITON).shape == (*tokens, 16)


def test_little_shared_memory(on):
    on(shared_memory=16 << 10)
    check(patch_embed_call((2, 4, 6, 32), 100, torch.float16))


def test_strides():
    call = patch_embed_call((2, 4, 6, 10), 12, torch.float16)
    strided = dataclasses.replace(call, x=call.x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))
    assert torch.equal(strided.run(TRITON), call.run(TRITON))


def test_an_odd_last_row_or_column_is_not_read():
    call = patch_embed_call((2, 5, 7, 8), 12, torch.float32)
    expected = call.run(TRITON)
    call.x[:, 4] = call.x[:, :, 6] = float("nan")
    assert torch.equal(call.run(TRITON), expected)


def test_not_a_number_reaches_its_own_token_only():
    call = patch_embed_call((2, 4, 6, 8), 12, torch.float32)
    call.x[0, 3, 2, 5] = float("nan")
    touched = torch.zeros(2, 2, 3, dtype=torch.bool)
    touched[0, 1, 1] = True
    assert torch.equal(call.run(TRITON)[..., :12].isnan(), touched[..., None].expand(-1, -1, -1, 12))


# ---- as an operator, and when it is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = patch_embed_call((1, 2, 4, 3), 5, dtype)
    step = call.step
    x = call.x if dtype == torch.float32 else call.x.transpose(1, 2)
    parameters = (step.weight, step.bias, step.scale, step.shift, step.channels, step.eps)
    torch.library.opcheck(patch_embed_triton, (x, *parameters))


def test_auto_takes_it():
    cmt_fast.set_backend("auto")
    call = patch_embed_call((1, 2, 4, 3), 5, torch.float32)
    assert ("packed patch_embed", "triton") in cmt_fast.explain(call.run, TRITON).calls


def test_compiles_into_one_graph():
    call = patch_embed_call((1, 2, 4, 3), 5, torch.float32)
    step = torch.compile(lambda x: PatchEmbedCall(call.step, x).run(TRITON), fullgraph=True, backend="eager")
    assert torch.equal(step(call.x), call.run(TRITON))


def test_reasons(monkeypatch, on):
    def message(call: PatchEmbedCall) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.run(TRITON)
        return str(error.value)

    call = patch_embed_call((1, 2, 4, 3), 5, torch.float16)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "bias, scale and shift must be float32" in message(call.double())
    other = PatchEmbedCall(call.step, call.x.float())
    assert "the weight must have the dtype of the map, torch.float32" in message(other)
    large = PatchEmbedCall(call.step, torch.empty(1).half().expand(1, 1 << 16, 1 << 17, 8))
    assert "there must be less than 2^31 tokens, got 2147483648" in message(large)
    wide = patch_embed_call((1, 2, 2, 4), 5000, torch.float16)
    assert "5000 channels in torch.float16 do not fit into 232448 bytes of shared memory" in message(wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in message(call)
    call.step.bias.requires_grad_()
    assert "gradients are needed, and this version's Triton kernels are for inference only" in message(call)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no bias": ("total += tl.load(bias + c, c < C, 0.0)", "total += 0.0"),
    "no scale": ("normal * tl.load(scale + c, c < C, 0.0)", "normal"),
    "no shift": (" + tl.load(shift + c, c < C, 0.0)", ""),
    "the upper row of a patch twice": ("k // (2 * C_IN) * (width * C_IN) + ", ""),
    "the left pixel of a patch twice": ("k % (2 * C_IN)", "k % C_IN"),
    "half of the inputs": ("(token < tokens) & (k < 4 * C_IN)", "(token < tokens) & (k < 2 * C_IN)"),
    "an odd row moves the next image": ("row // down * height +", "row // down * (2 * down) +"),
    "an odd column moves the next row": ("(width * C_IN) + token % across", "(2 * across * C_IN) + token % across"),
    "statistics of padding": ("c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C", "c < C, C, eps, C < BLOCK_C"),
    "padding in the variance": ("CHANNELS, eps, CHANNELS < BLOCK_C)", "CHANNELS, eps, False)"),
    "mean not subtracted": ("centred = x - (tl.sum(x, 1) / channels)[:, None]", "centred = x"),
}


def failures(monkeypatch, tmp_path, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernel's source is changed."""
    *_, kernels = mutate(monkeypatch, tmp_path, [norm, tiles, triton_kernels], old, new)
    monkeypatch.setattr(triton_launch, "patch_embed_kernel", kernels.patch_embed_kernel)
    results = compared(patch_embed_call((2, 5, 7, 12), 20, torch.float16))
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path):
    """The call that finds the mutations passes with the kernel as it is."""
    same = "total += tl.load(bias + c, c < C, 0.0)"
    assert failures(monkeypatch, tmp_path, same, same) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path):
    assert failures(monkeypatch, tmp_path, *MUTATIONS[name])
