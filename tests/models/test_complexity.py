"""Multiply-adds and parameters: the paper's formulas, and exact counts against torch's own counters."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmt_fast.models import complexity
from cmt_fast.models.cmt import CMT
from cmt_fast.models.complexity import MAC_KINDS, add, by_kind, by_stage, layers, total
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.variants import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = dict(
    img_size=64,
    num_classes=10,
    embed_dims=(8, 16, 32, 64),
    stem_channel=8,
    fc_dim=48,
    num_heads=(1, 2, 4, 8),
    depths=(1, 2, 1, 1),
    mlp_ratios=(4, 3.6, 3.77, 4),
)


def golden_config(name: str) -> dict:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


def on_meta(**config) -> CMT:
    with torch.device("meta"):
        return CMT(**config).eval()


def counted_macs(model: nn.Module, size: tuple[int, int], channels: int = 3) -> dict[str, float]:
    """torch's count of a forward pass of one image, in total ("") and by submodule."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, channels, *size, device="meta"))
    counts = counter.get_flop_counts()
    named = {key.partition(".")[2]: sum(flops.values()) / 2 for key, flops in counts.items() if key != "Global"}
    return {"": counter.get_total_flops() / 2, **named}


@pytest.mark.parametrize(
    ("name", "gmacs", "params"),
    [
        ("cmt_ti", 0.639, 9_492_426),
        ("cmt_xs", 1.547, 15_247_208),
        ("cmt_s", 4.032, 26_256_160),
        ("cmt_b", 9.317, 45_715_076),
    ],
)
def test_variants(name, gmacs, params):
    variant = VARIANTS[name]
    found = total(name)
    model = on_meta(img_size=variant.resolution, **variant.config)
    assert found.params == params == sum(p.numel() for p in model.parameters())
    assert found.macs == counted_macs(model, model.img_size)[""]
    assert round(found.macs / 1e9, 3) == gmacs


def test_performance_plan_counts_of_cmt_s():
    chosen = layers("cmt_s")
    kinds = by_kind(chosen)
    assert kinds["gelu"].elements == 15_454_208
    conv3x3 = [layer for layer in chosen if layer.kind == "depthwise" and ".sr." not in layer.name]
    assert add(conv3x3).elements == 8_906_240
    assert add(conv3x3).macs == 9 * 8_906_240


CASES = {
    "golden aligned": golden_config("aligned"),
    "golden odd": golden_config("odd"),
    "non-square": dict(SMALL, img_size=(64, 96)),
    "odd side": dict(SMALL, img_size=(77, 103)),
    "qk_ratio": dict(SMALL, qk_ratio=2),
    "no qkv bias": dict(SMALL, qkv_bias=False),
    "representation": dict(SMALL, representation_size=24),
    "no classes": dict(SMALL, num_classes=0),
    "unpooled": dict(SMALL, num_classes=0, global_pool=""),
    "one channel": dict(SMALL, in_chans=1),
    "no reduction": dict(SMALL, sr_ratios=(1, 1, 1, 1)),
    "odd reductions": dict(SMALL, img_size=(81, 64), sr_ratios=(5, 3, 2, 1)),
    "other norm": dict(SMALL, norm_layer=lambda dim: nn.LayerNorm(dim, bias=False)),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_equals_torch_layer_by_layer(config):
    model = on_meta(**config)
    found = layers(**config)
    counted = counted_macs(model, model.img_size, model.in_chans)
    assert add(found).macs == counted[""]
    assert add(found).params == sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    for layer in found:
        if layer.name in modules:
            assert layer.params == sum(p.numel() for p in modules[layer.name].parameters()), layer.name
        if layer.macs and layer.name in counted:  # PointwiseConv and Linear count inside their parent too
            assert layer.macs == counted[layer.name], layer.name
    with_parameters = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    assert with_parameters <= {layer.name for layer in found}


def test_shapes_are_those_of_the_forward_pass():
    model = CMT(**dict(SMALL, img_size=(77, 103), depths=(1, 1, 1, 1), qk_ratio=2)).eval()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, out, name=name: seen.update({name: out}))
    model(torch.zeros(1, 3, 77, 103))
    compared = 0
    for layer in layers(model):
        if isinstance(seen.get(layer.name), torch.Tensor):
            assert layer.elements == seen[layer.name].numel(), layer.name
            compared += 1
    assert compared > 60


@given(
    size=st.tuples(st.integers(31, 140), st.integers(31, 140)),
    ratio=st.floats(1.0, 5.0),
    qk_ratio=st.sampled_from([1, 2]),
)
@settings(max_examples=10, deadline=None)
def test_any_size(size, ratio, qk_ratio):
    config = dict(SMALL, img_size=size, mlp_ratios=(ratio,) * 4, qk_ratio=qk_ratio, depths=(1, 1, 1, 1))
    model = on_meta(**config)
    found = total(**config)
    assert (found.macs, found.params) == (counted_macs(model, size)[""], sum(p.numel() for p in model.parameters()))


def test_a_model_keeps_its_bias_tables_at_another_input_size():
    model = CMT(**SMALL)
    small, large = total(model), total(model, img_size=(96, 128))
    assert large.params == small.params == sum(p.numel() for p in model.parameters())
    assert large.macs == counted_macs(on_meta(**SMALL), (96, 128))[""]
    assert total(**dict(SMALL, img_size=(96, 128))).params > small.params


def test_a_backbone_is_counted_as_far_as_it_runs():
    features = CMTFeatures(CMT(**SMALL), (0, 1))
    assert total(features).params == sum(p.numel() for p in features.parameters())
    assert total(features).macs == counted_macs(CMTFeatures(on_meta(**SMALL), (0, 1)), (64, 64))[""]
    assert list(by_stage(layers(features))) == ["stem", "a", "b"]


def test_summaries_add_up():
    found = layers("cmt_ti")
    whole = add(found)
    for groups in (by_kind(found), by_stage(found)):
        assert tuple(map(sum, zip(*groups.values()))) == whole
    assert list(by_kind(found))[: len(MAC_KINDS)] == list(MAC_KINDS)
    assert all(totals.macs == 0 for kind, totals in by_kind(found).items() if kind not in MAC_KINDS)
    assert list(by_stage(found)) == ["stem", "a", "b", "c", "d", "head"]
    assert all(layer.elements == prod(layer.shape) for layer in found)
    assert len({layer.name for layer in found}) == len(found)


def test_overrides_of_a_variant():
    assert total("cmt_ti", num_classes=0).params == total("cmt_ti").params - 1281 * 1000
    assert total("cmt_ti", img_size=224).params == 9_705_546  # what the original's cmt_ti() builds by default


# ---- the paper's formulas ----------------------------------------------------------------------------------------------


def test_formulas_of_the_paper():
    n, d, k = 3136, 64, 8
    assert complexity.mhsa_macs(n, d) == 4 * n * d * d + 2 * n * n * d
    assert complexity.mhsa_macs(n, d, 32, 48) == 2 * n * d * 80 + n * n * 80
    assert complexity.transformer_block_macs(n, d) == 12 * n * d**2 + 2 * n**2 * d
    assert complexity.ffn_macs(n, d, 3) == 6 * n * d**2
    assert complexity.lpu_macs(n, d) == 9 * n * d
    assert complexity.lmhsa_macs(n, d, k) == pytest.approx(2 * n * d**2 * (1 + 1 / 64) + 2 * n**2 * d / 64)
    assert complexity.irffn_macs(n, d) == 8 * n * d**2 + 36 * n * d


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_block_formula_is_the_sum_of_its_parts(k):
    n, d = 784, 128
    parts = complexity.lpu_macs(n, d) + complexity.lmhsa_macs(n, d, k) + complexity.irffn_macs(n, d)
    assert complexity.cmt_block_macs(n, d, k) == pytest.approx(parts)


@pytest.mark.parametrize(("stage", "k"), [("a", 8), ("b", 4), ("c", 2), ("d", 1)])
def test_block_formula_against_the_exact_count(stage, k):
    """The paper leaves out the k x k convolution and nothing else."""
    block = [layer for layer in layers("cmt_s") if layer.name.startswith(f"blocks_{stage}.0.")]
    n, d = block[0].shape[0] * block[0].shape[1], block[0].shape[2]
    left_out = n * d if k > 1 else 0
    assert add(block).macs == pytest.approx(complexity.cmt_block_macs(n, d, k) + left_out)


@pytest.mark.parametrize(
    ("args", "config", "message"),
    [
        (("cmt_l",), {}, "unknown model 'cmt_l'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b"),
        ((nn.Linear(1, 1),), {}, "model must be a variant's name or a CMT, got Linear"),
        ((CMT(**SMALL),), {"depths": (1, 1, 1, 1)}, "a model has its configuration already, got depths too"),
        (("cmt_s",), {"img_size": 16}, "leaves a stage without keys"),
        (("cmt_s",), {"img_size": "224"}, "img_size must be a positive integer or"),
        ((), {"depths": (1, 1)}, "depths must hold four positive integers"),
    ],
)
def test_errors(args, config, message):
    with pytest.raises(ValueError, match=message):
        layers(*args, **config)
