"""Builds the compiled library of csrc/ where that is possible; everything else stands in pyproject.toml.

CMT_FAST_BUILD   unset: build if torch and a C++ compiler are there, else install the pure Python package and say so
                 0: never build      1: build, or fail
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools

BUILD_COMMAND = "CMT_FAST_BUILD=1 pip install --no-build-isolation ."
MIN_TORCH = (2, 10)
JOB_BYTES = 2 << 30  # memory that one compiler process may take


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:
        stop(
            f"cmt_fast needs setuptools >= 77, got {setuptools.__version__}: pip install -U 'setuptools>=77,<82' wheel"
        )
    setting = os.environ.get("CMT_FAST_BUILD", "")
    if setting not in ("", "0", "1"):
        stop(f"CMT_FAST_BUILD must be 0 (never build), 1 (build or fail) or unset (build if possible), got {setting!r}")
    if setting == "0":
        setuptools.setup()
        return
    why_not = missing_torch() or missing_compiler()
    if why_not and setting == "1":
        stop(f"CMT_FAST_BUILD=1, but {why_not}. Then run: {BUILD_COMMAND}")
    if why_not:
        say(
            f"installing without the compiled library, everything runs on plain PyTorch: {why_not}. Then: {BUILD_COMMAND}"
        )
        setuptools.setup()
        return
    setuptools.setup(**extension(required=setting == "1"))


def missing_torch() -> str | None:
    """Why the torch of this environment cannot build an extension, and what to do."""
    try:
        import torch
    except ImportError:
        return "torch is not installed where the build runs: pip install torch, and build with --no-build-isolation"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch must be >= 2.10, got {torch.__version__}: pip install -U torch"
    return None


def missing_compiler() -> str | None:
    """Why no C++ extension of Python can be compiled, and what to do."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nstd::vector<int> probe;\n")
        include = sysconfig.get_path("include")
        command = [
            *shlex.split(compiler),
            f"-I{include}",
            "-std=c++17",
            "-fPIC",
            "-c",
            str(source),
            "-o",
            f"{source}.o",
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError:
            return f"the C++ compiler {compiler!r} does not run: install g++, or set CXX"
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
            return f"the C++ compiler {compiler!r} cannot compile against Python ({first.strip()}): install g++ and python3-dev"
    return None


def extension(required: bool) -> dict:
    """Arguments of ``setup`` that build the library: one binary for Python >= 3.10 and torch >= 2.10 (stable ABIs)."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ.setdefault("MAX_JOBS", str(jobs()))

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if required:
                    raise
                say(
                    f"csrc/ did not compile, installing without the compiled library ({error}). See why: {BUILD_COMMAND}"
                )
                self.extensions = []

    library = CppExtension(
        "cmt_fast._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        include_dirs=[str(Path("csrc").absolute())],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden"]},
        py_limited_api=True,
    )
    return dict(
        ext_modules=[library],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


def jobs() -> int:
    """Compiler processes to run side by side: one a core, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return cores
    return max(1, min(cores, free // JOB_BYTES))


def say(message: str) -> None:
    print(f"cmt_fast: {message}", file=sys.stderr, flush=True)


def stop(message: str) -> None:
    say(message)
    raise SystemExit(1)


main()
