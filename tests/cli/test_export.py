"""``cmt-fast export``: from the checkpoint to a file that runs as the printed lines say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmt_fast.cli import export as command
from cmt_fast.inference import load_packed, pack, save_packed
from cmt_fast.models.checkpoint import read_checkpoint, save_checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.tolerance import Comparison

LAYOUT = dict(img_size=32, num_classes=3, embed_dims=(8, 8, 8, 8), stem_channel=4, fc_dim=8, num_heads=(1,) * 4, depths=(1,) * 4, sr_ratios=(2, 1, 1, 1))  # fmt: skip
NAMES = ["ant", "bee", "cat"]
PREPROCESS = {"img_size": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic", "crop_pct": 0.9}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = CMT(**LAYOUT).eval()
    return save_checkpoint(model, tmp_path / "best.pth", class_names=NAMES, preprocess=PREPROCESS)


def printed_lines(out):
    """Run the three lines that the command printed; what they define."""
    defined = {}
    exec(out.partition("Run it:")[2], defined)
    return defined


def documented_lines(file, images):
    """Run what docs/export.md says of a file in the working directory; what it defines."""
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (code,) = [block for block in blocks if f'"{file}"' in block and "aoti" not in block]
    defined = {"images": images}
    exec(code, defined)
    return defined


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_onnx(cmt_fast, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    code, out, err = cmt_fast("export", path, "--checkpoint", checkpoint)
    assert code == 0, err
    assert str(path) in out and "logits" in out and "PyTorch's own" in out
    defined = printed_lines(out)
    assert defined["outputs"][0].shape == (1, 3)
    notes = defined["session"].get_modelmeta().custom_metadata_map
    assert json.loads(notes["class_names"]) == NAMES and json.loads(notes["preprocess"]) == PREPROCESS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "model.onnx"]
    monkeypatch.chdir(tmp_path)
    defined = documented_lines("model.onnx", np.zeros((4, 3, 32, 32), np.float32))
    assert defined["class_names"] == NAMES and defined["logits"].shape == (4, 3)


def test_features_in_bfloat16(cmt_fast, checkpoint, tmp_path):
    path = tmp_path / "model.pt2"
    code, out, err = cmt_fast(
        "export", path, "--checkpoint", checkpoint, "--features", "--dtype", "bfloat16", "--batch-size", 2
    )
    assert code == 0, err
    assert all(f"stage_{i}" in out for i in range(4))
    outputs = printed_lines(out)["outputs"]
    assert [tuple(y.shape) for y in outputs] == [(2, 8, s, s) for s in (8, 4, 2, 1)]
    assert outputs[0].dtype == torch.bfloat16
    notes = {"cmt_fast.json": ""}
    torch.export.load(path, extra_files=notes)
    assert "class_names" not in json.loads(notes["cmt_fast.json"])


def test_packed(cmt_fast, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    code, out, err = cmt_fast("export", path, "--checkpoint", checkpoint, "--img-size", 64)
    assert code == 0, err
    assert printed_lines(out)["outputs"].shape == (1, 3)
    assert load_packed(path).img_size == (64, 64)
    extra = read_checkpoint(path).extra
    assert extra["class_names"] == NAMES and extra["preprocess"] == {**PREPROCESS, "img_size": [64, 64]}
    monkeypatch.chdir(tmp_path)
    defined = documented_lines("model.safetensors", torch.zeros(4, 3, 64, 64))
    assert defined["class_names"] == NAMES and defined["logits"].shape == (4, 3)


def test_from_a_packed_file(cmt_fast, checkpoint, tmp_path, monkeypatch):
    packed, path = tmp_path / "packed.safetensors", tmp_path / "model.pt2"
    assert cmt_fast("export", packed, "--checkpoint", checkpoint)[0] == 0
    code, out, err = cmt_fast("export", path, "--checkpoint", packed, "--no-check")
    assert code == 0 and "not checked: --no-check" in out, err
    monkeypatch.chdir(tmp_path)
    defined = documented_lines("model.pt2", torch.zeros(4, 3, 32, 32))
    assert defined["class_names"] == NAMES and defined["logits"].shape == (4, 3)


def test_a_wrong_file_is_not_kept(cmt_fast, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("as it was")
    wrong = Comparison("logits", 2.0, 0.1, 0.3, False, "worst at (0,)")
    monkeypatch.setattr(command, "check_exported", lambda *args, **options: [wrong])
    code, out, _ = cmt_fast("export", path, "--checkpoint", checkpoint)
    assert code == 1 and "logits FAILED: error 2" in out and "was not written" in out
    assert path.read_text() == "as it was" and sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", path.name]


def test_without_onnxruntime(cmt_fast, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cannot_load", lambda format: "onnxruntime is not installed")
    path = tmp_path / "model.safetensors"
    code, out, _ = cmt_fast("export", path, "--checkpoint", checkpoint)
    assert code == 0 and "not checked: onnxruntime is not installed" in out and path.exists()
    code, _, err = cmt_fast("export", path, "--checkpoint", checkpoint, "--check")
    assert code == 2 and "--check needs to run the file, but onnxruntime is not installed" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.onnx"], "which weights?"),
        (["model.bin", "--checkpoint", "CHECKPOINT"], "does not end in .onnx, .pt2, .safetensors: give --format"),
        (["model.pt2", "-f", "onnx", "--checkpoint", "CHECKPOINT"], "format onnx must end in .onnx, got model.pt2"),
        (["model.pt2", "-f", "tflite", "--checkpoint", "CHECKPOINT"], "--format must be onnx, torch, aoti, packed"),
        (["model.safetensors", "--any-size", "--checkpoint", "CHECKPOINT"], "leave --any-size and --batch-size out"),
        (["model.onnx", "--dtype", "bfloat16", "--checkpoint", "CHECKPOINT"], "no convolution on a CPU"),
        (["gone/model.onnx", "--checkpoint", "CHECKPOINT"], "gone does not exist: create it first"),
        (["model.pt2", "--checkpoint", "PACKED", "--features"], "--features needs a checkpoint"),
        (["model.pt2", "--checkpoint", "PACKED", "--dtype", "bfloat16"], "is packed in float32, but --dtype says bfloat16"),
        (["model.pt2", "--checkpoint", "PACKED", "--img-size", "64"], "is packed for 32 x 32 pixels, but --img-size says 64"),
        (["model.pt2", "--checkpoint", "PACKED", "--model", "cmt_s"], "leave --model out"),
    ],
)  # fmt: skip
def test_mistakes_exit_2(cmt_fast, checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    packed = save_packed(pack(CMT(**LAYOUT)), tmp_path / "packed.safetensors")
    code, _, err = cmt_fast("export", *({"CHECKPOINT": checkpoint, "PACKED": packed}.get(a, a) for a in arguments))
    assert code == 2
    assert message in err.replace("\n", " "), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "packed.safetensors"]
