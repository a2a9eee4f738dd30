"""The tolerance policy can fail, and fails for the right reason."""

import math

import pytest
import torch

from cmt_fast.testing.tolerance import assert_within, compare


@pytest.fixture
def product() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix product in bfloat16 and exactly."""
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    return a @ b, a.double() @ b.double()


def test_plain_pytorch_is_within_its_own_policy(product):
    plain, exact = product
    result = assert_within("y", plain, exact, plain)
    assert 0 < result.error == result.own_error < result.bound
    assert 0 < result.ratio < 1


@pytest.mark.parametrize("backward, factor", [(False, 2), (True, 3)])
def test_the_bound_is_the_documented_one(product, backward, factor):
    plain, exact = product
    result = compare("y", plain, exact, plain, backward=backward)
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    assert result.bound == pytest.approx(factor * result.own_error + unit)


def test_a_perturbed_element_fails_and_is_named(product):
    plain, exact = product
    wrong = plain.clone()
    wrong[3, 5] += 1
    result = compare("y", wrong, exact, plain)
    assert not result.passed
    with pytest.raises(AssertionError, match=r"y FAILED: error 1.*own 0\.0.*bound 0\..*worst at \(3, 5\)"):
        assert_within("y", wrong, exact, plain)


def test_an_error_between_forward_and_backward_bound(product):
    plain, exact = product
    own = compare("y", plain, exact, plain)
    wrong = exact.clone()
    wrong[0, 0] += own.bound + own.own_error / 2  # 2.5 own errors and one unit
    low = plain.double()  # a dtype that does not round the perturbation away
    assert not compare("y", wrong, exact, low, dtype=torch.bfloat16).passed
    assert compare("y", wrong, exact, low, dtype=torch.bfloat16, backward=True).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails(product, value):
    plain, exact = product
    wrong = plain.clone()
    wrong[1, 2] = value
    result = compare("y", wrong, exact, plain)
    assert not result.passed and "not finite at (1, 2)" in result.detail


def test_shape_and_dtype_come_first(product):
    plain, exact = product
    assert "expected shape (32, 32), got (32, 31)" in compare("y", plain[:, 1:], exact, plain).detail
    assert "expected dtype torch.bfloat16, got torch.float32" in compare("y", plain.float(), exact, plain).detail
    assert not compare("y", plain[:, 1:], exact, plain).passed
    assert not compare("y", plain.float(), exact, plain).passed


def test_plain_pytorch_overflowing_is_no_pass(product):
    plain, exact = product
    broken = plain.clone()
    broken[0, 0] = math.inf
    result = compare("y", plain, exact, broken)
    assert not result.passed and "choose smaller inputs" in result.detail


def test_one_rounding_unit_is_allowed_where_plain_is_exact():
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    plain = exact.float()
    eps = torch.finfo(torch.float32).eps
    assert compare("y", plain * (1 + eps), exact, plain).passed
    assert not compare("y", plain * (1 + 2 * eps), exact, plain).passed
    assert compare("y", plain * (1 + 2 * eps), exact, plain, scale=8.0).passed


def test_integers_must_be_equal():
    three = torch.tensor(3)
    assert compare("steps", three, three, three).passed
    result = compare("steps", torch.tensor(4), three, three)
    assert not result.passed and result.ratio == math.inf


def test_empty_tensors_pass():
    empty = torch.empty(0, 3)
    assert compare("y", empty, empty, empty).passed
