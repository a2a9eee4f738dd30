"""docs/env.md lists exactly the environment variables that the code reads."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
READS = re.compile(r'(?:environ\.get\(|environ\[|environ\.setdefault\(|getenv\()\s*"(CMT_FAST_\w+)"')


def test_table_equals_what_the_code_reads():
    files = [
        ROOT / "setup.py",
        *(f for d in ("cmt_fast", "csrc", "benchmarks", "tests") for f in (ROOT / d).rglob("*")),
    ]
    sources = [f for f in files if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    read = {name for file in sources for name in READS.findall(file.read_text())}
    documented = re.findall(r"^\| `(CMT_FAST_\w+)`", (ROOT / "docs/env.md").read_text(), re.M)
    assert sorted(documented) == sorted(read)
