"""The limits that compiled kernels keep, and how their instructions are counted. Nothing here needs a GPU."""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.testing.shapes import stage_shapes

ROOT = Path(__file__).parents[2]

#: Instructions an element, beside the plan's: what is allowed, and where it is more, docs/static.md says why.
ALLOWED = 1.15
ALLOWED_MORE = {("lpu", "d"): 1.30, ("expand", "d"): 1.45}


def table(folder: Path, *options: str) -> list[dict]:
    """Rows of the static table, from a process in which Triton compiles: in this one its kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "benchmarks.static", *options, "--json", str(folder / "static.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "static.json").read_text())["rows"]


#: Those of a packed model. The launches of training are many more: here they are compiled for one architecture, a stage a process.
INFERENCE = {"stem", "patch_embed", "lpu", "attention", "expand", "depthwise_project", "head"}


@pytest.fixture
def names(monkeypatch):
    """Of the kernels of a packed model or of training that have launches in the stages."""
    monkeypatch.syspath_prepend(ROOT)
    launches = importlib.import_module("benchmarks.launches").LAUNCHES

    def names(kernels: str, stages: str, arch: int = 90) -> set[str]:
        shapes = [shape for stage, shape in zip("abcd", stage_shapes("cmt_s", 256)) if stage in stages]
        asked = INFERENCE if kernels == "inference" else launches.keys() - INFERENCE
        limits = ARCHITECTURES[arch]
        return {name for name in asked if any(launches[name](shape, torch.bfloat16, limits) for shape in shapes)}

    return names


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")
def test_every_kernel_has_launches(names):
    assert names("inference", "abcd") == INFERENCE
    assert names("training", "acd") == names("training", "abcd"), "b lies between"
    launches = importlib.import_module("benchmarks.launches").LAUNCHES
    assert names("inference", "abcd") | names("training", "acd") == launches.keys()


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, not installed here")
@pytest.mark.parametrize(
    ("arch", "kernels", "stages"),
    [
        (90, "inference", "abcd"),
        *((90, "training", stage) for stage in "acd"),
        (80, "inference", "d"),
        (100, "inference", "d"),
        (120, "inference", "ad"),  # with the least shared memory
    ],
)
def test_limits_of_cmt_s(tmp_path, arch, kernels, stages, names):
    expected = names(kernels, stages, arch)
    asked = [f"--kernel={name}" for name in sorted(expected)]
    rows = table(tmp_path, "--variant", "cmt_s", "--arch", f"sm_{arch}", "--batch", "256", "--stages", stages, *asked)
    assert {row["kernel"] for row in rows} == expected
    assert {row["stage"] for row in rows} == set(stages)
    for row in rows:
        where = f"{row['kernel']} of stage {row['stage']} on sm_{arch}: {row}"
        assert row["shared"] <= ARCHITECTURES[arch].shared_memory, where
        if arch == 90 and row["planned"]:  # what the plan was made for
            allowed = ALLOWED_MORE.get((row["kernel"], row["stage"]), ALLOWED)
            assert row["instructions"] is not None and row["instructions"] <= allowed * row["planned"], where
        if arch == 90:
            assert row["spill_stores"] <= row["spills_accepted"], where


LISTING = """
lpu_kernel:
.text.lpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   FADD R1, R1, R2 ;
.L_x_0:
        /*0030*/                   STL [R1], R148 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   FFMA R1, R1, R2, R3 ;
        /*0060*/              @P2 BRA `(.L_x_1) ;
        /*0070*/               @P3 BRA `(.L_x_2) ;
        /*0080*/                   MOV R1, R2 ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
"""


def test_instructions_are_counted_by_the_loops_around_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    sass = importlib.import_module("benchmarks.sass").parse(LISTING)
    assert sass.opcodes == ("LDC", "EXIT", "FADD", "STL", "BRA", "FFMA", "BRA", "BRA", "MOV", "EXIT")
    assert sass.loops == ((2, 6), (3, 4)) and sass.spill_stores == 1
    assert sass.executed((3, 5)) == 2 + 3 * (3 + 5 * 2) + 3
    assert sass.executed((3,)) is None
