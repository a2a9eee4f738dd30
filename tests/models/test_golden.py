"""fp64 equality with the original code: logits, every gradient, every buffer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import cmt_fast

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-9  # the bound for float64; what is measured is below 1e-13


class Golden:
    def __init__(self, name):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def part(self, prefix):
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def model(self):
        model = cmt_fast.CMT(**self.config).double()
        model.load_state_dict(self.part("state."), strict=True)
        return model


@pytest.fixture(scope="module", params=["aligned", "odd"])
def golden(request):
    return Golden(request.param)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_eval_logits(golden):
    logits = golden.model().eval()(golden.tensors["input"])
    assert_equal({"logits": logits}, {"logits": golden.tensors["eval.logits"]})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(golden, checkpointing):
    model = golden.model().train()
    model.set_grad_checkpointing(checkpointing)
    x = golden.tensors["input"].clone().requires_grad_()
    logits = model(x)
    logits.backward(golden.tensors["grad_output"])
    assert_equal({"logits": logits}, {"logits": golden.tensors["train.logits"]})
    assert_equal({"input": x.grad}, {"input": golden.tensors["train.grad_input"]})
    assert_equal({name: p.grad for name, p in model.named_parameters()}, golden.part("train.grad."))
    assert_equal(dict(model.named_buffers()), golden.part("train.buffer."))


def test_a_wrong_model_is_seen(golden):
    """The comparison can fail: one bias entry off by 1e-3 is found."""
    model = golden.model().eval()
    with torch.no_grad():
        model.relative_pos_b[0, 0, 0] += 1e-3
    with pytest.raises(AssertionError):
        assert_equal({"logits": model(golden.tensors["input"])}, {"logits": golden.tensors["eval.logits"]})
