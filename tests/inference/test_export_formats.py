"""Exported files compute what the packed model does, by the tolerance policy, and say what they are."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import cmt_fast
from cmt_fast.inference import pack, run
from cmt_fast.inference.export import (
    ExportablePacked,
    export_aoti,
    export_onnx,
    export_torch,
    metadata,
    size_step,
    trace,
)
from cmt_fast.testing.exported import check_exported
from cmt_fast.testing.inputs import randomise

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = dict(img_size=32, num_classes=5, embed_dims=(6, 12, 20, 28), stem_channel=5, fc_dim=18, num_heads=(1, 2, 2, 4), depths=(1, 1, 1, 1), sr_ratios=(2, 1, 1, 1))  # fmt: skip

needs_onnx = pytest.mark.needs("onnx", "onnxscript", "onnxruntime")


def model(**config):
    with torch.no_grad():
        return randomise(cmt_fast.CMT(**{**SMALL, **config}), torch.Generator().manual_seed(3)).eval()


def features(*out_indices):
    return cmt_fast.CMTFeatures(model(), out_indices)


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        result = cmt_fast.CMT(**json.loads(file.metadata()["config"])).double()
        state = [key for key in file.keys() if key.startswith("state.")]  # noqa: SIM118 (not a dict)
        result.load_state_dict({key.removeprefix("state."): file.get_tensor(key) for key in state})
    return result.eval()


def assert_right(packed, path, format, **options):
    comparisons = check_exported(packed, path, format, **options)
    assert len(comparisons) == max(1, len(packed.out_indices))
    for comparison in comparisons:
        assert comparison.passed, comparison


# ---- the module -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [model, lambda: features(0, 2)], ids=["logits", "features"])
def test_module_is_the_program(build):
    packed = pack(build())
    module, x = ExportablePacked(packed), torch.randn(2, 3, 32, 32)
    assert not module.training and not list(module.parameters())
    names = dict(module.named_buffers())
    assert names["stages.0.blocks.0.expand.weight"] is packed.stages[0].blocks[0].expand.weight
    torch.testing.assert_close(module(x), run(packed, x), rtol=0, atol=0)
    changed = ExportablePacked(packed).double()
    assert changed.packed.dtype == torch.float64 and packed.dtype == torch.float32


def test_output_names():
    assert ExportablePacked(pack(model())).output_names == ["logits"]
    assert ExportablePacked(pack(model(num_classes=0))).output_names == ["features"]
    assert ExportablePacked(pack(features(2, 0))).output_names == ["stage_2", "stage_0"]


def test_size_step():
    """A multiple of 4, 8, 16, 32 and of 4 k of the first stage."""
    assert size_step(pack(model())) == 32
    assert size_step(pack(model(sr_ratios=(3, 1, 1, 1)))) == 96
    assert size_step(pack(features(0))) == 8


# ---- ONNX -------------------------------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_onnx_of_the_golden_models(tmp_path, name):
    """For batches of 1 and more."""
    import onnxruntime

    packed = pack(golden(name))
    path = export_onnx(packed, tmp_path / "model.onnx", class_names=["á", "b"], note="as it is")
    assert_right(packed, path, "onnx")
    session = onnxruntime.InferenceSession(path)
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 64, 64])
    assert (output.name, output.shape[0]) == ("logits", "batch")
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["class_names"]) == ["á", "b"] and notes["note"] == "as it is"
    assert json.loads(notes["img_size"]) == [64, 64] and notes["dtype"] == "float32"
    assert notes["cmt_fast"] == cmt_fast.__version__ and notes["size_step"] == "null"
    assert list(tmp_path.iterdir()) == [path]  # weights inside, nothing left over


@needs_onnx
def test_onnx_of_features_of_any_size(tmp_path):
    import onnxruntime

    packed = pack(features(0, 2))
    path = export_onnx(packed, tmp_path / "model.onnx", any_size=True)
    assert_right(packed, path, "onnx", any_size=True)
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["stage_0", "stage_2"]
    assert session.get_modelmeta().custom_metadata_map["size_step"] == "16"


@needs_onnx
def test_onnx_of_one_batch_size_in_float16(tmp_path):
    import onnxruntime

    packed = pack(features(0), dtype=torch.float16)
    path = export_onnx(packed, tmp_path / "model.onnx", batch_size=1)
    assert_right(packed, path, "onnx", batch_size=1)
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape == [1, 3, 32, 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_onnx_refuses_other_dtypes(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"torch.float32 or torch.float16, got {dtype}.*dtype=torch.float32"):
        export_onnx(pack(features(0), dtype=dtype), tmp_path / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages(tmp_path, monkeypatch, package):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"onnx and onnxscript: pip install 'cmt-fast\[export\]'"):
        export_onnx(pack(features(0)), tmp_path / "model.onnx")


# ---- torch.export and AOTInductor -------------------------------------------------------------------------------------------


def test_torch_export(tmp_path):
    """Under autocast too, which the program, having its own dtypes, ignores."""
    packed = pack(golden("odd"), dtype=torch.bfloat16)
    path = export_torch(packed, tmp_path / "model.pt2", class_names=["a"])
    assert_right(packed, path, "torch")
    notes = {"cmt_fast.json": ""}
    program = torch.export.load(path, extra_files=notes)
    assert json.loads(notes["cmt_fast.json"]) == metadata(packed, class_names=["a"])
    assert "stages.3.table" in program.state_dict
    x = torch.randn(2, 3, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(program.module()(x), run(packed, x))


def test_torch_export_of_any_size(tmp_path):
    packed = pack(features(1))
    path = export_torch(packed, tmp_path / "model.pt2", any_size=True)
    assert_right(packed, path, "torch", any_size=True)
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(path).module()(torch.zeros(1, 3, 65, 64))


def test_no_data_decides():
    """The traced graph is plain torch ops: no operator of ours, no copy to the host."""
    targets = {str(node.target) for node in trace(pack(features(0))).graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if "cmt_fast" in name or "item" in name.split(".")]


@pytest.mark.slow
def test_aoti(tmp_path):
    packed = pack(features(0))
    path = export_aoti(packed, tmp_path / "model.pt2", class_names=["a"])
    assert_right(packed, path, "aoti")
    assert json.loads(torch._inductor.aoti_load_package(str(path)).get_metadata()["class_names"]) == ["a"]


def test_aoti_without_a_compiler(tmp_path):
    without = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)})  # which puts back what was there
    with without, pytest.raises(RuntimeError, match=r"AOTInductor needs a C\+\+ compiler: install g\+\+ or clang"):
        export_aoti(pack(features(0)), tmp_path / "model.pt2")


def test_aoti_file_name(tmp_path):
    with pytest.raises(ValueError, match=r"names that end in .pt2, got .*model.so"):
        export_aoti(pack(features(0)), tmp_path / "model.so")


# ---- checks -----------------------------------------------------------------------------------------------------------------


def test_the_check_sees_a_wrong_file(tmp_path):
    """One bias that is off by a thousandth."""
    made = features(0)
    path = export_torch(pack(made), tmp_path / "model.pt2")
    with torch.no_grad():
        made.model.blocks_a[0].proj.bias[0] += 1e-3
    (comparison,) = check_exported(pack(made), path, "torch")
    assert not comparison.passed and comparison.error > 1e-4


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_wrong_batch_size(tmp_path, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a positive integer, or None for any"):
        export_torch(pack(features(0)), tmp_path / "model.pt2", batch_size=batch_size)


def test_a_failure_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("as it was")
    with pytest.raises(TypeError, match="not JSON serializable"):
        export_torch(pack(features(0)), path, class_names=torch.zeros(1))
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]
