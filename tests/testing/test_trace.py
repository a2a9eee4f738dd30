"""The kernels of a packed model, counted without a GPU: how many, and how much they move, beside the plan."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import cmt_fast
from cmt_fast.inference import pack, run
from cmt_fast.ops._triton import launch
from cmt_fast.testing.benchmark import make_model
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import SMALL_MODELS
from cmt_fast.testing.trace import Kernel, trace

pytestmark = pytest.mark.needs("triton")
ROOT = Path(__file__).parents[2]

#: Of CMT-S at 224, batch 256, in 16 bits: GB that all blocks of a stage move, by the performance plan ("fused L1", by stage and
#: kernel); the stem with the first patch embedding. In all 15.62 GB in 132 kernels.
PLAN_GB = {
    "lpu": dict(a=0.621, b=0.318, c=0.925, d=0.116),
    "kv": dict(a=0.014, b=0.029, c=0.312, d=0.119),
    "attention": dict(a=0.627, b=0.328, c=1.033, d=0.157),
    "expand": dict(a=1.542, b=0.771, c=2.064, d=0.199),
    "depthwise_project": dict(a=1.850, b=0.925, c=2.475, d=0.238),
    "patch_embed": dict(b=0.154, c=0.077, d=0.040),
    "stem_embed": dict(a=0.668),
    "head": dict(d=0.019),
}
BLOCKS = dict(a=3, b=3, c=16, d=3)

#: How many there are. In stage d attention is three a block.
KERNELS = dict(stem_embed=3, patch_embed=3, lpu=25, kv=25, attention=31, expand=25, depthwise_project=25, head=2)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return trace(make_model("cmt_s", 224, precision("float32")), 256, torch.bfloat16)


def of(kernels: list[Kernel], step: str) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.step == step]


def gigabytes(kernels: list[Kernel]) -> float:
    return sum(kernel.bytes for kernel in kernels) / 1e9


def test_kernels_of_each_step(kernels):
    """Nothing is between the steps, and nothing between the kernels of one."""
    assert [kernel.step for kernel in kernels if kernel.step not in KERNELS] == []
    for step in KERNELS:
        assert len(of(kernels, step)) == KERNELS[step], step
    for stage, blocks in BLOCKS.items():
        assert len([kernel for kernel in of(kernels, "lpu") if kernel.stage == stage]) == blocks
    assert {kernel.step for kernel in kernels if not kernel.triton} == {"kv"}
    assert {kernel.name for kernel in of(kernels, "kv")} == {"mm"}
    attention = [kernel.name for kernel in of(kernels, "attention")]
    split = ["linear_kernel", "reduced_kv_attention_kernel", "linear_kernel"]
    assert attention == 6 * ["absorbed_attention_kernel"] + 16 * ["projected_attention_kernel"] + 3 * split
    assert len(kernels) == sum(KERNELS.values()) <= 140


def test_bytes_beside_the_plan(kernels):
    """In stage d attention is three kernels, where the plan's bytes are those of one."""
    planned = {step: sum(stages.values()) for step, stages in PLAN_GB.items()}
    assert sum(planned.values()) == pytest.approx(15.62, abs=0.01)
    assert gigabytes(kernels) <= 1.1 * sum(planned.values())
    for stage, gb in PLAN_GB["lpu"].items():
        assert gigabytes([k for k in of(kernels, "lpu") if k.stage == stage]) == pytest.approx(gb, rel=0.01)


def test_operations_of_the_matrix_products(kernels):
    """The plan counts 1.963 T; convolutions in plain PyTorch count theirs too."""
    assert sum(kernel.flops for kernel in kernels) == pytest.approx(1.963e12, rel=0.03)


def test_the_trace_is_what_runs(monkeypatch):
    """Names and grids of the launches, beside those of a call in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = cmt_fast.CMT(**SMALL_MODELS["odd"]).eval()
    traced = [kernel for kernel in trace(model, 2, torch.float16) if kernel.triton]
    ran = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: ran.append(self))
    cmt_fast.optimize(model, dtype=torch.float16, backend="triton")(torch.zeros(2, 3, 96, 64))
    assert [k.name for k in traced] == [one.kernel.__name__ for one in ran]
    assert [k.bytes for k in traced] == [one.reads + one.writes for one in ran]


def test_recording_ends(kernels):
    """Afterwards nothing takes tensors without memory, and no launch is swallowed."""
    assert not launch.records(torch.device("meta"))
    with launch.record_launches():
        assert launch.records(torch.device("meta")) and not launch.records(torch.device("cpu"))
    packed = pack(cmt_fast.CMT(**SMALL_MODELS["aligned"]))
    assert run(packed, torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    command = importlib.import_module("benchmarks.trace")
    path = tmp_path / "trace.json"
    options = ["--variant", "cmt_ti", "--img-size", "64", "--batch", "2", "--dtype", "float16"]
    assert command.main([*options, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    data = json.loads(path.read_text())
    assert "cmt_ti 64 batch 2 float16: kernels" in printed and "absorbed_attention_kernel" in printed
    assert f"{len(data['kernels'])}" in printed and data["batch"] == 2
    row = next(row for row in data["kernels"] if row["name"] == "lpu_kernel")
    assert row["step"] == "lpu" and row["stage"] == "a" and row["tile"] and row["reads"] > row["writes"] / 2
    moved, gpu = row["reads"] + row["writes"], data["rates"]["H100"]
    assert row["floor_us"]["H100"] == pytest.approx(1e6 * moved / gpu["cache"])
