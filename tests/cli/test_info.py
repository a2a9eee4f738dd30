"""``cmt-fast info``: every view, as text and as JSON, and its errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import cmt_fast
from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.cli import info as command
from cmt_fast.cli.app import app
from cmt_fast.cli.console import console
from cmt_fast.models.checkpoint import CheckpointError, save_checkpoint
from cmt_fast.models.complexity import layers, total
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tuned_tables import empty_table
from cmt_fast.testing.results import write_json

SMALL = dict(
    embed_dims=(8, 16, 32, 64), stem_channel=8, fc_dim=48, num_heads=(1, 2, 4, 8), depths=(1, 1, 2, 1), num_classes=10
)


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setattr(console, "_width", 160)


def run(*args: str) -> str:
    """What the command prints; anything it raises."""
    result = CliRunner().invoke(app, ["info", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


# ---- the machine -------------------------------------------------------------------------------------------------------


def test_machine(monkeypatch):
    monkeypatch.setenv("CMT_FAST_TRACEBACK", "[1]")
    text = run()
    assert f"torch         {torch.__version__}" in text
    assert "CMT_FAST_TRACEBACK   [1]" in text
    for name in BACKENDS:
        assert name in text
        for reason in machine_reasons(name):
            assert reason in text
    assert f"Backends (setting: {cmt_fast.get_backend()})" in text


def test_machine_as_json(monkeypatch):
    monkeypatch.setenv("CMT_FAST_TRACEBACK", "0")
    facts = json.loads(run("--json"))
    assert facts["backends"] == {name: machine_reasons(name) for name in BACKENDS}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["cmt-fast"] == cmt_fast.__version__
    assert facts["environment"]["CMT_FAST_TRACEBACK"] == "0"
    assert all(name.startswith("CMT_FAST_") for name in facts["environment"])
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_gib"] > 0


def test_what_is_not_there(monkeypatch):
    def missing(package):
        raise command.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(command.importlib.metadata, "version", missing)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = run()
    assert "timm          not installed" in text
    assert "none visible to PyTorch" in text


def test_gpus(monkeypatch, tmp_path):
    properties = type("Properties", (), dict(name="NVIDIA Test", major=9, minor=0, total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    limits = DeviceLimits(90, 1000, 10, "NVIDIA Test")
    monkeypatch.setattr(command, "device_limits", lambda device: limits)
    monkeypatch.setenv("CMT_FAST_TUNING", str(tmp_path))
    text = run()
    assert "GPU 1" in text
    assert "NVIDIA Test, sm_90, 80.0 GiB" in text
    assert text.count("tuned tiles   none: every kernel follows its rule") == 2
    table = empty_table(tmp_path / "NVIDIA_Test.json", limits)
    table.add("cmt_fast.ops.lpu.triton_kernels:lpu_kernel", "images=1", {"config": None})
    write_json(table.path, table.data)
    assert "NVIDIA_Test.json: 1 launches in use" in run()
    assert [gpu["tuned"] for gpu in json.loads(run("--json"))["machine"]["gpus"]] == [[str(table)]] * 2


# ---- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gmacs", "params"),
    [
        ("cmt_ti", "0.639 GMAC", "9,492,426"),
        ("cmt_xs", "1.547 GMAC", "15,247,208"),
        ("cmt_s", "4.032 GMAC", "26,256,160"),
        ("cmt_b", "9.317 GMAC", "45,715,076"),
    ],
)
def test_model_beside_the_paper(name, gmacs, params):
    text = run(name)
    variant = VARIANTS[name]
    assert gmacs in text
    assert params in text
    assert f"{variant.paper_gmacs} GMAC, {variant.paper_params} M" in text
    assert ("not reproducible" in text) == (name == "cmt_s")
    assert "█" in text


def test_stage_table_of_cmt_s():
    text = run("cmt_s")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert "56 x 56 x 64" in text
    assert rows["total"] == ["total", "4,031.7", "26,256,160"]
    assert rows["pointwise"][1:3] == ["2,569.0", "63.7"]


def test_every_layer():
    text = run("cmt_ti", "--layers")
    for layer in layers("cmt_ti"):
        assert f" {layer.name} " in text
    assert "blocks_c.9.attn.softmax" not in run("cmt_ti")


@pytest.mark.parametrize(("size", "expected"), [("256", (256, 256)), ("96x128", (96, 128)), (" 64X48", (64, 48))])
def test_size(size, expected):
    facts = json.loads(run("cmt_ti", "--img-size", size, "--json"))
    wanted = total("cmt_ti", img_size=expected)
    assert facts["img_size"] == list(expected)
    assert facts["total"] == wanted._asdict()
    assert f"{expected[0]} x {expected[1]} pixels" in run("cmt_ti", "--img-size", size)


def test_model_as_json():
    facts = json.loads(run("cmt_s", "--json"))
    assert sum(layer["macs"] for layer in facts["layers"]) == facts["total"]["macs"] == total("cmt_s").macs
    assert facts["stages"]["c"]["shape"] == [14, 14, 256]
    assert facts["stages"]["head"]["shape"] == [1000]
    assert facts["kinds"]["gelu"]["elements"] == 15_454_208
    assert facts["paper"] == {"img_size": 224, "gmacs": 4.04, "params_million": 25.14, "top1": 83.5}


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoint(tmp_path):
    model = cmt_fast.CMT(img_size=(64, 96), in_chans=1, **SMALL)
    path = save_checkpoint(model, tmp_path / "[x].pth", model_ema=model, class_names=["a"] * 10)
    facts = json.loads(run(str(path), "--json"))
    assert facts["key"] == "model"
    assert facts["img_size"] == [64, 96]
    assert facts["img_size_recorded"]
    assert (facts["in_chans"], facts["num_classes"]) == (1, 10)
    assert facts["params"] == sum(p.numel() for p in model.parameters())
    assert facts["tensors"] == len(model.state_dict())
    assert facts["other_entries"] == {"model_ema": "dict", "class_names": "list"}
    assert facts["model"] == "a CMT with embed_dims (8, 16, 32, 64) and depths (1, 1, 2, 1)"
    text = run(str(path))
    assert "64 x 96" in text
    assert "model_ema (dict), class_names (list)" in text
    assert f"cmt_fast {cmt_fast.__version__}" in text
    assert "[x].pth" in text


def test_checkpoint_of_the_original_layout(tmp_path):
    """A bare or wrapped state dict says nothing of its size: the bias tables do, if the image was square."""
    with torch.device("meta"):
        model = cmt_fast.CMT(img_size=160, **VARIANTS["cmt_ti"].config)
    state = {f"module.{name}": torch.zeros(value.shape) for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "ddp.pth")
    text = run(str(tmp_path / "ddp.pth"))
    assert "cmt_ti" in text
    assert "160 x 160 (from its bias tables)" in text
    assert "epoch (int)" in text
    assert "9,492,426" in text


def test_checkpoint_safetensors(tmp_path):
    model = cmt_fast.CMT(img_size=(64, 96), **dict(SMALL, num_classes=0)).half()
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    text = run(str(tmp_path / "bare.safetensors"))
    assert "not recorded, and not square" in text
    assert "float16" in text
    assert json.loads(run(str(tmp_path / "bare.safetensors"), "--json"))["num_classes"] == 0


def test_checkpoint_of_something_else(tmp_path):
    torch.save({"layer.weight": torch.zeros(3, 2)}, tmp_path / "other.pth")
    text = run(str(tmp_path / "other.pth"))
    assert "no CMT: there is no stem_conv1.weight" in text
    assert "the file itself" in text


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["cmt_l"], ValueError, "unknown model 'cmt_l'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b, or a checkpoint"),
        (["cmt_s", "--img-size", "big"], ValueError, "--img-size must be N or HxW in pixels .* got 'big'"),
        (["cmt_s", "--img-size", "1x2x3"], ValueError, "got '1x2x3'"),
        (["cmt_s", "--img-size", "0"], ValueError, "img_size must be a positive integer"),
        (["cmt_s", "--img-size", "16"], ValueError, "leaves a stage without keys"),
        (["--layers"], ValueError, "--img-size and --layers describe a model, .* got None"),
        (["x.pth", "--img-size", "224"], ValueError, "describe a model, .* got 'x.pth'"),
        (["missing.pth"], FileNotFoundError, "missing.pth"),
        (["."], IsADirectoryError, "expected a checkpoint file, got the folder"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        run(*args)


def test_unreadable_checkpoint(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth is not a checkpoint"):
        run(str(tmp_path / "text.pth"))
