"""The baseline computes what the model computes, with operations of its own."""

import copy

import pytest
import torch

from cmt_fast import CMT
from cmt_fast.testing.inputs import randomise
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.shapes import SMALL_MODELS
from cmt_fast.testing.tolerance import assert_within


@pytest.fixture(params=SMALL_MODELS)
def model(request) -> CMT:
    return randomise(CMT(**SMALL_MODELS[request.param]), torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_model_in_float64(model, training):
    ours, baseline = copy.deepcopy(model).train(training), OriginalOrder(model).train(training)
    x = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    results = []
    for module in (ours, baseline):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append((y, leaf.grad))
    for name, actual, exact in zip(("output", "input gradient"), *results):
        assert_within(name, actual, exact, exact, dtype=torch.float32)
    for (name, a), b in zip(ours.named_parameters(), model.parameters()):
        assert_within(name, a.grad, b.grad, b.grad, dtype=torch.float32, scale=1.0)
    for (name, a), b in zip(ours.named_buffers(), model.buffers()):
        assert_within(name, a, b, b, dtype=torch.float32)


def test_it_runs_no_operation_of_cmt_fast(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the baseline must not use the code that it judges")

    for name in ("lpu", "lmhsa", "irffn"):
        monkeypatch.setattr(f"cmt_fast.functional.{name}", refuse)
    x = torch.randn(1, 3, *model.img_size, dtype=torch.float64)
    OriginalOrder(model).eval()(x)
    with pytest.raises(AssertionError, match="must not use"):
        model.eval()(x)


def test_another_size_is_refused(model):
    with pytest.raises(ValueError, match=r"inputs of its own size .*, got \(128, 128\)"):
        OriginalOrder(model)(torch.zeros(1, 3, 128, 128, dtype=torch.float64))
