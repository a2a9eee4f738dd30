"""The loops of csrc/cpu/packed under AddressSanitizer and UndefinedBehaviorSanitizer, without Python and torch: `make sanitize`."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ROUNDS = 20  # random shapes of each of 11 steps, 2 dtypes and 3 instruction sets


def command(source: Path, program: Path) -> list[str]:
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-std=c++17", "-O0", "-g1", "-fno-omit-frame-pointer", "-pthread", f"-I{CSRC}"),
        *("-Wall", "-Wno-psabi", "-D_GLIBCXX_SANITIZE_VECTOR"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *([] if has_avx512 else ["-DWITHOUT_AVX512"]),
        *(str(source), "-o", str(program)),
    ]


def test_kernels(tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        subprocess.run(command(probe, tmp_path / "probe"), check=True, capture_output=True, text=True)
        subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no C++ compiler: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this C++ compiler has no sanitizers: {error.stderr.strip()[:200]}")
    program = tmp_path / "kernels"
    built = subprocess.run(command(HERE / "kernels.cpp", program), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program, str(ROUNDS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
