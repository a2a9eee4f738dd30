"""What each value of CMT_FAST_BUILD does with and without torch and a compiler, what is packed, and the verbs of make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_COMMAND = "CMT_FAST_BUILD=1 pip install --no-build-isolation ."

setuptools = pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, without a compiled library."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("cmt_fast", "csrc", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def run_setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CMT_FAST_BUILD", "CXX", "CC")}
    command = [sys.executable, "setup.py", "--quiet", *(arguments or ("bdist_wheel", "--dist-dir", "dist"))]
    return subprocess.run(command, cwd=source, env=clean | environment, capture_output=True, text=True)


def assert_pure_wheel(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cmt_fast/py.typed" in names and "cmt_fast/ops/depthwise/schema.py" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "csrc"))]


def test_never_build(source, tmp_path):
    """By pip, as users run it; a library that lies in the source folder stays out of the wheel."""
    (source / "cmt_fast/_C.abi3.so").write_bytes(b"")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, env=os.environ | {"CMT_FAST_BUILD": "0"}, check=True, capture_output=True)
    assert_pure_wheel(tmp_path)


def test_unknown_value(source):
    result = run_setup(source, CMT_FAST_BUILD="yes")
    assert result.returncode == 1
    assert (
        "CMT_FAST_BUILD must be 0 (never build), 1 (build or fail) or unset (build if possible), got 'yes'"
        in result.stderr
    )


def missing_compiler(source: Path) -> tuple[dict[str, str], str]:
    return {"CXX": "/nonexistent/c++"}, "the C++ compiler '/nonexistent/c++' does not run: install g++, or set CXX"


def broken_compiler(source: Path) -> tuple[dict[str, str], str]:
    return {"CXX": "false"}, "the C++ compiler 'false' cannot compile against Python"


def missing_torch(source: Path) -> tuple[dict[str, str], str]:
    (source / "torch.py").write_text("raise ImportError('no torch here')")
    return {"PYTHONPATH": str(source)}, "torch is not installed where the build runs"


def old_torch(source: Path) -> tuple[dict[str, str], str]:
    (source / "torch.py").write_text("__version__ = '2.9.1+cpu'")
    return {"PYTHONPATH": str(source)}, "torch must be >= 2.10, got 2.9.1+cpu"


@pytest.mark.parametrize("lack", [missing_compiler, broken_compiler, missing_torch, old_torch])
class TestWithoutTools:
    def test_unset_installs_pure_python_and_says_so(self, source, lack):
        environment, reason = lack(source)
        result = run_setup(source, **environment)
        assert result.returncode == 0, result.stderr
        assert f"installing without the compiled library, everything runs on plain PyTorch: {reason}" in result.stderr
        assert BUILD_COMMAND in result.stderr
        assert_pure_wheel(source / "dist")

    def test_build_is_an_error_that_names_the_command(self, source, lack):
        environment, reason = lack(source)
        result = run_setup(source, CMT_FAST_BUILD="1", **environment)
        assert result.returncode == 1
        assert f"CMT_FAST_BUILD=1, but {reason}" in result.stderr and BUILD_COMMAND in result.stderr


@pytest.fixture
def failing_on_csrc(tmp_path: Path) -> str:
    """A compiler that works until it is given a file of csrc/."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler: c++ is not installed")
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\ncase "$*" in *csrc/*.cpp*) echo "error: no" >&2; exit 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("setting", ["", "1"])
def test_compile_failure(source, failing_on_csrc, setting):
    arguments = ("build_ext", "--inplace")
    result = run_setup(source, *arguments, CMT_FAST_BUILD=setting, CXX=failing_on_csrc, CC=failing_on_csrc)
    assert not list((source / "cmt_fast").glob("*.so"))
    if setting == "1":
        assert result.returncode != 0
    else:
        assert result.returncode == 0, result.stderr
        assert "csrc/ did not compile, installing without the compiled library" in result.stderr
        assert BUILD_COMMAND in result.stderr


def test_source_distribution(source):
    result = run_setup(source, "sdist", "--dist-dir", "dist", CMT_FAST_BUILD="0")
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert {"csrc/cpu/depthwise_inner.h", "csrc/register.cpp", "setup.py", "LICENSE", "constraints.txt"} <= names


VERBS = ("setup", "demo", "test", "test-latest", "sanitize", "lint", "bench", "report", "clean")


@pytest.fixture
def make() -> str:
    return shutil.which("make") or pytest.skip("needs make: it is not installed")


@pytest.mark.parametrize("verb", VERBS)
def test_make_knows(make, verb):
    result = subprocess.run([make, "-n", verb, "PYTHON=python-of-mine"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_make_help_lists_every_verb(make):
    text = subprocess.run([make], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^  make (\S+)", text, re.M) == ["help", *VERBS]


def test_make_sets_up_in_a_fresh_clone(make, source):
    commands = subprocess.run(
        [make, "-n", "test", "PYTHON=python-of-mine"], cwd=source, check=True, capture_output=True
    )
    lines = commands.stdout.decode().splitlines()
    order = ["python-of-mine -m venv .venv", "torch torchvision triton", "--no-build-isolation", "-m pytest"]
    positions = [next(i for i, line in enumerate(lines) if part in line) for part in order]
    assert positions == sorted(positions)


def test_constraints_pin_the_direct_dependencies():
    pins = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert {name: pins[name] for name in ("torch", "torchvision", "triton")} == {
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "triton": "3.6.0",
    }
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    needed = set(re.findall(r'"([a-z-]+)(?:>=[\d.]+)?"', project.split("dependencies = ", 1)[1])) - {"cmt-fast"}
    assert needed <= pins.keys()
