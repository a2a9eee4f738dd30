"""A packed model computes what the model does: exact in float64, within the policy below it, padding always 0."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cmt_fast
from cmt_fast.inference import PackedModel, Padding, pack, run, run_features
from cmt_fast.inference.pack import absorption_pays
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.models.grids import stage_grids
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import in_double, randomise
from cmt_fast.testing.tolerance import assert_within

EXACT = 1e-12  # of the output's scale; what is measured is below 1e-14
GOLDEN = Path(__file__).parents[1] / "golden"
# Nothing is a multiple of 8, every stage has something to pad, heads of 3 and 6.
SMALL = dict(
    img_size=64,
    num_classes=5,
    embed_dims=(6, 12, 12, 28),
    stem_channel=5,
    fc_dim=18,
    num_heads=(1, 2, 2, 4),
    depths=(2, 1, 1, 2),
    mlp_ratios=(3.6,) * 4,
)


def random_model(model=None, **config):
    """In eval mode, with no norm, bias or statistic at its trivial start."""
    model = cmt_fast.CMT(**{**SMALL, **config}) if model is None else model
    with torch.no_grad():
        return randomise(model, torch.Generator().manual_seed(3)).eval()


def image(*size, batch=2, chans=3):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_exact(actual, expected):
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= EXACT, f"error {error:.3g} of the scale"


def steps(packed):
    """(name, step) of every step."""
    yield "stem", packed.stem
    for i, stage in enumerate(packed.stages):
        yield f"stages.{i}.patch_embed", stage.patch_embed
        for j, block in enumerate(stage.blocks):
            for field in dataclasses.fields(block):
                yield f"stages.{i}.blocks.{j}.{field.name}", getattr(block, field.name)
    if packed.head is not None:
        yield "head", packed.head


# ---- exact in float64 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    model = random_model(getattr(cmt_fast, name)(img_size=64, num_classes=10)).double()
    x = image(64, 64, batch=1)
    packed = pack(model, dtype=torch.float64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert_exact(run(packed, x), model.forward_head(features))
        assert_exact(run_features(packed, x)[-1], features)


def test_native_size():
    model = random_model(cmt_fast.cmt_ti()).double()
    x = image(160, 160, batch=1)
    with torch.no_grad():
        assert_exact(run(pack(model, dtype=torch.float64), x), model(x))


@pytest.mark.parametrize("pad", [None, Padding(1, 1, 1)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("absorb", [None, "abcd", ""], ids=["auto", "absorbed", "projected"])
@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_golden(name, pad, absorb):
    """The output of the original code, not ours."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model = cmt_fast.CMT(**config).double().eval()
    model.load_state_dict({key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")})
    packed = pack(model, dtype=torch.float64, pad=pad, absorb=absorb)
    assert_exact(run(packed, tensors["input"]), tensors["eval.logits"])


CONFIGS = {
    "default": {},
    "qk_ratio 2": dict(qk_ratio=2, num_heads=(1, 2, 2, 2)),
    "no qkv bias": dict(qkv_bias=False),
    "qk_scale": dict(qk_scale=0.7),
    "no reduction": dict(sr_ratios=(4, 2, 1, 1)),
    "representation": dict(representation_size=11),
    "no classes": dict(num_classes=0),
    "representation, no classes": dict(num_classes=0, representation_size=11),
    "no pool": dict(num_classes=0, global_pool=""),
    "one channel": dict(in_chans=1),
    "one head each": dict(num_heads=(1, 1, 1, 1), embed_dims=(5, 7, 9, 11)),
    "norm eps": dict(norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-2)),
}


@pytest.mark.parametrize(
    "pad, absorb, base2",
    [
        (Padding(), "abcd", False),
        (Padding(), "", False),
        (Padding(), "bc", True),
        (Padding(1, 1, 1), "abcd", True),
        (Padding(1, 1, 1), "", True),
        (Padding(4, 8, 2), "ad", False),
    ],
    ids=["absorbed", "projected", "mixed-exp2", "unpadded-absorbed-exp2", "unpadded-projected-exp2", "other-mixed"],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations(config, pad, absorb, base2):
    model = random_model(**config).double()
    x = image(64, 64, chans=model.in_chans)
    packed = pack(model, dtype=torch.float64, pad=pad, absorb=absorb, base2=base2)
    with torch.no_grad():
        assert_exact(run(packed, x), model(x))


@pytest.mark.parametrize("size", [(63, 95), (64, 64), (70, 41), (96, 33)])
@pytest.mark.parametrize("absorb", ["abcd", ""], ids=["absorbed", "projected"])
def test_other_sizes(size, absorb):
    model = random_model().double()
    x = image(*size)
    with torch.no_grad():
        assert_exact(run(pack(model, dtype=torch.float64, absorb=absorb, base2=True), x), model(x))


def test_img_size():
    """Packing for a size is set_input_size, then packing."""
    model = random_model(sr_ratios=(4, 2, 1, 1)).double()
    packed = pack(model, dtype=torch.float64, img_size=(96, 70))
    model.set_input_size((96, 70))
    for size in ((96, 70), (64, 64)):
        x = image(*size)
        with torch.no_grad():
            assert_exact(run(packed, x), model(x))


def test_norms_without_parameters():
    model = random_model()
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.LayerNorm):
                setattr(module, name, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
            elif isinstance(norm, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(norm.num_features, affine=False)
                plain.load_state_dict(norm.state_dict(), strict=False)
                setattr(module, name, plain)
    model.double().eval()
    x = image(64, 64)
    with torch.no_grad():
        assert_exact(run(pack(model, dtype=torch.float64), x), model(x))


def test_no_term_is_trivial():
    """Each parameter and statistic of the random model matters, or a wrong fold of it could not be seen.

    k's bias alone does not: softmax ignores it.
    """
    model = random_model(depths=(1, 1, 1, 1)).double()
    x = image(64, 64)

    def packed_logits():
        return run(pack(model, dtype=torch.float64, absorb="ac"), x)

    with torch.no_grad():
        expected = packed_logits()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                kept = tensor.clone()
                tensor.mul_(1.01)
                changed = (packed_logits() - expected).abs().max()
                tensor.copy_(kept)
                assert (changed > 1e-7) != name.endswith("attn.k.bias"), name


# ---- feature maps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,), (2, 0), 2])
@pytest.mark.parametrize("size", [(64, 64), (65, 95)])
def test_features(out_indices, size):
    model = cmt_fast.CMTFeatures(random_model().double(), out_indices)
    packed = pack(model, dtype=torch.float64)
    x = image(*size)
    with torch.no_grad():
        expected = model(x)
        assert_exact(run_features(packed, x)[-1], model.model.forward_features(x))
    maps = run(packed, x)
    assert len(maps) == len(expected)
    for actual, wanted in zip(maps, expected):
        assert_exact(actual, wanted)
        assert actual.is_contiguous(memory_format=torch.channels_last)


# ---- low precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absorb", ["abcd", "", None], ids=["absorbed", "projected", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "widths",
    [{}, dict(embed_dims=(46, 92, 184, 368), stem_channel=16, num_heads=(1, 2, 4, 8))],
    ids=["small", "cmt_ti"],
)
def test_within_the_policy(widths, dtype, absorb):
    model = random_model(**widths).to(dtype)
    x = image(64, 64, batch=8).to(dtype)  # the largest of few errors is luck, on one CPU good and on another bad
    packed = pack(model, dtype=dtype, absorb=absorb)
    with torch.no_grad():
        exact, plain = in_double(model), model
        assert_within("logits", run(packed, x), exact(x.double()), plain(x))
        maps = exact.forward_intermediates(x.double(), intermediates_only=True)
        own_maps = plain.forward_intermediates(x, intermediates_only=True)
    features = pack(cmt_fast.CMTFeatures(model), dtype=dtype, absorb=absorb)
    for i, (actual, wanted, own) in enumerate(zip(run(features, x), maps, own_maps)):
        assert_within(f"map {i}", actual, wanted, own)


def test_dtypes_and_layout():
    packed = pack(random_model(), dtype=torch.bfloat16)
    matrices = 0
    for name, step in steps(packed):
        for field in dataclasses.fields(step):
            tensor = getattr(step, field.name)
            if isinstance(tensor, torch.Tensor):
                is_matrix = "weight" in field.name
                matrices += is_matrix
                assert tensor.dtype == (torch.bfloat16 if is_matrix else torch.float32), f"{name}.{field.name}"
                assert tensor.is_contiguous() and not tensor.requires_grad
                if (name, field.name) != ("stem", "weight1") and field.name != "class_bias":
                    assert tensor.shape[-1] % 8 == 0, f"{name}.{field.name} has rows of {tensor.shape[-1]}"
    assert matrices > 20
    assert packed.dtype == torch.bfloat16 and packed.device == torch.device("cpu")
    for stage in packed.stages:
        assert stage.table.dtype == torch.bfloat16


def test_any_floating_input_and_autocast():
    model = random_model()
    packed = pack(model)
    x = image(64, 64)
    expected = run(packed, x.float())
    assert torch.equal(run(packed, x), run(packed, x.float().double()))
    assert run(packed, x.half()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(packed, x.float()), expected)
        run_features(packed, x)


# ---- padding ---------------------------------------------------------------------------------------------------------------


def test_padding_stays_zero():
    """Exactly 0 in every map between steps, though no step masks it."""
    packed = pack(random_model(), absorb="b")
    widths = {id(packed.stem): SMALL["stem_channel"]}
    for stage, dim in zip(packed.stages, SMALL["embed_dims"]):
        widths[id(stage.patch_embed)] = dim
        for block in stage.blocks:
            widths.update({id(step): dim for step in (block.lpu, block.attention, block.depthwise_project)})
            widths[id(block.expand)] = int(dim * 3.6)
    seen = set()

    def watched(function):
        def call(step, *args):
            result = function(step, *args)
            if id(step) in widths:
                seen.add(id(step))
                for y in result if isinstance(result, tuple) else (result,):
                    width = widths[id(step)]
                    assert y.shape[-1] > width and y[..., :width].count_nonzero() > 0
                    assert y[..., width:].count_nonzero() == 0, type(step).__name__
            return result

        return call

    functions = {name: watched(function) for name, function in vars(TORCH).items() if function is not None}
    run(packed, image(64, 64), dataclasses.replace(TORCH, **functions))
    assert seen == set(widths)


@pytest.mark.parametrize("value", [0, -8, 1.5, None])
def test_padding_arguments(value):
    with pytest.raises(ValueError, match=r"Padding\.hidden must be a positive integer, got"):
        Padding(hidden=value)


# ---- what packing leaves alone ---------------------------------------------------------------------------------------------


def test_model_is_left_alone():
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    packed = pack(model)
    x = image(64, 64).float()
    expected = run(packed, x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        tensor.zero_()
    assert torch.equal(run(packed, x), expected)


def test_train_mode_packs_what_eval_computes():
    model = random_model(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    x = image(64, 64).float()
    expected = run(pack(model), x)
    assert torch.equal(run(pack(model.train()), x), expected) and model.training


def test_a_backend_replaces_steps():
    packed = pack(random_model())
    x = image(64, 64).float()
    called = []

    def expand(step, z):
        called.append(tuple(z.shape))
        return TORCH.expand(step, z)

    result = run(packed, x, dataclasses.replace(TORCH, expand=expand))
    assert torch.equal(result, run(packed, x))
    assert called == [(2, 16, 16, 8)] * 2 + [(2, 8, 8, 16), (2, 4, 4, 16)] + [(2, 2, 2, 32)] * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_absorbed_by_default_in_stages_a_and_b(name):
    with torch.device("meta"):
        model = getattr(cmt_fast, name)(img_size=VARIANTS[name].resolution)
    grids = stage_grids(model.img_size, model.sr_ratios)
    pays = [absorption_pays(getattr(model, f"blocks_{s}")[0].attn, grid) for s, grid in zip("abcd", grids)]
    assert pays == [True, True, False, False]


def test_absorption_by_default():
    packed = pack(random_model(cmt_fast.cmt_ti()))
    assert [stage.blocks[0].kv.bias_dim > 0 for stage in packed.stages] == [True, True, False, False]
    assert [stage.blocks[0].attention.query_weight is None for stage in packed.stages] == [True, True, False, False]
    assert isinstance(packed, PackedModel) and packed.sr_ratios == (8, 4, 2, 1)


def test_exports_for_any_batch():
    """Steps are plain torch ops: torch.export traces them into one graph."""
    packed = pack(random_model(depths=(1, 1, 1, 1)))

    class Module(nn.Module):
        def forward(self, x):
            return run(packed, x)

    x = image(64, 64).float()
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}})
    x = image(64, 64, batch=5).float()
    torch.testing.assert_close(program.module()(x), run(packed, x))


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 64, 64), ValueError, r"shape \(B, 3, H, W\), got \(3, 64, 64\); add the batch dimension"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"shape \(B, 3, H, W\), got \(1, 4, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating point, got torch.uint8"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "on meta but the packed model is on cpu"),
        (torch.zeros(1, 3, 20, 64), ValueError, "leaves a stage without keys"),
        ([1.0], ValueError, "got list"),
    ],
)
def test_input_errors(x, error, message):
    packed = pack(random_model())
    for function in (run, run_features):
        with pytest.raises(error, match=message):
            function(packed, x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dtype=torch.int8), "dtype must be one of .*torch.bfloat16.*, got torch.int8"),
        (dict(absorb="xyz"), "absorb must name stages of a, b, c, d, got 'xyz'"),
        (dict(img_size=(1, 2, 3)), "img_size must be"),
        (dict(img_size=16), "leaves a stage without keys"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(random_model(), **arguments)


def test_overflow_is_an_error():
    model = random_model()
    with torch.no_grad():
        model.blocks_b[0].mlp.conv1[0].weight[0, 0] = 1e6
    pack(model)
    with pytest.raises(ValueError, match=r"not finite in torch.float16 \(largest magnitude \d.*e\+0[56]\)"):
        pack(model, dtype=torch.float16)
