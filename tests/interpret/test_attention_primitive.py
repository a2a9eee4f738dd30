"""The Triton kernel of ``reduced_kv_attention`` in the interpreter: against float64, as an operator, and when it is chosen."""

import pytest
import torch
from mutation import mutate
from torch import Tensor

import cmt_fast
from cmt_fast.functional import reduced_kv_attention
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.attention import triton_launch
from cmt_fast.ops.attention.reference import reduced_kv_attention_reference
from cmt_fast.testing.inputs import op_cases
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import QUICK_SHAPES
from cmt_fast.testing.tolerance import Comparison, compare
from cmt_fast.testing.verification import verify_case

DTYPES = (torch.float32, torch.float16)


def make(batch, heads, queries, keys, qk_dim, v_dim, dtype, *, bias=True, seed=0) -> list[Tensor | None]:
    """q, k, v and bias as the layers make them: (B, N, h, d) transposed, k and v parts of one tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    q = normal(batch, queries, heads, qk_dim).transpose(1, 2)
    kv = normal(batch, keys, heads * (qk_dim + v_dim))
    k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in kv.split([heads * qk_dim, heads * v_dim], -1))
    return [q, k, v, normal(heads, queries, keys) if bias else None]


def compared(inputs: list[Tensor | None], scale: float | None = None) -> Comparison:
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    double = [None if t is None else t.double() for t in inputs]
    return compare(
        "out",
        reduced_kv_attention(*inputs, scale=scale, backend="triton"),
        reduced_kv_attention_reference(*double, factor),
        reduced_kv_attention_reference(*inputs, factor),
    )


def check(inputs: list[Tensor | None], scale: float | None = None) -> None:
    result = compared(inputs, scale)
    assert result.passed, str(result)


# ---- against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_of_the_variants(variant, dtype, on):
    on(multiprocessors=1)
    config, side = VARIANTS[variant].config, VARIANTS[variant].resolution // 32
    check(make(1, 2, 60, side * side, config["embed_dims"][0], config["embed_dims"][0], dtype))


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(10):
        on(arch=(80, 90, 120)[draw(0, 2)], multiprocessors=(1, 4, 132)[draw(0, 2)])
        sizes = draw(1, 2), draw(1, 3), draw(1, 50), draw(1, (20, 100)[draw(0, 1)]), draw(1, 80), draw(1, 128)
        check(make(*sizes, DTYPES[draw(0, 1)], bias=bool(draw(0, 3)), seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 20, 1, 8, 8), (2, 2, 1, 7, 8, 8), (1, 1, 1, 1, 1, 1), (1, 2, 40, 150, 46, 52), (1, 1, 5, 9, 256, 200)],
    ids=["one key", "one query", "one of all", "many keys", "wide heads"],
)
def test_edges(sizes, dtype, on):
    on(multiprocessors=1)
    check(make(*sizes, dtype))
    check(make(*sizes, dtype, bias=False), scale=0.3)


def test_strides():
    inputs = make(2, 2, 9, 7, 5, 6, torch.float16)
    expected = reduced_kv_attention(*inputs, backend="triton")
    reversed_ = [t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))) for t in inputs]
    assert torch.equal(reduced_kv_attention(*reversed_, backend="triton"), expected)
    shared = [inputs[0][:1].expand(2, -1, -1, -1), inputs[1][:, :1].expand(-1, 2, -1, -1), *inputs[2:]]
    check(shared)
    assert expected.transpose(1, 2).is_contiguous(), "the output projection takes it without a copy"
    assert reduced_kv_attention(*(t[:0] for t in inputs[:3]), inputs[3], backend="triton").shape == (0, 2, 9, 6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is meant to happen
def test_bias_of_minus_infinity(on):
    """Keys left out by the bias, a whole first tile of them in a stream."""
    on(multiprocessors=1)
    q, k, v, bias = make(1, 1, 8, 150, 8, 8, torch.float32)
    bias[..., :100] = float("-inf")
    check([q, k, v, bias])
    bias[:, 3] = float("-inf")  # nothing is left
    out = reduced_kv_attention(q, k, v, bias, backend="triton")
    assert out[:, :, 3].isnan().all() and not out[:, :, :3].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is meant to happen
def test_not_a_number_reaches_its_row_only():
    q, k, v, bias = make(1, 2, 20, 7, 8, 8, torch.float32)
    q[0, 1, 5, 2] = float("nan")
    out = reduced_kv_attention(q, k, v, bias, backend="triton")
    assert out[0, 1, 5].isnan().all() and out.isnan().sum() == 8


def test_narrow_bias():
    q, k, v, bias = make(2, 1, 9, 7, 8, 8, torch.float32)
    check([q, k, v, bias.half()])


# ---- as an operator, and when it is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    op = torch.ops.cmt_fast_triton.reduced_kv_attention.default
    for base2, bias in ((False, True), (True, False)):
        torch.library.opcheck(op, (*make(2, 2, 3, 4, 5, 6, dtype, bias=bias), 0.5, base2))


def test_auto_takes_it():
    q, k, v, bias = make(1, 1, 3, 4, 5, 6, torch.float32)
    assert ("reduced_kv_attention", "triton") in cmt_fast.explain(reduced_kv_attention, q, k, v, bias).calls


def test_reasons():
    q, k, v, bias = make(1, 1, 3, 4, 5, 6, torch.float32)

    def message(q=q, k=k, v=v, bias=bias, **options) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            reduced_kv_attention(q, k, v, bias, backend="triton", **options)
        return str(error.value)

    assert "dropout of attention weights needs plain PyTorch" in message(dropout_p=0.1)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(
        q.double(), k.double(), v.double()
    )
    assert "head dims must be 1 to 256, got 5 of q and k, 300 of v" in message(v=v[..., :1].expand(-1, -1, -1, 300))
    with torch.autocast("cpu", torch.bfloat16):
        assert "q, k and v must have one dtype, got torch.bfloat16, torch.bfloat16, torch.float64" in message(
            v=v.double()
        )


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "wrong scale": ("input_precision=PRECISION) * scale", "input_precision=PRECISION)"),
    "keys beyond the last": ('tl.where(key < keys, logits, float("-inf"))', "logits"),
    "no bias": ("if bias is not None:\n        row", "if False:\n        row"),
    "bias of the first head": ("bias += head * bias_head +", "bias +="),
    "not rescaled": ("out * shrink[:, None]", "out"),
    "sum not rescaled": ("total * shrink", "total"),
    "keys of the first image": ("k + image * k_image", "k"),
}


def wrong_shapes(monkeypatch, tmp_path, on, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernel's source is changed."""
    from cmt_fast.ops._triton import attend
    from cmt_fast.ops.attention import triton_kernels

    _, kernels = mutate(monkeypatch, tmp_path, [attend, triton_kernels], old, new)
    monkeypatch.setattr(triton_launch, "reduced_kv_attention_kernel", kernels.reduced_kv_attention_kernel)
    on(multiprocessors=1)
    results = [compared(make(2, 2, 20, keys, 9, 12, torch.float16)) for keys in (13, 100)]
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path, on):
    assert wrong_shapes(monkeypatch, tmp_path, on, "out += ((image", "out += ((image") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    assert wrong_shapes(monkeypatch, tmp_path, on, *MUTATIONS[name])


# ---- verified ------------------------------------------------------------------------------------------------------------


def test_verification_compares_the_output_and_every_gradient():
    (case,) = (c for c in op_cases([QUICK_SHAPES[0]]) if c.op == "reduced_kv_attention" and not c.strided)
    checks = verify_case(case, precision("float16"), ["triton"], torch.device("cpu"), training=True)
    assert all(check.passed and check.backend == "triton" for check in checks)
    assert [check.quantity for check in checks] == ["output", "grad q", "grad k", "grad v", "grad bias"]
