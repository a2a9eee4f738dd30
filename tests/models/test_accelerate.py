"""Accelerating an instance of the original class, here a look-alike with its attributes, in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmt_fast import CMT, accelerate

DIMS, HEADS, REDUCTIONS, HIDDEN, DEPTHS = (8, 16, 16, 32), (1, 2, 2, 4), (8, 4, 2, 1), (28, 57, 57, 115), (1, 2, 1, 2)


def to_map(x, h, w):
    return x.transpose(1, 2).unflatten(2, (h, w))


def to_tokens(x):
    return x.flatten(2).transpose(1, 2)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep


class Attention(nn.Module):
    def __init__(self, dim, heads, k, qk_ratio):
        super().__init__()
        self.num_heads, self.sr_ratio, self.qk_dim = heads, k, dim // qk_ratio
        self.scale = (dim // heads) ** -0.5
        self.q, self.k = nn.Linear(dim, self.qk_dim), nn.Linear(dim, self.qk_dim)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.2)
        if k > 1:
            self.sr = nn.Sequential(nn.Conv2d(dim, dim, k, k, groups=dim), nn.BatchNorm2d(dim))

    def forward(self, x, h, w, bias):
        y = to_tokens(self.sr(to_map(x, h, w))) if self.sr_ratio > 1 else x
        q, k, v = (
            layer(z).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        weights = self.attn_drop((q @ k.mT * self.scale + bias).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.proj_act, self.proj_bn = nn.GELU(), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))
        self.drop = nn.Dropout(0.2)

    def forward(self, x, h, w):
        x = self.drop(self.conv1(to_map(x, h, w)))
        x = self.proj_bn(self.proj_act(self.proj(x) + x))
        return self.drop(to_tokens(self.conv2(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, k, hidden, drop_path, qk_ratio):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, k, qk_ratio), Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, h, w, bias):
        y = to_map(x, h, w)
        x = to_tokens(self.proj(y) + y)
        x = x + self.drop_path(self.attn(self.norm1(x), h, w, bias))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class PatchEmbed(nn.Module):
    def __init__(self, img_size, in_chans, dim):
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj, self.norm = nn.Conv2d(in_chans, dim, 2, 2), nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(to_tokens(x)), x.shape[2:]


class OriginalCMT(nn.Module):
    def __init__(self, num_classes=7, qk_ratio=1):
        super().__init__()
        for i, channels in enumerate((3, 4, 4), 1):
            setattr(self, f"stem_conv{i}", nn.Conv2d(channels, 4, 3, stride=2 if i == 1 else 1, padding=1))
            setattr(self, f"stem_relu{i}", nn.GELU())
            setattr(self, f"stem_norm{i}", nn.BatchNorm2d(4))
        rates = iter(torch.linspace(0, 0.2, sum(DEPTHS)).tolist())
        for i, stage in enumerate("abcd"):
            side = 32 // 2**i
            setattr(self, f"patch_embed_{stage}", PatchEmbed(side, (4, *DIMS)[i], DIMS[i]))
            table = torch.randn(HEADS[i], (side // 2) ** 2, (side // 2 // REDUCTIONS[i]) ** 2)
            setattr(self, f"relative_pos_{stage}", nn.Parameter(table))
            blocks = [
                Block(DIMS[i], HEADS[i], REDUCTIONS[i], HIDDEN[i], next(rates), qk_ratio) for _ in range(DEPTHS[i])
            ]
            setattr(self, f"blocks_{stage}", nn.ModuleList(blocks))
        self._fc, self._bn, self._swish = nn.Conv2d(DIMS[-1], 24, 1), nn.BatchNorm2d(24), Swish()
        self._avg_pooling, self._drop, self.pre_logits = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.1), nn.Identity()
        self.head = nn.Linear(24, num_classes) if num_classes else nn.Identity()
        self.default_cfg = {"url": ""}

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}

    def forward(self, x):
        for i in (1, 2, 3):
            x = getattr(self, f"stem_conv{i}")(x)
            x = getattr(self, f"stem_norm{i}")(getattr(self, f"stem_relu{i}")(x))
        for stage in "abcd":
            x, (h, w) = getattr(self, f"patch_embed_{stage}")(x)
            for block in getattr(self, f"blocks_{stage}"):
                x = block(x, h, w, getattr(self, f"relative_pos_{stage}"))
            x = to_map(x, h, w)
        x = self._avg_pooling(self._swish(self._bn(self._fc(x)))).flatten(1)
        return self.head(self.pre_logits(self._drop(x)))


OriginalCMT.__name__ = "CMT"


def original(**kwargs):
    torch.manual_seed(0)
    model = OriginalCMT(**kwargs)
    for parameter in model.parameters():  # no value at its initial one: a lost tensor must show
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    for buffer in model.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5 if buffer.is_floating_point() else buffer + 3)
    return model


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"qk_ratio": 2}])
def test_computes_the_same_with_the_same_tensors(kwargs):
    theirs = original(**kwargs).double().eval()
    ours = accelerate(theirs)
    assert type(ours) is CMT
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        assert getattr(ours.get_submodule(parent), leaf) is tensor, name
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert ours.img_size == (64, 64) and ours.default_cfg is theirs.default_cfg


def test_an_optimizer_made_before_keeps_working():
    theirs = original()
    twin = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, twin)]
    ours = accelerate(theirs)
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    for model, optimizer in zip((ours, twin), optimizers, strict=True):
        torch.manual_seed(1)  # dropout and stochastic depth draw in the same order
        F.cross_entropy(model.train()(x), target).backward()
        optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert theirs.state_dict()[name].data_ptr() == ours.state_dict()[name].data_ptr()


def test_settings_are_taken_over_module_by_module():
    theirs = original()
    theirs.eval()
    theirs.blocks_b.train()
    theirs.stem_conv1.requires_grad_(False)
    theirs.blocks_b[1].norm2.eps = 1e-3
    theirs.blocks_b[1].mlp.proj_bn.momentum = 0.5
    theirs.blocks_b[1].mlp.drop.p = 0.7
    theirs.blocks_b[1].attn.scale = 0.9
    theirs.blocks_b[1].drop_path = DropPath(0.6)
    theirs.half()
    ours = accelerate(theirs)
    block = ours.blocks_b[1]
    assert (block.norm2.eps, block.mlp.proj_bn.momentum, block.mlp.drop.p) == (1e-3, 0.5, 0.7)
    assert (block.attn.scale, block.drop_path.drop_prob, ours.blocks_b[0].norm2.eps) == (0.9, 0.6, 1e-6)
    assert [block.drop_path.drop_prob for block in ours.blocks_d] == pytest.approx([0.16, 0.2])
    modes = {name: module.training for name, module in theirs.named_modules()}
    assert modes == {name: module.training for name, module in ours.named_modules()} and len(set(modes.values())) == 2
    assert not ours.stem_conv1.weight.requires_grad and ours.stem_conv2.weight.requires_grad
    assert {p.dtype for p in ours.parameters()} == {torch.float16}


def test_weight_decay_stays_as_the_original_asks():
    theirs = original()
    assert accelerate(theirs).no_weight_decay() == set()
    theirs.no_weight_decay = lambda: {f"relative_pos_{stage}" for stage in "abcd"}
    assert accelerate(theirs).no_weight_decay() == theirs.no_weight_decay()


def test_the_random_state_is_left_alone():
    theirs, before = original(), torch.get_rng_state()
    accelerate(theirs)
    assert torch.equal(torch.get_rng_state(), before)


def test_ours_is_returned_as_it_is():
    ours = accelerate(original())
    assert accelerate(ours) is ours


def set_at(path, value):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, value)

    return change


class Adapter(nn.Linear):
    pass


class Subclass(Mlp):
    pass


ALTERED = {
    "a hook": (lambda m: m.blocks_a[0].mlp.register_forward_hook(print), r"blocks_a\.0\.mlp has hooks"),
    "a hook on the model": (lambda m: m.register_forward_pre_hook(print), "the model has hooks"),
    "a replaced forward": (set_at("blocks_a.0.attn.forward", print), r"forward of blocks_a\.0\.attn was replaced"),
    "an adapter": (set_at("blocks_c.0.attn.q", Adapter(16, 16)), r"blocks_c\.0\.attn\.q is a Adapter.* Linear"),
    "a parametrization": (
        lambda m: nn.utils.parametrizations.weight_norm(m.blocks_c[0].attn.q),
        r"blocks_c\.0\.attn\.q is a ParametrizedLinear",
    ),
    "another activation": (
        set_at("blocks_a.0.mlp.proj_act", nn.ReLU()),
        r"blocks_a\.0\.mlp\.proj_act is a ReLU.* GELU",
    ),
    "an approximate GELU": (
        set_at("stem_relu1", nn.GELU("tanh")),
        r"stem_relu1 is GELU\(approximate='tanh'\), expected",
    ),
    "another norm": (set_at("blocks_b.1.norm1", nn.RMSNorm(16)), r"blocks_b\.1\.norm1 is a RMSNorm.* LayerNorm"),
    "a norm without statistics": (
        set_at("_bn", nn.BatchNorm2d(24, track_running_stats=False)),
        r"_bn has the buffers|_bn is BatchNorm2d\(.*track_running_stats=False",
    ),
    "synchronised norms": (
        set_at("_bn", nn.SyncBatchNorm(24)),
        "_bn is a SyncBatchNorm, expected the original's BatchNorm2d: accelerate the model first, then convert",
    ),
    "another swish": (set_at("_swish", nn.ReLU()), "_swish is a ReLU, which does not compute swish"),
    "a drop path that does not rescale": (
        set_at("blocks_d.1.drop_path.scale_by_keep", False),
        r"blocks_d\.1\.drop_path is a DropPath, expected",
    ),
    "other heads in one block": (set_at("blocks_d.1.attn.num_heads", 2), r"blocks_d\.1\.attn has num_heads 2"),
    "another width in one block": (
        set_at("blocks_d.1.mlp", Mlp(32, 64)),
        r"blocks_d\.1\.mlp\.conv1\.0 is Conv2d\(32, 64|blocks_d\.1\.mlp\.conv1\.0 has the parameters",
    ),
    "a bias removed": (set_at("blocks_d.1.attn.k", nn.Linear(32, 32, bias=False)), r"blocks_d\.1\.attn\.k"),
    "another padding": (
        lambda m: setattr(m.blocks_a[0].proj, "padding_mode", "circular"),
        r"blocks_a\.0\.proj is Conv2d",
    ),
    "a module more": (set_at("blocks_a.0.ls", nn.Identity()), r"blocks_a\.0 is not built as the original's: .* ls"),
    "a parameter more": (set_at("pos_embed", nn.Parameter(torch.ones(1))), "the model has the parameters"),
    "a module less": (lambda m: delattr(m.blocks_a[0], "norm2"), "norm2"),
    "a table of another size": (
        set_at("relative_pos_a", nn.Parameter(torch.ones(1, 4, 4))),
        r"the model has the parameters .*relative_pos_a': \(1, 4, 4\)",
    ),
    "a classifier of two layers": (set_at("head", nn.Sequential(nn.Linear(24, 7))), "head is a Sequential"),
    "a subclass": (set_at("blocks_a.0.mlp", Subclass(8, 28)), r"blocks_a\.0\.mlp is of class Subclass.*strict=False"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_cannot_be_represented_is_named(case):
    change, message = ALTERED[case]
    model = original()
    change(model)
    with pytest.raises((ValueError, TypeError), match=message):
        accelerate(model)


def test_classes_of_other_names_on_request():
    model = original()
    model.blocks_a[0].mlp = Subclass(8, 28)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(accelerate(model, strict=False)(x), model(x), rtol=1e-4, atol=1e-5)


def test_other_models():
    with pytest.raises(TypeError, match=r"an instance of the original CMT class, got Linear .*model\.module"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got DataParallel"):
        accelerate(nn.DataParallel(original()))
