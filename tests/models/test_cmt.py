"""The model's own behaviour: keys, counts, sizes, heads, feature maps, and every error it can raise."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cmt_fast
from cmt_fast.models.create import create
from cmt_fast.models.variants import VARIANTS

GOLDEN_KEYS = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_keys.json").read_text())
TINY = dict(
    img_size=64, num_classes=10, embed_dims=(8, 16, 32, 64), stem_channel=8, fc_dim=48, depths=(1, 1, 2, 1), dp=0.0
)


def tiny(**overrides):
    torch.manual_seed(0)
    return cmt_fast.CMT(**{**TINY, **overrides})


# ---- the original's layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_shapes_and_parameters_of_the_original(name):
    expected = GOLDEN_KEYS[name]
    model = create(name, img_size=expected["img_size"])
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes) == list(expected["state_dict"])  # the order too: optimizer states are stored by position
    assert shapes == {key: list(shape) for key, shape in expected["state_dict"].items()}


def test_initialisation():
    model = create("cmt_ti", img_size=160)
    block = model.blocks_c[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.proj.weight.std().item() == pytest.approx(
        (2 / (9 * 662)) ** 0.5, rel=0.05
    )  # fan_out ignores groups
    assert model.relative_pos_a.std().item() == pytest.approx(1.0, rel=0.05)
    assert (
        all(m.eps == 1e-6 for b in model.blocks_a for m in (b.norm1, b.norm2)) and model.patch_embed_a.norm.eps == 1e-5
    )
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert bool((module.weight == 1).all())


def test_stochastic_depth_grows_linearly():
    model = tiny(drop_path_rate=0.2)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in "abcd" for b in getattr(model, f"blocks_{s}")]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


# ---- sizes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(h=st.integers(31, 130), w=st.integers(31, 130), batch=st.integers(1, 2))
def test_any_size_runs(h, w, batch):
    model = SHARED
    maps = model.forward_intermediates(torch.randn(batch, 3, h, w), intermediates_only=True)
    assert model(torch.randn(batch, 3, h, w)).shape == (batch, 10)
    for i, (m, dim) in enumerate(zip(maps, model.embed_dims)):
        size = tuple(((side + 1) // 2) >> (i + 1) for side in (h, w))
        assert m.shape == (batch, dim, *size) and m.isfinite().all()


SHARED = tiny().eval().requires_grad_(False)


def test_set_input_size_equals_resizing_on_the_fly():
    model, x = tiny().eval(), torch.randn(2, 3, 96, 160)
    dynamic = model(x)
    model.set_input_size((96, 160))
    assert model.img_size == (96, 160) and model.relative_pos_a.shape == (1, 24 * 40, 3 * 5)
    torch.testing.assert_close(model(x), dynamic)
    assert tiny(img_size=(96, 160)).relative_pos_d.shape == model.relative_pos_d.shape


def test_dynamic_size_has_gradients():
    model = tiny()
    model(torch.randn(2, 3, 96, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.relative_pos_a.grad.shape == model.relative_pos_a.shape


def test_channels_and_classes():
    assert tiny(in_chans=1)(torch.randn(2, 1, 64, 64)).shape == (2, 10)
    assert tiny(in_chans=5, num_classes=0)(torch.randn(2, 5, 64, 64)).shape == (2, 48)
    model = tiny(representation_size=20)
    assert model.head_hidden_size == 20 and model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert list(model.pre_logits.state_dict()) == ["fc.weight", "fc.bias"]


def test_reset_classifier_keeps_device_and_dtype():
    model = tiny().double()
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64 and model(torch.randn(2, 3, 64, 64).double()).shape == (2, 3)
    assert model.get_classifier() is model.head and model.num_classes == 3
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 48)
    model.reset_classifier(0, global_pool="")
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 48, 2, 2)


def test_no_weight_decay():
    assert tiny().no_weight_decay() == {f"relative_pos_{s}" for s in "abcd"}
    assert tiny(decay_relative_pos=True).no_weight_decay() == set()


def test_forward_is_features_then_head():
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 2, 2) and features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_features_only():
    torch.manual_seed(0)
    full, x = create("cmt_ti", img_size=64).eval(), torch.randn(1, 3, 64, 96)
    torch.manual_seed(0)
    backbone = create("cmt_ti", img_size=64, features_only=True, out_indices=(1, 3)).eval()
    maps = backbone(x)
    assert backbone.feature_info.channels() == [92, 368] and backbone.feature_info.reduction() == [8, 32]
    assert backbone.feature_info.module_name() == ["blocks_b", "blocks_d"] and len(backbone.feature_info) == 4
    assert [tuple(m.shape) for m in maps] == [(1, 92, 8, 12), (1, 368, 2, 3)]
    for ours, theirs in zip(maps, full.forward_intermediates(x, [1, 3], intermediates_only=True)):
        torch.testing.assert_close(ours, theirs)
    shallow = create("cmt_ti", features_only=True, out_indices=[0])
    assert not any(key.startswith(("model.blocks_b", "model.head", "model._fc")) for key in shallow.state_dict())


def test_the_original_attributes():
    model = tiny()
    assert (model.num_classes, model.num_features, model.embed_dim) == (10, 64, 64)
    assert model.patch_embed_a.num_patches == 256 and model.patch_embed_a.patch_size == (2, 2)
    x, (h, w) = model.patch_embed_a(torch.randn(2, 8, 32, 32))  # as users of the original call its parts
    x = model.blocks_a[0](x, h, w, model.relative_pos_a)
    assert x.shape == (2, 256, 8)
    branch = model.blocks_a[0].attn(x, h, w, model.relative_pos_a)
    whole = model.blocks_a[0].attn(x, h, w, model.relative_pos_a, norm=nn.Identity(), shortcut=True)
    torch.testing.assert_close(whole, x + branch)


# ---- errors ----------------------------------------------------------------------------------------------------------

CONSTRUCTION_ERRORS = [
    (dict(embed_dims=(8, 16, 32)), ValueError, r"embed_dims must hold four positive integers.*\(8, 16, 32\)"),
    (dict(embed_dims=(8, 16, 32, 64.0)), ValueError, r"embed_dims must hold four positive integers.*64.0"),
    (dict(embed_dims=None), ValueError, r"embed_dims must hold four positive integers, one a stage, got None"),
    (dict(embed_dims="abcd"), ValueError, r"embed_dims must hold four positive integers, one a stage, got 'abcd'"),
    (dict(depths=3), ValueError, r"depths must hold four positive integers, one a stage, got 3"),
    (dict(depths=(1, 1, 1.5, 1)), ValueError, r"depths must hold four positive integers.*1.5"),
    (dict(sr_ratios=(8, 4, 2, 0)), ValueError, r"sr_ratios must hold four positive integers"),
    (dict(mlp_ratios=(4, 4, 4, -1)), ValueError, r"mlp_ratios must hold four positive numbers"),
    (dict(mlp_ratios=(0.01,) * 4), ValueError, r"mlp_ratios .* leave a stage .* without hidden channels"),
    (dict(num_heads=(1, 2, 5, 8)), ValueError, r"num_heads must divide dim.*num_heads 5, dim 32"),
    (dict(qk_ratio=3), ValueError, r"num_heads must divide dim and dim // qk_ratio.*qk_ratio 3"),
    (dict(qk_ratio=0), ValueError, r"qk_ratio must be at least 1, got 0"),
    (dict(qk_ratio=0.5), TypeError, r"qk_ratio must be an integer, got 0.5"),
    (dict(num_classes=-1), ValueError, r"num_classes must be at least 0, got -1"),
    (dict(num_classes=None), TypeError, r"num_classes must be an integer, got None"),
    (dict(in_chans=0), ValueError, r"in_chans must be at least 1, got 0"),
    (dict(in_chans="3"), TypeError, r"in_chans must be an integer, got '3'"),
    (dict(stem_channel=0), ValueError, r"stem_channel must be at least 1, got 0"),
    (dict(fc_dim=0), ValueError, r"fc_dim must be at least 1, got 0"),
    (dict(representation_size=-1), ValueError, r"representation_size must be at least 0, got -1"),
    (dict(norm_layer="ln"), TypeError, r"norm_layer must make a module from a number of channels, got 'ln'"),
    (dict(img_size=16), ValueError, r"16 x 16 pixels leaves a stage without keys: both sides must be at least 31"),
    (
        dict(img_size=(64,) * 3),
        ValueError,
        r"img_size must be a positive integer or \(height, width\), got \(64, 64, 64\)",
    ),
    (dict(img_size=-64), ValueError, r"img_size must be a positive integer or \(height, width\), got -64"),
    (dict(img_size=64.0), ValueError, r"img_size must be a positive integer or \(height, width\), got 64.0"),
    (dict(global_pool="max"), ValueError, r"global_pool must be 'avg' or '' \(none\), got 'max'"),
    (dict(global_pool=""), ValueError, r"global_pool='' needs num_classes=0.*num_classes=10"),
    (dict(hybrid_backbone="resnet50"), ValueError, r"hybrid_backbone is not supported"),
    (dict(drop_path_rate=1.5), ValueError, r"drop_path_rate must be a probability in \[0, 1\), got 1.5"),
    (dict(dp=2), ValueError, r"dp must be a probability in \[0, 1\), got 2"),
]


@pytest.mark.parametrize("arguments, error, message", CONSTRUCTION_ERRORS, ids=lambda v: str(v)[:40])
def test_construction_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


INPUT_ERRORS = [
    (torch.randn(3, 64, 64), ValueError, r"must have shape \(B, 3, H, W\), got \(3, 64, 64\); add the batch dimension"),
    (torch.randn(2, 1, 64, 64), ValueError, r"must have shape \(B, 3, H, W\), got \(2, 1, 64, 64\)"),
    ([1, 2], ValueError, r"must have shape \(B, 3, H, W\), got list"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"must be floating point, got torch.uint8"),
    (torch.randn(1, 3, 64, 64).double(), TypeError, r"input is torch.float64 but the model is torch.float32: use"),
    (torch.randn(1, 3, 64, 64, device="meta"), ValueError, r"input is on meta but the model is on cpu"),
    (
        torch.randn(1, 3, 30, 64),
        ValueError,
        r"30 x 64 pixels leaves a stage without keys: both sides must be at least 31",
    ),
]


@pytest.mark.parametrize("x, error, message", INPUT_ERRORS, ids=range(len(INPUT_ERRORS)))
def test_input_errors(x, error, message):
    with pytest.raises(error, match=message):
        SHARED(x)


CALL_ERRORS = [
    (lambda m: m.reset_classifier(-2), r"num_classes must be at least 0, got -2"),
    (lambda m: m.reset_classifier(5, "max"), r"global_pool must be 'avg' or ''"),
    (lambda m: m.set_input_size(20), r"20 x 20 pixels leaves a stage without keys"),
    (lambda m: m.forward_intermediates(torch.randn(1, 3, 64, 64), [4]), r"indices must name stages 0 to 3.*got \[4\]"),
    (lambda m: m.forward_intermediates(torch.randn(1, 3, 64, 64), 5), r"number of last maps wanted \(1 to 4\), got 5"),
    (lambda m: m.forward_intermediates(torch.randn(1, 3, 64, 64), []), r"indices must name stages"),
    (
        lambda m: m.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC"),
        r"output_fmt must be 'NCHW', got 'NLC'",
    ),
    (lambda m: create("cmt_ti", out_indices=(1,)), r"out_indices needs features_only=True"),
    (lambda m: create("cmt_l"), r"unknown model 'cmt_l'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b"),
    (
        lambda m: cmt_fast.set_backend("cuda"),
        r"backend must be one of 'auto', 'triton', 'native', 'reference', got 'cuda'",
    ),
]


@pytest.mark.parametrize("call, message", CALL_ERRORS, ids=range(len(CALL_ERRORS)))
def test_call_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(SHARED)


def test_norm_layer():
    model = tiny(norm_layer=partial(nn.LayerNorm, eps=1e-3))
    assert model.blocks_a[0].norm1.eps == 1e-3 and model.patch_embed_a.norm.eps == 1e-5
    bare = tiny(norm_layer=partial(nn.LayerNorm, elementwise_affine=False))
    assert bare.blocks_a[0].norm1.weight is None and bare(torch.randn(2, 3, 64, 64)).shape == (2, 10)
