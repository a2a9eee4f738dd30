"""Compiling a launch for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.sass import Sass, disassemble
from cmt_fast.backend import interpreting
from cmt_fast.ops._triton.launch import Launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread; more than 0 if registers did not fit.
        shared: bytes of shared memory of a program.
        sass: the instructions.
    """

    registers: int
    stack: int
    shared: int
    sass: Sass

    def instructions_per_element(self, launch: Launch) -> float | None:
        """Instructions of all lanes together, by ``launch.elements``; None where a loop's count is not known."""
        executed = self.sass.executed(launch.loops)
        if executed is None:
            return None
        programs = 1
        for size in launch.grid:
            programs *= size
        return executed * programs * launch.num_warps * 32 / launch.elements


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile ``launch`` for compute capability ``arch`` (90 for 9.0), specialised on its arguments as a call would.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, and nothing can be compiled: unset it")
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned = True  # what torch allocates is
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif isinstance(value, int) and value != 1:
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:  # None, a 1 (which Triton compiles in), or a tl.constexpr parameter
            signature[name], aligned = "constexpr", False
            constants.setdefault(name, value)
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = kernel.asm["cubin"]
    registers, stack = _resources(cubin)
    return Compiled(registers, stack, kernel.metadata.shared, disassemble(cubin, str(_TOOLS / "nvdisasm")))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump told no registers: {text}"
    return int(found[1]), int(found[2])
