"""The Triton kernels of the stem in the interpreter: against float64, as operators, and when they are chosen."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from layers import draw
from mutation import mutate

import cmt_fast
from cmt_fast.inference.program import Padding
from cmt_fast.inference.torch_steps import TORCH, StepFunctions
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton import norm, tiles
from cmt_fast.ops.stem import triton_kernels, triton_launch
from cmt_fast.ops.stem.schema import stem_embed_triton, stem_triton
from cmt_fast.testing.packed_stem import StemCall, StemEmbedCall, stem_call, stem_embed_call
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def large_tiles(on):
    """Those of one multiprocessor, unless a test asks for others."""
    on(multiprocessors=1)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernel cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def compared(call: StemCall, width: int) -> list[Comparison]:
    map_ = call.run(TRITON)
    assert map_.is_contiguous()
    padding = map_[..., width:]
    zero = torch.zeros_like(padding)
    return [compare("padding", padding, zero, zero), compare("map", map_, call.double().run(TORCH), call.run(TORCH))]


def check(call: StemCall, width: int) -> None:
    for result in compared(call, width):
        assert result.passed, str(result)


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype):
    width = VARIANTS[variant].config["stem_channel"]
    check(stem_call((1, 3, 9, 22), width, dtype), width)


@pytest.mark.parametrize("part", range(4))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(5):
        on(multiprocessors=(1, 2)[draw(generator, 0, 1)])
        shape = (draw(generator, 1, 2), draw(generator, 1, 5), draw(generator, 1, 18), draw(generator, 1, 18))
        width = (1, 5, 8, 13, 20)[draw(generator, 0, 4)]
        padding = Padding(channels=(1, 8)[draw(generator, 0, 1)])
        check(stem_call(shape, width, DTYPES[draw(generator, 0, 1)], padding=padding, seed=seed), width)


@pytest.fixture
def fused_in_float32():
    """Exact products are not fused; the interpreter makes no others, whatever it is told."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def compared_tokens(call: StemEmbedCall) -> list[Comparison]:
    tokens, channels = call.run(TRITON), call.embed.channels
    assert tokens.is_contiguous()
    padding = tokens[..., channels:]
    zero = torch.zeros_like(padding)
    return [
        compare("padding", padding, zero, zero),
        compare("tokens", tokens, call.double().run(TORCH), call.run(TORCH)),
    ]


def check_tokens(call: StemEmbedCall) -> None:
    for result in compared_tokens(call):
        assert result.passed, str(result)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_with_the_patch_embedding(variant):
    shape = stage_shapes(variant)[0]
    check_tokens(stem_embed_call((1, 3, 10, 14), shape.in_dim, shape.dim, torch.float16))


@pytest.mark.parametrize("part", range(2))
def test_random_shapes_with_the_patch_embedding(part, on, fused_in_float32):
    generator = torch.Generator().manual_seed(part)
    for seed in range(4):
        on(multiprocessors=(1, 2)[draw(generator, 0, 1)])
        shape = (draw(generator, 1, 2), draw(generator, 1, 4), draw(generator, 3, 18), draw(generator, 3, 18))
        widths = (1, 5, 8, 13)[draw(generator, 0, 3)], draw(generator, 1, 40)
        padding = Padding(channels=(1, 8)[draw(generator, 0, 1)])
        check_tokens(stem_embed_call(shape, *widths, DTYPES[draw(generator, 0, 1)], padding=padding, seed=seed))


def test_wide_tokens_and_exact_products_take_two_kernels():
    for call in (
        stem_embed_call((1, 3, 6, 5), 8, 1030, torch.float16),
        stem_embed_call((1, 3, 6, 5), 8, 12, torch.float32),
    ):
        check_tokens(call)
        two_steps = StepFunctions(stem=TRITON.stem, patch_embed=TRITON.patch_embed)
        assert torch.equal(call.run(TRITON), call.run(two_steps))


def test_no_token():
    for shape, tokens in (((0, 3, 8, 6), (0, 2, 1)), ((2, 3, 2, 9), (2, 0, 2))):
        assert stem_embed_call(shape, 8, 12, torch.float16).run(TRITON).shape == (*tokens, 16)


def test_many_channels():
    check(stem_call((1, 40, 4, 6), 5, torch.float16), 5)
    check(stem_call((1, 3, 4, 6), 70, torch.float16), 70)


def test_no_image():
    assert stem_call((0, 3, 8, 6), 13, torch.float32).run(TRITON).shape == (0, 4, 3, 16)


def test_strides():
    """Every layout of the image gives the same bits, as does a batch whose images are one."""
    call = stem_call((2, 3, 9, 12), 5, torch.float16)
    expected = call.run(TRITON)
    wide = torch.zeros(2, 4, 11, 20, dtype=torch.float16)
    wide[:, 1:, 1:-1, 3:-5] = call.x
    flipped = call.x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for x in (call.x.contiguous(memory_format=torch.channels_last), wide[:, 1:, 1:-1, 3:-5], flipped):
        assert torch.equal(x, call.x) and torch.equal(dataclasses.replace(call, x=x).run(TRITON), expected)
    repeated = dataclasses.replace(call, x=call.x[:1].expand(2, -1, -1, -1)).run(TRITON)
    assert torch.equal(repeated, expected[:1].expand_as(repeated))


def test_an_image_of_another_dtype_is_rounded_first():
    call = stem_call((1, 3, 8, 9), 5, torch.float16)
    wide = dataclasses.replace(call, x=call.x.float() * 1.0001)
    rounded = dataclasses.replace(call, x=wide.x.half())
    assert torch.equal(wide.run(TRITON), rounded.run(TRITON))


def test_size_of_a_tile_changes_no_bit(on):
    call = stem_call((1, 3, 14, 14), 8, torch.float16)
    expected = call.run(TRITON)
    on(multiprocessors=4)
    assert torch.equal(call.run(TRITON), expected)


def test_not_a_number_reaches_its_neighbours_only():
    call = stem_call((2, 3, 16, 20), 8, torch.float32)
    call.x[0, 1, 8, 10] = float("nan")
    touched = torch.zeros(2, 8, 10, dtype=torch.bool)
    touched[0, 2:7, 3:8] = True  # one pixel after the first convolution, one more around it after each of the others
    assert torch.equal(call.run(TRITON).isnan().any(-1), touched)


# ---- as an operator, and when it is chosen -------------------------------------------------------------------------------


def test_opcheck():
    call = stem_call((1, 2, 3, 4), 3, torch.float16)
    torch.library.opcheck(stem_triton, (call.x.transpose(2, 3), *vars(call.step).values()))
    call = stem_call((1, 2, 3, 4), 3, torch.float32)
    torch.library.opcheck(stem_triton, (call.x.to(memory_format=torch.channels_last), *vars(call.step).values()))


def test_opcheck_with_the_patch_embedding():
    call = stem_embed_call((1, 2, 3, 4), 3, 5, torch.float16)
    step, embed = call.step, call.embed
    embedding = (embed.weight, embed.bias, embed.scale, embed.shift, embed.channels, embed.eps)
    torch.library.opcheck(stem_embed_triton, (call.x, *vars(step).values(), *embedding))


def test_auto_takes_it():
    cmt_fast.set_backend("auto")
    call = stem_call((1, 3, 4, 6), 8, torch.float32)
    assert ("packed stem", "triton") in cmt_fast.explain(call.run, TRITON).calls
    call = stem_embed_call((1, 3, 4, 6), 8, 12, torch.float16)
    assert ("packed stem_embed", "triton") in cmt_fast.explain(call.run, TRITON).calls


def test_compiles_into_one_graph():
    call = stem_call((1, 3, 4, 6), 8, torch.float32)
    step = torch.compile(lambda x: StemCall(call.step, x).run(TRITON), fullgraph=True, backend="eager")
    assert torch.equal(step(call.x), call.run(TRITON))
    call = stem_embed_call((1, 3, 4, 6), 8, 12, torch.float16)
    step = torch.compile(lambda x: dataclasses.replace(call, x=x).run(TRITON), fullgraph=True, backend="eager")
    assert torch.equal(step(call.x), call.run(TRITON))


def test_reasons(monkeypatch):
    def message(call: StemCall | StemEmbedCall) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.run(TRITON)
        return str(error.value)

    call = stem_call((1, 3, 6, 6), 8, torch.float16)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "the image must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "biases and affines must be float32" in message(call.double())
    mixed = dataclasses.replace(call.step, weight2=call.step.weight2.float())
    assert "the weights must have one dtype" in message(StemCall(mixed, call.x))
    assert "image and stem must have at most 128 channels, got 136" in message(stem_call((1, 3, 2, 2), 130, torch.half))
    assert "image and stem must have at most 128 channels, got 200" in message(stem_call((1, 200, 2, 2), 8, torch.half))
    large = StemCall(call.step, torch.empty(1).half().expand(1, 3, 1 << 15, 1 << 16))
    assert "an image and its maps must span less than 2^31 elements, got 4294967296" in message(large)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in message(call)
    wide = stem_embed_call((1, 3, 4, 4), 8, 5000, torch.float16)
    assert "5000 channels in torch.float16 do not fit into 232448 bytes of shared memory" in message(wide)
    call.step.bias2.requires_grad_()
    assert "gradients are needed, and this version's Triton kernels are for inference only" in message(call)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no upper border": ("(h >= 0) & ", ""),
    "no lower border": (" & (h < height) &", " &"),
    "no left border": (" & (w >= 0) &", " &"),
    "no right border": (" & (w < width) &", " &"),
    "rows and columns of a tap exchanged": ("(tap // 3 - 1), column[None, :] + (tap % 3 - 1)", "(tap % 3 - 1), column[None, :] + (tap // 3 - 1)"),
    "no stride across": ("column * STRIDE", "column"),
    "no padding above": ("(tap // 3 - 1)", "(tap // 3)"),
    "one channel": ("term % C * channel_stride", "0 * channel_stride"),
    "no bias": ("gelu(total + tl.load(bias + s, s < S, 0.0), EXACT)", "gelu(total, EXACT)"),
    "no affine": ("if scale is not None:", "if False:"),
    "no shift": (" + tl.load(shift + s, s < S, 0.0)", ""),
    "every tile the first of its row": ("tile % tiles_across * BLOCK_W", "0"),
    "every image the first": ("x + image * image_stride", "x + 0 * image"),
    "a column too few": ("down, across = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)", "down, across = tl.cdiv(height, STRIDE), width // STRIDE"),
}  # fmt: skip
EMBED_MUTATIONS = {
    "embedding of the first image": ("x + image * (height * width * S)", "x + 0 * image"),
    "the left pixels of a patch twice": ("column * 2 + pixel % 2", "column * 2"),
    "the upper pixels of a patch twice": ("row * 2 + pixel // 2", "row * 2"),
    "a quarter of the embedding for all": ("embed_weight + pixel * S", "embed_weight"),
    "no bias before the embedding": ("gelu(map_ + tl.load(bias + s, s < S, 0.0), EXACT)", "gelu(map_, EXACT)"),
    "no GELU before the embedding": ("gelu(map_ + tl.load(bias + s, s < S, 0.0), EXACT)", "(map_ + tl.load(bias + s, s < S, 0.0))"),
    "no bias of the embedding": ("total += tl.load(embed_bias + c, c < C, 0.0)", "total += 0.0"),
    "statistics of padding": ("c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C", "c < C, C, eps, C < BLOCK_C"),
    "no scale of the embedding": ("normal * tl.load(scale + c, c < C, 0.0)", "normal"),
}  # fmt: skip


@pytest.fixture
def guards(monkeypatch):
    """NaN around every map: a wrong kernel may read, and write, some rows beyond."""

    def guarded(*size, dtype, device):
        numel, guard = math.prod(size), 1 << 13
        return torch.full((numel + 2 * guard,), float("nan"), dtype=dtype)[guard : guard + numel].view(size)

    monkeypatch.setattr(triton_launch.torch, "empty", guarded)
    monkeypatch.setattr(triton_launch.torch, "empty_like", lambda x: guarded(*x.shape, dtype=x.dtype, device=x.device))


def failures(monkeypatch, tmp_path, run: Callable[[], list[Comparison]], old: str, new: str) -> list[str]:
    """What leaves the policy when the kernels' source is changed."""
    *_, kernels = mutate(monkeypatch, tmp_path, [norm, tiles, triton_kernels], old, new)
    for name in ("conv3x3_kernel", "conv3x3_embed_kernel"):
        monkeypatch.setattr(triton_launch, name, getattr(kernels, name))
    return [str(result) for result in run() if not result.passed]


def convolutions() -> list[Comparison]:
    call = stem_call((2, 3, 5, 37), 5, torch.float16)
    return compared(dataclasses.replace(call, x=torch.empty_like(call.x).copy_(call.x)), 5)


def embedding() -> list[Comparison]:
    call = stem_embed_call((2, 1, 10, 14), 5, 6, torch.float16)
    return compared_tokens(dataclasses.replace(call, x=torch.empty_like(call.x).copy_(call.x)))


@pytest.mark.parametrize("run", [convolutions, embedding])
def test_without_a_mutation(run, monkeypatch, tmp_path, guards):
    """The calls that find the mutations pass with the kernels as they are."""
    same = "if scale is not None:"
    assert failures(monkeypatch, tmp_path, run, same, same) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, guards):
    assert failures(monkeypatch, tmp_path, convolutions, *MUTATIONS[name])


@pytest.mark.parametrize("name", EMBED_MUTATIONS)
def test_mutation_of_the_embedding(name, monkeypatch, tmp_path, guards):
    assert failures(monkeypatch, tmp_path, embedding, *EMBED_MUTATIONS[name])
