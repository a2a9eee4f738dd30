"""The variants inside timm, by timm's own conventions."""
# ruff: noqa: E402 - without timm, the whole file skips before it is imported

import subprocess
import sys
import urllib.error

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs timm, not installed here")

from timm.data import resolve_data_config
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import cmt_fast
from cmt_fast import CMT, CMTFeatures
from cmt_fast.models.variants import VARIANTS

# A variant small enough for a test: timm passes arguments on, and ours go before the variant's.
SMALL = dict(
    img_size=64, embed_dims=(8, 16, 16, 32), stem_channel=4, fc_dim=24, num_heads=(1, 2, 2, 4), depths=(1, 2, 1, 1)
)


def small(**changes):
    return timm.create_model("cmt_ti", **{**SMALL, **changes}).eval()


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ---- the registry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", ["import cmt_fast, timm", "import timm, cmt_fast", "import cmt_fast, timm.models"])
def test_either_order_of_imports(lines):
    """Also the hook goes away, and timm is imported once, by its own loader."""
    check = (
        f"{lines}\nimport sys, timm\n"
        "assert timm.is_model('cmt_s')\n"
        "assert not any(type(finder).__module__.startswith('cmt_fast') for finder in sys.meta_path)\n"
        "assert 'exec_module' not in vars(timm.__spec__.loader)\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", check], check=True)


def test_a_timm_that_fails_to_import_can_be_imported_again(tmp_path):
    """And a timm without the parts needed is a warning, not an error."""
    (tmp_path / "timm.py").write_text("import os\nif os.environ.pop('BROKEN', None): raise ImportError('broken')\n")
    check = (
        "import os, sys, warnings, cmt_fast\nos.environ['BROKEN'] = '1'\n"
        "try: import timm\nexcept ImportError as error: assert str(error) == 'broken'\nelse: raise SystemExit('imported')\n"
        "with warnings.catch_warnings(record=True) as caught:\n    import timm\n"
        "assert len(caught) == 1 and 'could not register its models with this timm' in str(caught[0].message), caught\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{check}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry():
    assert timm.list_models("cmt_*") == sorted(VARIANTS)
    assert timm.list_models("cmt_*", pretrained=True) == sorted(VARIANTS)
    for name, variant in VARIANTS.items():
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.architecture, cfg.url, cfg.input_size) == (
            name,
            variant.url,
            (3, variant.resolution, variant.resolution),
        )
        assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (0.875, "bicubic", 1000)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        assert type(model) is CMT and model.img_size == (VARIANTS[name].resolution,) * 2
        assert str(model) == str(cmt_fast.create_model(name))
    assert model.get_submodule(model.pretrained_cfg["first_conv"]) is model.stem_conv1
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


# ---- arguments ----------------------------------------------------------------------------------------------------------


def test_arguments():
    model = small(num_classes=5, in_chans=1, img_size=(96, 128), drop_path_rate=0.2)
    assert model(torch.randn(1, 1, 96, 128)).shape == (1, 5)
    assert model.img_size == (96, 128)
    assert model.blocks_d[0].drop_path.drop_prob == pytest.approx(0.2)


def test_without_classes_and_without_pooling():
    vector = small(num_classes=0)
    assert isinstance(vector.get_classifier(), nn.Identity)
    assert vector(IMAGE).shape == (2, vector.head_hidden_size)
    unpooled = small(num_classes=0, global_pool="")
    unpooled.load_state_dict(vector.state_dict())
    torch.testing.assert_close(unpooled(IMAGE).mean((2, 3)), vector(IMAGE))


def test_drop_rate_is_the_originals():
    model = small(drop_rate=0.3)
    assert model.blocks_a[0].mlp.drop.p == 0.3 and model._drop.p == 0.1


def test_reset_classifier():
    model = small()
    model.reset_classifier(3)
    assert model(IMAGE).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(IMAGE).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(IMAGE).shape == (2, model.head_hidden_size, 2, 2)


def test_set_input_size():
    model = small()
    wanted = model(torch.nn.functional.interpolate(IMAGE, (96, 64)))
    model.set_input_size(img_size=(96, 64))
    torch.testing.assert_close(model(torch.nn.functional.interpolate(IMAGE, (96, 64))), wanted)


def test_set_grad_checkpointing():
    model = small()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGE).square().mean().backward()
        gradients.append(model.stem_conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ---- features -----------------------------------------------------------------------------------------------------------


def test_features_and_head_make_the_forward_pass():
    model = small()
    features = model.forward_features(IMAGE)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(IMAGE))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("out_indices", [None, (0, 1, 2, 3), (1,), (0, -2), (-1,), 2])
def test_features_only_equals_ours(out_indices):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    theirs = small(features_only=True, **chosen)
    ours = CMTFeatures(small(), **chosen).eval()
    ours.load_state_dict(theirs.state_dict())
    for name in ("channels", "reduction", "module_name"):
        assert list(getattr(theirs.feature_info, name)()) == getattr(ours.feature_info, name)()
    maps = theirs(IMAGE)
    for x, y, channels, reduction in zip(
        maps, ours(IMAGE), theirs.feature_info.channels(), theirs.feature_info.reduction(), strict=True
    ):
        assert torch.equal(x, y)
        assert x.shape == (2, channels, 64 // reduction, 64 // reduction)


def test_forward_intermediates():
    model = small()
    final, maps = model.forward_intermediates(IMAGE)
    assert torch.equal(final, maps[-1]) and torch.equal(final, model.forward_features(IMAGE))
    assert [m.shape[1] for m in maps] == [8, 16, 16, 32]
    for indices, expected in (([0, 2], [0, 2]), ([-1, 1], [3, 1]), (2, [2, 3]), ([-4], [0])):
        for stop_early in (False, True):
            got = model.forward_intermediates(IMAGE, indices, stop_early=stop_early, intermediates_only=True)
            assert all(torch.equal(x, maps[i]) for x, i in zip(got, expected, strict=True))
    last, _ = model.forward_intermediates(IMAGE, [1], stop_early=True)
    assert torch.equal(last, maps[1])


def test_prune_intermediate_layers():
    model = small()
    maps = model.forward_intermediates(IMAGE, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert not [name for name, _ in model.named_parameters() if "_d" in name or name.startswith(("_fc", "head"))]
    for x, y in zip(model.forward_intermediates(IMAGE, [0, 2], intermediates_only=True), maps, strict=True):
        assert torch.equal(x, y)


# ---- optimizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(coarse):
    model = small()
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    layer = {name: i for i, names in groups.items() for name in names}
    blocks = [
        ("a", 0, 1),
        ("b", 0, 2),
        ("b", 1, 2 if coarse else 3),
        ("c", 0, 3 if coarse else 4),
        ("d", 0, 4 if coarse else 5),
    ]
    for stage, block, wanted in blocks:
        assert layer[f"blocks_{stage}.{block}.norm1.weight"] == wanted
        if block == 0:
            assert layer[f"patch_embed_{stage}.proj.weight"] == layer[f"relative_pos_{stage}"] == wanted
    last = blocks[-1][2]
    assert (layer["stem_conv1.weight"], layer["_fc.weight"], layer["head.weight"]) == (0, last, last + 1)
    assert set(layer.values()) == set(range(last + 2))


def test_layer_decay():
    model = small()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1 and scale[id(model._fc.weight)] == 0.5
    assert scale[id(model.stem_conv1.weight)] == 0.5**6


@pytest.mark.parametrize("decay", [False, True])
def test_weight_decay_of_the_bias_tables(decay):
    model = small(decay_relative_pos=decay)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.head.weight)] == 0.05 and decays[id(model.head.bias)] == 0
    assert {decays[id(getattr(model, f"relative_pos_{stage}"))] for stage in "abcd"} == {0.05 if decay else 0}


# ---- weights and data ---------------------------------------------------------------------------------------------------


def test_data_config():
    for model in (small(), cmt_fast.cmt_ti(img_size=160, **{k: v for k, v in SMALL.items() if k != "img_size"})):
        config = resolve_data_config({}, model=model)
        assert config["input_size"] == (3, 160, 160)
        assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
        assert config["mean"] == pytest.approx((0.485, 0.456, 0.406))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file in the original's layout where the published one of cmt_ti would be downloaded to, and its model."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = small(img_size=96, num_classes=1000)
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "cmt_tiny.pth"
    torch.save({"model": model.state_dict()}, file)
    return model, file


@pytest.mark.parametrize("overlay", [False, True])
def test_pretrained(published, overlay):
    """Through our loader, and through timm's own when the user names another file."""
    model, file = published
    source = {"pretrained_cfg_overlay": dict(file=str(file))} if overlay else {}
    same = small(pretrained=True, img_size=96, **source)
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(same(x), model(x))
    resized = small(pretrained=True, num_classes=3, **source)
    wanted = model.forward_features(IMAGE)
    assert torch.equal(resized.forward_features(IMAGE), wanted)
    grey = small(pretrained=True, in_chans=1, num_classes=0, **source)
    torch.testing.assert_close(grey.stem_conv1.weight, model.stem_conv1.weight.sum(1, keepdim=True))
    features = small(pretrained=True, features_only=True, out_indices=(3,), **source)
    assert torch.equal(features(IMAGE)[0], wanted)


@pytest.mark.parametrize("overlay", [False, True])
def test_pretrained_that_does_not_match(published, overlay):
    source = {"pretrained_cfg_overlay": dict(file=str(published[1]))} if overlay else {}
    with pytest.raises(cmt_fast.CheckpointError, match=r"depths \(1, 2, 1, 1\), the model is"):
        small(pretrained=True, depths=(1, 1, 1, 1), **source)
    with pytest.raises(cmt_fast.CheckpointError, match="does not match"):
        small(pretrained=True, depths=(1, 1, 1, 1), num_classes=3, **source)


def test_pretrained_offline_says_what_to_do(tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(cmt_fast.CheckpointError, match=r"name resolution.*put the file at .*cmt_tiny\.pth"):
        timm.create_model("cmt_ti", pretrained=True)


def test_timm_saves_what_we_load(tmp_path):
    """timm's training checkpoint, of the model and of its average."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    model, other = small(num_classes=3), small(num_classes=3)
    ema = ModelEmaV3(model)
    ema.module.load_state_dict(other.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=0.5)
    target = small(num_classes=3)
    for key, wanted in ((None, model), ("state_dict_ema", other)):
        cmt_fast.load_checkpoint(target, tmp_path / "last.pth.tar", key=key)
        assert torch.equal(target(IMAGE), wanted(IMAGE))
    cmt_fast.load_checkpoint(ema, tmp_path / "last.pth.tar")
    assert torch.equal(ema.module(IMAGE), model(IMAGE))
