"""The four published models by name."""

import pytest
import torch

import cmt_fast
from cmt_fast import CheckpointError, CMTFeatures, cmt_ti, create_model
from cmt_fast.models.create import create, default_cfg
from cmt_fast.models.variants import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_functions_build_the_variants(name):
    with torch.device("meta"):
        model = getattr(cmt_fast, name)(img_size=64)
        assert str(model) == str(create_model(name, img_size=64))
    assert model.img_size == (64, 64) and model.num_classes == 1000
    for key, value in VARIANTS[name].config.items():
        assert list(model.config[key]) == list(value) if isinstance(value, tuple) else model.config[key] == value


def test_the_size_is_the_originals_unless_weights_are_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "cmt_fast.models.create.load_checkpoint", lambda model, url, **kwargs: loaded.append((url, kwargs))
    )
    with torch.device("meta"):
        assert cmt_ti().img_size == (224, 224)
        assert cmt_ti(pretrained=True).img_size == (160, 160)
        assert cmt_ti(pretrained=True, img_size=(96, 128)).img_size == (96, 128)
    assert loaded == [(VARIANTS["cmt_ti"].url, {"adapt_in_chans": True})] * 2


def test_pretrained_from_the_hub_directory(tmp_path, monkeypatch):
    """A file put by hand where the download would go is taken; classes, channels and size are fitted."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    published = cmt_ti(img_size=160)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": published.state_dict()}, tmp_path / "checkpoints" / "cmt_tiny.pth")
    model = cmt_ti(pretrained=True, img_size=64, in_chans=1, num_classes=3)
    assert torch.equal(model._fc.weight, published._fc.weight)
    features = cmt_ti(pretrained=True, features_only=True, out_indices=[0])
    assert torch.equal(features.model.relative_pos_a, published.relative_pos_a)


def test_pretrained_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def urlopen(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(
        CheckpointError, match=r"cannot download https://.*cmt_tiny\.pth.*offline.*cmt_tiny\.pth or pass"
    ):
        cmt_ti(pretrained=True)


def test_features_only():
    with torch.device("meta"):
        model = cmt_ti(img_size=64, features_only=True, out_indices=(1, -1), num_classes=0)
    assert isinstance(model, CMTFeatures)
    assert model.feature_info.channels() == [92, 368]


def test_default_cfg_is_a_plain_dict():
    with torch.device("meta"):
        model = cmt_ti(img_size=(96, 128), in_chans=1)
    assert type(model.default_cfg) is dict
    assert model.default_cfg == {**default_cfg("cmt_ti"), "input_size": (1, 96, 128)}


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"unknown model 'cmt_l'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b"):
        create("cmt_l")
    with pytest.raises(TypeError, match="windows"):
        cmt_ti(windows=3)
