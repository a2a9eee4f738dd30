"""Loading and saving checkpoints: every source a user has, every mistake a user can make."""

import argparse
import collections
import http.server
import logging
import os
import pathlib
import re
import threading
import urllib.error

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from cmt_fast import (
    CMT,
    CheckpointError,
    CMTFeatures,
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from cmt_fast.models.grids import stage_grids
from cmt_fast.ops.attention.relative_pos import resize_relative_pos

SMALL = dict(
    img_size=64,
    num_classes=7,
    embed_dims=(8, 16, 16, 32),
    stem_channel=4,
    fc_dim=24,
    num_heads=(1, 2, 2, 4),
    mlp_ratios=(2,) * 4,
    depths=(1,) * 4,
)
TABLES = [f"relative_pos_{stage}" for stage in "abcd"]


def small(**changes):
    return CMT(**{**SMALL, **changes}).eval()


def randomised(**changes):
    """A small model whose buffers are not at their initial values either."""
    model = small(**changes)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5 if buffer.is_floating_point() else buffer + len(name))
    return model


def assert_equal(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert torch.equal(value, state[name]), name


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def saved(path, content):
    torch.save(content, path)
    return path


# ---- where the weights are in the file ----------------------------------------------------------------------------------


def test_original_file(tmp_path):
    """The original's training file: weights, averaged weights, optimizer and an argparse.Namespace."""
    model, ema = randomised(), randomised()
    optimizer = torch.optim.AdamW(model.parameters())
    path = saved(
        tmp_path / "checkpoint.pth",
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "model_ema": collections.OrderedDict(ema.state_dict()),
            "args": argparse.Namespace(model="cmt_s", lr=1e-3, device="cuda", opt_betas=None),
        },
    )
    target = small()
    report = load_checkpoint(target, path)
    assert_equal(target, model.state_dict())
    assert (report.resized, report.adapted, report.skipped) == ({}, {}, {})
    assert report.loaded == len(model.state_dict())
    load_checkpoint(target, path, key="model_ema")
    assert_equal(target, ema.state_dict())
    checkpoint = read_checkpoint(path)
    assert checkpoint.key == "model"
    assert checkpoint.extra["args"].lr == 1e-3 and checkpoint.extra["epoch"] == 3


@pytest.mark.parametrize("key", [None, "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_layouts_and_prefixes(tmp_path, key, prefix):
    model, target = randomised(), small()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    load_checkpoint(target, saved(tmp_path / "x.pth", state if key is None else {key: state, "epoch": 1}))
    assert_equal(target, model.state_dict())


def test_model_is_preferred_to_its_average(tmp_path):
    model, ema, target = randomised(), randomised(), small()
    load_checkpoint(target, saved(tmp_path / "x.pth", {"model_ema": ema.state_dict(), "model": model.state_dict()}))
    assert_equal(target, model.state_dict())


def test_old_torch_format(tmp_path):
    model, target = randomised(), small()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "x.pth")
    assert_equal(target, model.state_dict())


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_by_name_and_by_content(tmp_path, name):
    from safetensors.torch import save_file

    model, target = randomised(), small()
    save_file(model.state_dict(), tmp_path / name, metadata={"format": "pt"})
    load_checkpoint(target, str(tmp_path / name))
    assert_equal(target, model.state_dict())


# ---- what it is loaded into ---------------------------------------------------------------------------------------------


def test_wrapped_targets(tmp_path):
    model = randomised()
    path = save_checkpoint(model, tmp_path / "x.pth")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (nn.parallel.DistributedDataParallel, torch.compile):
            target = small()
            wrapped = wrap(target)
            load_checkpoint(wrapped, path)
            assert_equal(target, model.state_dict())
            assert_equal(model, torch.load(save_checkpoint(wrapped, tmp_path / "y.pth"))["model"])
    finally:
        dist.destroy_process_group()


def test_compiled_blocks(tmp_path):
    model, target = randomised(), small()
    target.blocks_a[0] = torch.compile(target.blocks_a[0])
    load_checkpoint(target, save_checkpoint(model, tmp_path / "x.pth"))
    assert_equal(model, torch.load(save_checkpoint(target, tmp_path / "y.pth"))["model"])


def test_feature_extractor_takes_what_it_has(tmp_path):
    model = randomised()
    path = save_checkpoint(model, tmp_path / "x.pth")
    features = CMTFeatures(small(num_classes=0), out_indices=(0, 2)).eval()
    report = load_checkpoint(features, path)
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(features(x), model.forward_intermediates(x, [0, 2], intermediates_only=True), strict=True):
        assert torch.equal(ours, theirs)
    assert {name.partition(".")[0] for name in report.skipped} == {
        "_fc", "_bn", "head", "patch_embed_d", "relative_pos_d", "blocks_d"
    }  # fmt: skip


def test_dtype_is_kept_and_parameters_are_the_same_objects(tmp_path):
    path = save_checkpoint(randomised(), tmp_path / "x.pth")
    target = small().to(torch.bfloat16)
    before = dict(target.named_parameters())
    load_checkpoint(target, path)
    assert all(parameter is before[name] for name, parameter in target.named_parameters())
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}
    assert torch.equal(target._fc.weight, torch.load(path)["model"]["_fc.weight"].bfloat16())


def test_wrong_targets(tmp_path):
    path = save_checkpoint(small(), tmp_path / "x.pth")
    with pytest.raises(TypeError, match=r"expected a cmt_fast\.CMT.*got Linear"):
        load_checkpoint(nn.Linear(2, 2), path)
    with torch.device("meta"):
        model = small()
    with pytest.raises(CheckpointError, match="to_empty"):
        load_checkpoint(model, path)


# ---- what is fitted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(("old", "new"), [(64, (96, 128)), (96, 64), (100, 64), (64, (65, 64))])
def test_bias_is_resized_as_in_a_forward_pass(tmp_path, old, new, metadata):
    """A model at another size computes what the saved model computes for such an image, whose bias is resized on the fly."""
    model, target = randomised(img_size=old), small(img_size=new)
    path = tmp_path / "x.pth"
    save_checkpoint(model, path) if metadata else saved(path, model.state_dict())
    report = load_checkpoint(target, path)
    x = torch.randn(1, 3, *target.img_size)
    assert torch.equal(target(x), model(x))
    same = stage_grids(target.img_size, target.sr_ratios) == stage_grids(model.img_size, model.sr_ratios)
    assert set(report.resized) == (set() if same else set(TABLES))


def test_bias_of_a_size_that_is_not_square(tmp_path):
    model, target = randomised(img_size=(64, 96)), small()
    state = saved(tmp_path / "bare.pth", model.state_dict())
    before = copy_of(target)
    with pytest.raises(CheckpointError, match=r"relative_pos_a \(1, 384, 6\).*source_img_size=\(height, width\)"):
        load_checkpoint(target, state)
    with pytest.raises(CheckpointError, match="pass source_img_size"):  # only the finest table differs
        load_checkpoint(small(img_size=(64, 100)), state)
    with pytest.raises(CheckpointError, match="do not belong to an image of 96 x 96 pixels"):
        load_checkpoint(target, state, source_img_size=96)
    with pytest.raises(CheckpointError, match="do not belong to an image of 8 x 8 pixels"):
        load_checkpoint(target, state, source_img_size=8)
    assert_equal(target, before)
    load_checkpoint(target, state, source_img_size=(64, 96))
    from_argument = copy_of(target)
    path = save_checkpoint(model, tmp_path / "x.pth")
    load_checkpoint(target, path)
    assert_equal(target, from_argument)
    with pytest.raises(CheckpointError, match=r"records img_size \(64, 96\), but source_img_size says \(96, 64\)"):
        load_checkpoint(target, path, source_img_size=(96, 64))


def test_bias_of_the_same_shape_but_another_grid(tmp_path):
    """96 x 64 and 64 x 96 images have tables of one shape that mean different things."""
    model, target = randomised(img_size=(64, 96)), small(img_size=(96, 64))
    report = load_checkpoint(target, save_checkpoint(model, tmp_path / "x.pth"))
    assert set(report.resized) == set(TABLES)
    own, new = (stage_grids(m.img_size, m.sr_ratios)[0] for m in (model, target))
    assert torch.equal(target.relative_pos_a, resize_relative_pos(model.relative_pos_a, *own, *new))


def test_classifier_of_other_classes_is_skipped_with_a_message(tmp_path, caplog):
    model, target = randomised(), small(num_classes=5)
    head = copy_of(target.head)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(target, save_checkpoint(model, tmp_path / "x.pth"))
    assert "head.weight, head.bias: the file has 7 classes, the model 5" in caplog.text
    assert set(report.skipped) == {"head.weight", "head.bias"}
    assert "the file has 7 classes" in str(report)
    assert_equal(target.head, head)
    assert torch.equal(target._fc.weight, model._fc.weight)


@pytest.mark.parametrize(("old", "new"), [(0, 7), (7, 0)])
def test_a_classifier_on_one_side_only(tmp_path, old, new):
    model, target = randomised(num_classes=old), small(num_classes=new)
    report = load_checkpoint(target, save_checkpoint(model, tmp_path / "x.pth"))
    assert set(report.skipped) == {"head.weight", "head.bias"}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(target.forward_features(x), model.forward_features(x))


@pytest.mark.needs("timm")
@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_input_channels_follow_timm(tmp_path, in_chans):
    from timm.models._manipulate import adapt_input_conv

    model, target = randomised(), small(in_chans=in_chans)
    path = save_checkpoint(model, tmp_path / "x.pth")
    before = copy_of(target)
    with pytest.raises(CheckpointError, match=f"in_chans={in_chans}; adapt_in_chans=True"):
        load_checkpoint(target, path)
    assert_equal(target, before)
    report = load_checkpoint(target, path, adapt_in_chans=True)
    assert set(report.adapted) == {"stem_conv1.weight"}
    torch.testing.assert_close(target.stem_conv1.weight.data, adapt_input_conv(in_chans, model.stem_conv1.weight.data))


def test_input_channels_from_one(tmp_path):
    model, target = randomised(in_chans=1), small()
    load_checkpoint(target, save_checkpoint(model, tmp_path / "x.pth"), adapt_in_chans=True)
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(target(x.expand(-1, 3, -1, -1)), model(x), rtol=1e-4, atol=1e-5)


# ---- what does not match ------------------------------------------------------------------------------------------------


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


MISMATCHES = {
    "one missing": (lambda s: without(s, "_bn.weight"), ["1 missing: _bn.weight"]),
    "a table missing": (lambda s: without(s, "relative_pos_a"), ["1 missing: relative_pos_a"]),
    "one unexpected": (lambda s: {**s, "neck.weight": torch.ones(1)}, ["1 unexpected: neck.weight"]),
    "a shape": (
        lambda s: {**s, "_fc.bias": torch.ones(3)},
        [r"1 of other shape or type: _fc.bias \(\(3,\) in the file, \(24,\) in the model\)"],
    ),
    "a dtype": (lambda s: {**s, "_fc.bias": torch.ones(24, dtype=torch.int8)}, [r"_fc.bias \(torch.int8 in the file"]),
    "no tensor": (lambda s: {**s, "_fc.bias": [1.0]}, [r"_fc.bias \(list in the file, a tensor in the model\)"]),
    "other heads": (lambda s: {**s, "relative_pos_a": torch.ones(3, 256, 4)}, [r"relative_pos_a \(\(3, 256, 4\)"]),
    "a classifier of another width": (
        lambda s: {**s, "head.weight": torch.ones(5, 9), "head.bias": torch.ones(5)},
        [r"2 of other shape or type: head.weight \(\(5, 9\) in the file"],
    ),
    "one broken table": (
        lambda s: {**s, "relative_pos_b": torch.ones(s["relative_pos_b"].shape[0], 5, 5)},
        [r"relative_pos_b \(\d, 5, 5\) of .* belongs to no image size.*damaged"],
    ),
    "a broken finest table": (
        lambda s: {**s, "relative_pos_a": torch.ones(s["relative_pos_a"].shape[0], 255, 4)},
        ["relative_pos_a .* belongs to no image size"],
    ),
    "half a classifier": (lambda s: without(s, "head.bias"), ["1 missing: head.bias"]),
    "a smaller model": (
        lambda s: small(depths=(1, 1, 2, 1), embed_dims=(8, 16, 16, 64)).state_dict(),
        [r"\d+ unexpected: blocks_c.1.*", r"embed_dims \(8, 16, 16, 64\) and depths \(1, 1, 2, 1\), the model is a CMT"],
    ),
    "more than ten": (
        lambda s: {n: v for n, v in s.items() if not n.startswith("blocks_b")},
        [r"\d\d missing: (blocks_b[^,]*, ){10}\.\.\. \(\d\d in all\)", "depths"],
    ),
    "another network": (lambda s: nn.Linear(2, 2).state_dict(), ["another network", "2 unexpected: weight, bias"]),
    "both names": (lambda s: {**s, **{f"module.{n}": v for n, v in s.items()}}, ["occur twice"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_lists_the_names_and_changes_nothing(tmp_path, case):
    change, messages = MISMATCHES[case]
    path = saved(tmp_path / "x.pth", change(randomised().state_dict()))
    target = randomised()
    before = copy_of(target)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, path)
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)
    assert_equal(target, before)


def test_mismatch_names_the_published_variants(tmp_path):
    from cmt_fast import cmt_s

    with torch.device("meta"):
        state = cmt_s(img_size=64).state_dict()
    path = saved(tmp_path / "x.pth", {name: torch.empty(v.shape, dtype=v.dtype) for name, v in state.items()})
    with pytest.raises(CheckpointError, match="these are weights of a cmt_s, the model is a CMT with"):
        load_checkpoint(small(), path)


# ---- files that are none ------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.folder),)


def test_refused_objects_are_named_and_not_run(tmp_path):
    Evil.folder = tmp_path / "made"
    path = saved(tmp_path / "x.pth", {"model": small().state_dict(), "args": Evil()})
    with pytest.raises(CheckpointError, match=r"\((posix|nt)\.mkdir\).*Re-save") as caught:
        load_checkpoint(small(), path)
    assert not Evil.folder.exists() and "argparse" not in str(caught.value)
    namespace = argparse.Namespace(output_dir=pathlib.Path("out"))
    for new in (True, False):
        torch.save({"model": {}, "args": namespace}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=r"pathlib\.(_local\.)?PosixPath"):
            load_checkpoint(small(), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello world, this is no checkpoint", "starts with b'hello world"),
        (
            b"<!DOCTYPE html><html>not found</html>",
            "starts with b'<!DOCTYPE html><'; UnpicklingError: Unsupported operand 60",
        ),
        (b"PK\x03\x04 cut", "is not a checkpoint, or it is incomplete"),
        (b"\x80\x02}", "is not a checkpoint, or it is incomplete"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(small(), path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, name, share):
    path = save_checkpoint(small(), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    target = randomised()
    before = copy_of(target)
    with pytest.raises(CheckpointError, match=r"incomplete|not a complete"):
        load_checkpoint(target, path)
    assert_equal(target, before)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pth"):
        load_checkpoint(small(), tmp_path / "nothing.pth")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        load_checkpoint(small(), tmp_path)
    with pytest.raises(ValueError, match=r"a path or an http\(s\) URL, got 's3://"):
        load_checkpoint(small(), "s3://bucket/x.pth")
    with pytest.raises(TypeError, match=r"got a OrderedDict, not a file: .*model\.load_state_dict"):
        load_checkpoint(small(), small().state_dict())


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (torch.ones(3), None, "holds a Tensor, expected a state dict"),
        ({}, None, "it holds: nothing"),
        ({"epoch": 3}, None, "no weights under model, state_dict, .* it holds: 'epoch'"),
        ({"net": {"a": torch.ones(1)}}, None, "choose one with key= of: net"),
        ({"model": {"a": torch.ones(1)}}, "model_ema", "no entry 'model_ema'; entries with weights: model"),
        ({"model": {"a": torch.ones(1)}, "model_ema": None}, "model_ema", r"is None \(it was saved without\)"),
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, "epoch", "is a int, not a state dict"),
    ],
)
def test_files_without_weights(tmp_path, content, key, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(small(), saved(tmp_path / "x.pth", content), key=key)


# ---- downloads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's hub directory, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: its folder, its address, and the paths asked for."""
    folder, requests = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, format, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()


def test_url_is_downloaded_once(hub, server):
    folder, address, requests = server
    model, target = randomised(), small()
    save_checkpoint(model, folder / "x.pth")
    for _ in range(2):
        load_checkpoint(target, f"{address}/x.pth?raw=1", progress=False)
        assert_equal(target, model.state_dict())
    assert requests == ["/x.pth?raw=1"]
    assert os.listdir(hub) == ["x.pth"]


def test_failed_download_says_what_to_do(hub, server):
    url = f"{server[1]}/nothing.pth"
    with pytest.raises(CheckpointError, match=f"cannot download {url} .*404.*put the file at {hub / 'nothing.pth'} or"):
        load_checkpoint(small(), url, progress=False)
    assert os.listdir(hub) == []
    with pytest.raises(ValueError, match="must end in a file name"):
        load_checkpoint(small(), server[1] + "/")


def test_offline(hub, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(CheckpointError, match=r"name resolution.*offline, download that URL elsewhere"):
        load_checkpoint(small(), "https://example.invalid/x.pth")


# ---- saving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_save_and_rebuild(tmp_path, name):
    model = randomised(img_size=(64, 96), in_chans=1)
    path = save_checkpoint(model, tmp_path / name, class_names=["cat", "dog"], epoch=3)
    rebuilt = load_model(path)
    assert_equal(rebuilt, model.state_dict())
    assert not rebuilt.training and rebuilt.config == model.config
    checkpoint = read_checkpoint(path)
    assert checkpoint.extra == {"class_names": ["cat", "dog"], "epoch": 3}
    assert checkpoint.img_size == (64, 96)
    x = torch.randn(1, 1, 64, 96)
    assert torch.equal(rebuilt(x), model(x))
    assert os.listdir(tmp_path) == [name]


def test_save_is_plain_for_every_reader(tmp_path):
    """The file loads with torch alone, and into the original with ``strict=True``: it has its names."""
    model, ema = randomised(), randomised()
    content = torch.load(save_checkpoint(model, tmp_path / "x.pth", model_ema=ema), weights_only=True)
    assert list(content) == ["model", "cmt_fast", "model_ema"]
    assert list(content["model"]) == list(model.state_dict())
    small().load_state_dict(content["model"], strict=True)
    target = small()
    load_checkpoint(target, tmp_path / "x.pth", key="model_ema")
    assert_equal(target, ema.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        dict(mlp_ratios=(3.6, 3.6, 2.5, 1.3), stem_channel=6, embed_dims=(46, 92, 184, 368), num_heads=(1, 2, 4, 8)),
        dict(qk_ratio=2, qk_scale=0.3, qkv_bias=False, representation_size=12),
        dict(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.25, dp=0.4, depths=(2, 1, 3, 1)),
        dict(num_classes=0, global_pool="", decay_relative_pos=True, sr_ratios=(4, 2, 2, 1)),
    ],
)
def test_config_rebuilds_the_model(changes):
    model = small(**changes)
    rebuilt = CMT(**model.config)
    assert str(rebuilt) == str(model.train())
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert rebuilt.config == model.config
    assert [b.attn.scale for b in rebuilt.blocks_c] == [b.attn.scale for b in model.blocks_c]


def test_config_speaks_as_the_user_does():
    config = small(mlp_ratios=(3.6,) * 4, embed_dims=(46, 92, 184, 368), num_heads=(1, 2, 4, 8)).config
    assert config["mlp_ratios"] == [3.6] * 4 and config["qk_scale"] is None


def test_load_model_keeps_the_dtype(tmp_path):
    rebuilt = load_model(save_checkpoint(small().half(), tmp_path / "x.pth"))
    assert {p.dtype for p in rebuilt.parameters()} == {torch.float16}


def test_load_model_needs_a_complete_description(tmp_path, caplog):
    bare = saved(tmp_path / "bare.pth", {"model": small().state_dict()})
    with pytest.raises(CheckpointError, match="does not record its model's arguments"):
        load_model(bare)
    path = save_checkpoint(CMTFeatures(small(), (0, 1)), tmp_path / "x.pth")
    assert "stages c, d were removed" in caplog.text
    with pytest.raises(CheckpointError, match="does not record its model's arguments"):
        load_model(path)
    load_checkpoint(CMTFeatures(small(), (0, 1)), path)
    save_checkpoint(small(norm_layer=nn.LayerNorm), tmp_path / "x.pth")
    assert "the blocks' norms are not the default" in caplog.text


def test_load_model_of_a_later_version(tmp_path):
    path = save_checkpoint(small(), tmp_path / "x.pth")
    content = torch.load(path)
    content["cmt_fast"]["config"]["new_option"] = 1
    with pytest.raises(CheckpointError, match=r"written by version .*new_option"):
        load_model(saved(path, content))
    content = torch.load(save_checkpoint(small(num_classes=5), path))
    content["cmt_fast"]["config"]["num_classes"] = 7
    with pytest.raises(CheckpointError, match="is not complete"):
        load_model(saved(path, content))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("failing", ["write", "replace"])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, name, failing):
    path = save_checkpoint(small(), tmp_path / name)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync" if failing == "write" else "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small(), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [name]


def test_save_follows_links_and_the_umask(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.pth"
    link.symlink_to(tmp_path / "real" / "x.pth")
    written = save_checkpoint(small(), link)
    assert link.is_symlink() and written == (tmp_path / "real" / "x.pth").resolve()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert written.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (dict(best=np.float64(0.5)), r"best is a numpy\.float64"),
        (dict(out=pathlib.Path("x")), r"out is a pathlib\.\S*PosixPath"),
        (dict(args=argparse.Namespace(lr=1)), r"args is a argparse\.Namespace"),
        (dict(state={"groups": [{"lr": np.float32(1)}]}), r"state\['groups'\]\[0\]\['lr'\] is a numpy\.float32"),
        (dict(state={pathlib.Path("x"): 1}), "a key of state"),
        (dict(transform=torch.nn.Identity()), r"transform is a torch\.nn\.\S*Identity"),
        (dict(names=collections.defaultdict(list)), r"names is a collections\.defaultdict"),
    ],
)
def test_extra_must_load_safely(tmp_path, extra, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(small(), tmp_path / "x.pth", **extra)
    assert os.listdir(tmp_path) == []


def test_extra_that_loads_safely(tmp_path):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    extra = dict(
        optimizer=optimizer.state_dict(),
        rng=torch.get_rng_state(),
        kinds=[None, True, 1, 1.5, 1j, "x", b"x", (1, 2), {1, 2}],
        torch=[torch.Size([1]), torch.float16, torch.device("cpu"), nn.Parameter(torch.ones(1))],
        counts=collections.Counter("aab"),
        ordered=collections.OrderedDict(a=1),
    )
    loaded = read_checkpoint(save_checkpoint(model, tmp_path / "x.pth", **extra)).extra
    assert loaded["kinds"] == extra["kinds"] and loaded["torch"] == extra["torch"]
    torch.optim.AdamW(model.parameters()).load_state_dict(loaded["optimizer"])


def test_wrong_saves(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist: create it first"):
        save_checkpoint(small(), tmp_path / "nowhere" / "x.pth")
    with pytest.raises(IsADirectoryError, match="expected a file to write"):
        save_checkpoint(small(), tmp_path)
    with pytest.raises(ValueError, match="'cmt_fast' is reserved"):
        save_checkpoint(small(), tmp_path / "x.pth", cmt_fast={})
    with pytest.raises(TypeError, match=r"expected a cmt_fast\.CMT"):
        save_checkpoint(nn.Linear(1, 1), tmp_path / "x.pth")
    with pytest.raises(TypeError, match="model_ema must be a model or a state dict, got dict"):
        save_checkpoint(small(), tmp_path / "x.pth", model_ema={})
    for ema, message in (({"a": torch.ones(1)}, "it lacks _bn.bias"), ({**small().state_dict(), "a": torch.ones(1)}, "it also holds a")):  # fmt: skip
        with pytest.raises(ValueError, match=f"model_ema is not of this model: {message}"):
            save_checkpoint(small(), tmp_path / "x.pth", model_ema=ema)
    with pytest.raises(ValueError, match="save model_ema to a file of its own"):
        save_checkpoint(small(), tmp_path / "x.safetensors", model_ema=small())
    with pytest.raises(TypeError, match=r"weights and JSON.*\.pth"):
        save_checkpoint(small(), tmp_path / "x.safetensors", mean=torch.ones(3))
    assert os.listdir(tmp_path) == []
