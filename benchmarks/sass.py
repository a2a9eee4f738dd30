"""Counting the machine instructions that a compiled kernel executes.

nvdisasm prints a kernel as lines of instructions between labels. A branch backwards is a loop, from its target to the branch; an
instruction runs as often as the loops around it. What a predicate switches off counts, since it takes its slot all the same; so does
a block that a branch forwards may skip. See docs/static.md.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);?\s*(?:/\*.*)?$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Sass:
    """The instructions of one kernel.

    Attributes:
        opcodes: in order, without the padding after the end.
        loops: (first, last) instruction of each loop, in order of the first.
    """

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    @property
    def spill_stores(self) -> int:
        """Stores to local memory: registers that did not fit."""
        return sum(opcode.startswith("STL") for opcode in self.opcodes)

    def executed(self, trips: Sequence[float]) -> float | None:
        """Instructions that a thread executes.

        Args:
            trips: how often each loop runs a time it is entered, in the order of :attr:`loops`.

        Returns:
            None if the compiler left another number of loops: then nobody knows.
        """
        if len(trips) != len(self.loops):
            return None
        total = 0.0
        for i in range(len(self.opcodes)):
            runs = 1.0
            for (first, last), n in zip(self.loops, trips):
                if first <= i <= last:
                    runs *= n
            total += runs
        return total


def parse(text: str) -> Sass:
    """Read what ``nvdisasm -c`` prints for a file with one kernel."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    ends: dict[int, int] = {}  # of loops, by their first instruction
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcode, operands = instruction.groups()
            here = len(opcodes)
            target = _TARGET.search(operands) if opcode.startswith("BRA") else None
            first = labels.get(target[1], here + 1) if target else here + 1
            if first == here:  # a branch to itself: padding after the end
                break
            opcodes.append(opcode)
            if first < here:
                ends[first] = max(here, ends.get(first, 0))
    return Sass(tuple(opcodes), tuple(sorted(ends.items())))


def disassemble(cubin: bytes, nvdisasm: str) -> Sass:
    """The instructions of a compiled kernel; ``nvdisasm`` is the path of the program."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        listing = subprocess.run([nvdisasm, "-c", str(file)], capture_output=True, text=True, check=True).stdout
    return parse(listing)
