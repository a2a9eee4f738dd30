"""Cases cover the shapes that matter, and differ from their float64 copies in arithmetic alone."""

import pytest
import torch

from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import all_cases, in_double
from cmt_fast.testing.precision import PRECISIONS, precision
from cmt_fast.testing.shapes import ODD_SHAPES, stage_shapes


@pytest.mark.parametrize("name", VARIANTS)
def test_stage_shapes_of_the_variants(name):
    shapes = stage_shapes(name, batch=2)
    config, side = VARIANTS[name].config, VARIANTS[name].resolution
    assert [s.dim for s in shapes] == list(config["embed_dims"])
    assert [s.height for s in shapes] == [side // 4, side // 8, side // 16, side // 32]
    assert [s.keys for s in shapes] == [(side // 32) ** 2] * 4
    assert all(s.batch == 2 for s in shapes)


def test_published_sizes_of_cmt_s():
    a, *_, d = stage_shapes("cmt_s")
    assert (a.queries, a.keys, a.hidden, a.v_head_dim) == (3136, 49, 256, 64)
    assert (d.queries, d.keys, d.hidden, d.heads) == (49, 49, 2048, 8)


def test_the_troubles_are_among_the_odd_shapes():
    assert {46, 52, 76} <= {s.v_head_dim for s in ODD_SHAPES}
    assert {165, 331} <= {s.hidden for s in ODD_SHAPES}
    assert any(s.height != s.width for s in ODD_SHAPES)
    assert any(s.keys == 1 and s.queries > 1 for s in ODD_SHAPES)
    assert any(s.batch == 1 for s in ODD_SHAPES)
    assert any(s.qk_head_dim != s.v_head_dim for s in ODD_SHAPES)
    assert any(s.height % s.sr_ratio for s in ODD_SHAPES), "a map that the reduction does not divide"


@pytest.mark.parametrize("name", PRECISIONS)
def test_only_arithmetic_differs_from_the_exact_run(name):
    p = precision(name)
    for case in all_cases(quick=True):
        module, inputs = case.instance(p)
        for tensor in (*inputs.values(), *module.parameters()):
            assert tensor.dtype is p.dtype
            assert torch.equal(tensor, tensor.to(p.low).to(p.dtype)), "rounded to the low dtype beforehand"
        exact = in_double(module)
        for a, b in zip(module.parameters(), exact.parameters()):
            assert torch.equal(a.double(), b)


def test_a_seed_gives_the_same_case_and_another_seed_another():
    case = all_cases(quick=True)[0]
    p = precision("float32")
    (a, x), (b, y), (c, z) = case.instance(p), case.instance(p), case.instance(p, seed=1)
    assert torch.equal(x["x"], y["x"]) and torch.equal(a.conv.weight, b.conv.weight)
    assert not torch.equal(x["x"], z["x"]) and not torch.equal(a.conv.weight, c.conv.weight)


def test_strided_cases_are_strided():
    strided = [case for case in all_cases() if case.strided]
    assert strided
    for case in strided:
        _, inputs = case.instance(precision("float32"))
        assert not any(x.is_contiguous() for x in inputs.values())


def test_unknown_precision():
    with pytest.raises(ValueError, match="unknown dtype 'fp8'; expected one of float64, float32"):
        precision("fp8")
