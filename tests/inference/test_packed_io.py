"""One file: every bit comes back; what is no packed model, or not a whole one, is refused with a reason."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import cmt_fast
from cmt_fast.inference import Padding, load_packed, pack, run, save_packed
from cmt_fast.models.checkpoint_io import CheckpointError

CONFIG = dict(
    img_size=32, num_classes=5, embed_dims=(6, 12, 20, 28), stem_channel=5, fc_dim=18, num_heads=(1, 2, 2, 4), depths=(1, 1, 1, 2)
)  # fmt: skip


def model(**config):
    return cmt_fast.CMT(**{**CONFIG, **config}).eval()


def leaves(value, name=""):
    """(name, value) of everything inside nested dataclasses and tuples, in order."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple):
        yield name, len(value)
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    else:
        yield name, value


def assert_same(actual, expected):
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    assert len(pairs) > 100
    for (name, a), (other, b) in pairs:
        assert name == other and type(a) is type(b), name
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
        else:
            assert a == b, name


def content(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        model,
        lambda: model(representation_size=9, num_classes=0),
        lambda: model(sr_ratios=(4, 2, 1, 1), qk_ratio=2, num_heads=(1, 2, 2, 2), in_chans=1),
        lambda: cmt_fast.CMTFeatures(model(), (2, 0)),
    ],
    ids=["model", "no classes", "options", "features"],
)
def test_round_trip(tmp_path, build, dtype):
    packed = pack(build(), dtype=dtype, absorb="b", base2=True)
    path = save_packed(packed, tmp_path / "packed.safetensors")
    assert path == tmp_path / "packed.safetensors" and [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = load_packed(path)
    assert_same(loaded, packed)
    x = torch.randn(1, packed.in_chans, 32, 48)
    for a, b in zip(run(loaded, x), run(packed, x)):
        assert torch.equal(a, b)


def test_loaded_tensors_are_aligned_and_own(tmp_path):
    path = save_packed(pack(model()), tmp_path / "packed.safetensors")
    loaded = load_packed(path)
    for name, tensor in leaves(loaded):
        if isinstance(tensor, torch.Tensor):
            assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0, name
    before = loaded.stem.weight1.clone()
    with open(path, "r+b") as file:  # in place
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded.stem.weight1, before)


def test_a_file_that_was_there_is_replaced_or_left(tmp_path):
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"old")
    packed = pack(model())
    stage = packed.stages[0]
    embed = dataclasses.replace(stage.patch_embed, eps=object())  # which JSON cannot hold
    broken = dataclasses.replace(packed, stages=(dataclasses.replace(stage, patch_embed=embed), *packed.stages[1:]))
    with pytest.raises(TypeError):
        save_packed(broken, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    save_packed(packed, path)
    assert_same(load_packed(path), packed)


def test_a_checkpoint_is_no_packed_model(tmp_path):
    cmt_fast.save_checkpoint(model(), tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no packed model: .* pack\(cmt_fast.load_model\(path\)\)"):
        load_packed(tmp_path / "checkpoint.safetensors")


def test_a_packed_model_is_no_checkpoint(tmp_path):
    save_packed(pack(model()), tmp_path / "packed.safetensors")
    with pytest.raises(CheckpointError):
        cmt_fast.load_checkpoint(model(), tmp_path / "packed.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_files(tmp_path, keep):
    path = save_packed(pack(model()), tmp_path / "packed.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_packed(path)


def test_other_files(tmp_path):
    torch.save(model().state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_packed(tmp_path / "model.pth")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        load_packed(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_packed(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_packed(pack(model()), tmp_path / "no" / "packed.safetensors")


def test_newer_format(tmp_path):
    path = save_packed(pack(model()), tmp_path / "packed.safetensors")
    tensors, metadata = content(path)
    header = json.loads(metadata["cmt_fast.packed"])
    header.update(format=header["format"] + 1, version="9.9", program={"step": "Unknown"})
    save_file(tensors, path, {"cmt_fast.packed": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"written by cmt_fast 9\.9 in format 2, newer than the 1 .*upgrade"):
        load_packed(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: "not json",
        lambda header: "[1]",
        lambda header: json.dumps({"format": 1}),
        lambda header: json.dumps({**header, "format": "one"}),
        lambda header: json.dumps({**header, "program": 3}),
        lambda header: json.dumps({**header, "program": header["program"]["stem"]}),
        lambda header: json.dumps({**header, "program": {**header["program"], "step": "Oven"}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "surplus": 1}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "stages": []}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "img_size": [64, 64]}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "in_chans": 4}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "out_indices": [4], "head": None}}),
        lambda header: json.dumps({**header, "program": {**header["program"], "head": None}}),
    ],
)
def test_damaged_program(tmp_path, damage):
    path = save_packed(pack(model()), tmp_path / "packed.safetensors")
    tensors, metadata = content(path)
    save_file(tensors, path, {"cmt_fast.packed": damage(json.loads(metadata["cmt_fast.packed"]))})
    with pytest.raises(CheckpointError, match="is damaged"):
        load_packed(path)


@pytest.mark.parametrize(
    "config, pad",
    [(dict(representation_size=9), Padding()), (dict(num_classes=0), Padding(1, 1, 1))],
    ids=["padded", "unpadded"],
)
def test_no_tensor_has_another_shape(tmp_path, config, pad):
    """Kernels trust the shapes, and a file can come from anywhere."""
    path = save_packed(pack(model(**config), pad=pad, absorb="ac"), tmp_path / "packed.safetensors")
    tensors, metadata = content(path)
    assert len(tensors) > 100
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            size = tensor.shape[dim]
            for other in (size + 1, size - 1) if size > 1 else (2,):
                changed = torch.zeros([*tensor.shape[:dim], other, *tensor.shape[dim + 1 :]])
                save_file({**tensors, name: changed}, path, metadata)
                with pytest.raises(CheckpointError, match="is damaged, its program does not fit together"):
                    load_packed(path)
    del tensors["stem.weight1"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"is damaged, .*stem\.weight1"):
        load_packed(path)


def test_without_safetensors(tmp_path, monkeypatch):
    packed = pack(model())
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: save_packed(packed, tmp_path / "x"), lambda: load_packed(tmp_path / "x")):
        with pytest.raises(ImportError, match=r"pip install 'cmt-fast\[checkpoints\]'"):
            call()
