"""Beside the original's own code: same weights from a seed, same numbers, state dicts both ways.

The original is not part of this repository: point CMT_FAST_ORIGINAL at a checkout of it (the folder of its cmt.py).
Without one these tests are skipped, and the golden files (tests/golden) stand for it.
"""

import pytest
import torch

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.original_code import load_original, original_folder, original_model

pytestmark = pytest.mark.skipif(
    not original_folder(), reason="CMT_FAST_ORIGINAL does not name a checkout of the original code"
)


@pytest.fixture(scope="module")
def original():
    return load_original()


@pytest.fixture(params=VARIANTS)
def pair(request, original):
    """The original and ours, made from the same seed at the variant's resolution."""
    name, size = request.param, VARIANTS[request.param].resolution
    torch.manual_seed(0)
    theirs = getattr(original, name)(img_size=size)
    torch.manual_seed(0)
    return theirs, getattr(cmt_fast, name)(img_size=size), torch.randn(2, 3, size, size)


def test_a_seed_gives_the_same_weights(pair):
    theirs, ours, _ = pair
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))


def test_state_dicts_move_both_ways(pair):
    theirs, ours, _ = pair
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_inference(pair):
    theirs, ours, x = pair
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


def test_training_step(pair):
    """Logits, every gradient and every buffer; in float64, where nothing but the order of sums differs."""
    theirs, ours, x = (part.double() for part in pair)
    logits = []
    for model in (theirs, ours):
        model._drop.p = 0.0
        logits.append(model.train()(x))
        logits[-1].square().sum().backward()
    torch.testing.assert_close(logits[1], logits[0], atol=1e-9, rtol=1e-9)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        scale = 1.0 + b.grad.abs().max()
        assert ((a.grad - b.grad).abs().max() / scale).item() < 1e-9, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_training_step_in_float32(pair):
    """Logits and buffers within 1e-5; gradients within 1e-4 of the largest one (float32 sums in another order)."""
    theirs, ours, x = pair
    logits = []
    for model in (theirs, ours):
        model._drop.p = 0.0
        logits.append(model.train()(x))
        logits[-1].square().mean().backward()
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    scale = max(p.grad.abs().max() for p in theirs.parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert ((a.grad - b.grad).abs().max() / scale).item() < 1e-4, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_accelerate(pair):
    theirs, _, x = pair
    theirs.eval()
    ours = cmt_fast.accelerate(theirs)
    assert ours.head.weight is theirs.head.weight and not ours.training
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_the_original_on_our_parameters(pair):
    _, ours, x = pair
    theirs = original_model(ours)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
    theirs.head.weight.data.zero_()
    assert not ours.head.weight.any(), "not shared"
