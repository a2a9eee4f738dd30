"""Providers: frozen weights are constants, exported ones are the model's."""

import sys

import pytest
import torch
from torch import nn

from cmt_fast.backend import BackendError, machine_reasons
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import COMPILED_ON_GPU, PROVIDERS, _frozen
from cmt_fast.testing.shapes import SMALL_MODELS

FLOAT32 = precision("float32")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CMT(**{**SMALL_MODELS["aligned"], "depths": (1, 1, 1, 1)}).eval()


@pytest.fixture
def images():
    return torch.randn(1, 3, 64, 64)


def test_freezing_makes_constants_of_the_weights(images):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()).eval()
    with torch.inference_mode():
        before = module(images)
        forward = _frozen(module, images, FLOAT32)
        module[0].weight.mul_(2)  # in place, so nothing is compiled again
        torch.testing.assert_close(forward(images), before)
        assert not torch.allclose(module(images), before)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-packed"])
def test_the_exported_model_is_the_model(name, model, images):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.inference_mode():
        forward = PROVIDERS[name].make(model, images, FLOAT32)
        torch.testing.assert_close(forward(images), model(images))


def test_without_onnxruntime_the_error_says_what_to_install(model, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'cmt-fast\[export\]'"):
        PROVIDERS["onnxruntime"].make(model, images, FLOAT32)


def test_a_backend_that_cannot_run_is_an_error_not_another_backend(model, images):
    if not machine_reasons("triton"):
        pytest.skip("triton runs here")
    with pytest.raises(BackendError, match="backend 'triton' cannot run optimize"):
        PROVIDERS["optimize-triton"].make(model, images, FLOAT32)


@pytest.mark.parametrize("name", ["original-channels-last", "optimize"])
def test_a_provider_leaves_the_model_as_it_was(name, model, images):
    before = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    with torch.inference_mode():
        PROVIDERS[name].make(model, images, FLOAT32)(images)
    for key, value in model.state_dict().items():
        assert value.stride() == before[key][1] and torch.equal(value, before[key][0]), key


@pytest.mark.parametrize("name", COMPILED_ON_GPU)
def test_modes_and_layouts_of_compile(name, model, images, monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.update(options) or function)
    provider = COMPILED_ON_GPU[name]
    with torch.inference_mode():
        forward = provider.make(model, images, FLOAT32)
        torch.testing.assert_close(forward(images.contiguous(memory_format=provider.memory_format)), model(images))
    assert seen["mode"] in name.replace("original-compile-channels-last", "default")
    assert (provider.memory_format == torch.channels_last) == name.endswith("channels-last")
    assert "inference only" in provider.unsupported(FLOAT32, "training")
