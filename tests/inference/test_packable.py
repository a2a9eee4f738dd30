"""Models whose parameters do not tell what they compute are refused, and the message names the part."""

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import cmt_fast
from cmt_fast.inference import pack, run
from cmt_fast.modules import convert_sync_batchnorm

CONFIG = dict(img_size=32, num_classes=5, embed_dims=(8, 8, 8, 8), stem_channel=4, fc_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))  # fmt: skip


def model(**config):
    return cmt_fast.CMT(**{**CONFIG, **config}).eval()


class Subclass(cmt_fast.CMT):
    pass


class Adapter(nn.Linear):
    pass


def changed(path, new):
    def build():
        result = model()
        owner, _, name = path.rpartition(".")
        setattr(result.get_submodule(owner), name, new(result.get_submodule(path)))
        return result

    return build


def setting(path, **settings):
    def build():
        result = model()
        for name, value in settings.items():
            setattr(result.get_submodule(path), name, value)
        return result

    return build


def hooked(path, register="register_forward_hook"):
    def build():
        result = model()
        getattr(result.get_submodule(path), register)(lambda *args: None)
        return result

    return build


REFUSED = {
    "subclass": (lambda: Subclass(**CONFIG), "the model is a Subclass, not a plain CMT"),
    "norm_layer": (lambda: model(norm_layer=nn.RMSNorm), r"blocks_a\.0\.norm1 is a RMSNorm, not a plain LayerNorm"),
    "many reasons": (lambda: model(norm_layer=nn.Identity), "and 3 more. Restore these parts"),
    "hook": (hooked("blocks_c.0.mlp"), r"blocks_c\.0\.mlp has hooks"),
    "pre hook": (hooked("stem_conv1", "register_forward_pre_hook"), "stem_conv1 has hooks"),
    "hook of the model": (hooked(""), "the model has hooks"),
    "adapter": (
        changed("blocks_b.0.attn.q", lambda q: Adapter(8, 8)),
        r"blocks_b\.0\.attn\.q is a Adapter, not a plain Linear",
    ),
    "pruned": (changed("_fc", lambda fc: l1_unstructured(fc, "weight", 0.3)), "_fc has hooks"),
    "parametrized": (changed("head", nn.utils.parametrizations.weight_norm), "head is a ParametrizedLinear"),
    "replaced activation": (changed("stem_relu2", lambda act: nn.ReLU()), "stem_relu2 is a ReLU, not a plain GELU"),
    "replaced block": (changed("blocks_d.0", lambda block: nn.Identity()), r"blocks_d\.0 is a Identity"),
    "replaced classifier": (changed("head", lambda head: nn.Sequential(head)), "head is a Sequential"),
    "replaced swish": (changed("_swish", lambda act: nn.ReLU()), "_swish is a ReLU, not a plain SiLU"),
    "removed pool": (changed("_avg_pooling", lambda pool: nn.Identity()), "_avg_pooling is a Identity"),
    "other pool": (setting("_avg_pooling", output_size=2), "_avg_pooling has output_size 2, expected 1"),
    "approximate gelu": (
        setting("blocks_a.0.mlp.proj_act", approximate="tanh"),
        r"blocks_a\.0\.mlp\.proj_act has approximate 'tanh', expected the exact GELU",
    ),
    "dilated": (setting("blocks_a.0.proj", dilation=(2, 2)), r"blocks_a\.0\.proj has dilation \(2, 2\)"),
    "padding mode": (setting("stem_conv2", padding_mode="reflect"), "stem_conv2 has padding_mode reflect"),
    "other stride": (setting("patch_embed_b.proj", stride=(1, 1)), r"patch_embed_b\.proj has stride \(1, 1\)"),
    "overlapping reduction": (setting("blocks_a.0.attn.sr.0", stride=(4, 4)), r"sr\.0 has stride \(4, 4\)"),
    "no statistics": (
        changed("stem_norm1", lambda norm: nn.BatchNorm2d(4, track_running_stats=False)),
        "stem_norm1 has no running statistics, so its result depends on the batch",
    ),
    "norm of more than channels": (
        changed("blocks_a.0.norm1", lambda norm: nn.LayerNorm((64, 8))),
        r"blocks_a\.0\.norm1 has normalized_shape \(64, 8\)",
    ),
    "replaced forward": (
        setting("blocks_a.0.attn", forward=lambda *args, **kwargs: None),
        r"the forward of blocks_a\.0\.attn was replaced",
    ),
    "an additional module": (setting("blocks_a.0", extra=nn.Dropout(0.1)), r"blocks_a\.0\.extra is no part of a CMT"),
}


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_refused(build, message):
    with pytest.raises(ValueError, match=f"^this model cannot be packed: .*{message}"):
        pack(build())


def test_refused_features():
    features = cmt_fast.CMTFeatures(model())
    pack(features)
    features.model.stem_conv3.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="stem_conv3 has hooks"):
        pack(features)
    features = cmt_fast.CMTFeatures(model())
    features.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="it has hooks or a replaced forward"):
        pack(features)


def test_a_model_without_its_head():
    pruned = model()
    pruned.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match=r"the head of this model was removed: pack cmt_fast\.CMTFeatures"):
        pack(pruned)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, lambda m: None])
def test_wrapped_or_foreign(wrap):
    with pytest.raises(TypeError, match=r"expected a cmt_fast\.CMT or CMTFeatures, got .*: of a wrapped model pass"):
        pack(wrap(model()))


def test_no_weights():
    with torch.device("meta"):
        empty = cmt_fast.CMT(**CONFIG)
    with pytest.raises(ValueError, match="on the meta device and holds no weights"):
        pack(empty)


def test_what_changes_nothing_is_accepted():
    """BatchNorms of another class with the same eval mode, a plain 1x1 convolution, another swish of the same kind."""
    plain = model()
    x = torch.randn(1, 3, 32, 32)
    expected = run(pack(plain), x)
    block = plain.blocks_a[0].mlp.conv1
    conv = nn.Conv2d(8, block[0].out_channels, 1)
    conv.load_state_dict(block[0].state_dict())
    block[0] = conv
    assert torch.equal(run(pack(convert_sync_batchnorm(plain)), x), expected)
    assert torch.equal(run(pack(nn.SyncBatchNorm.convert_sync_batchnorm(plain)), x), expected)
