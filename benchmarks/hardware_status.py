"""Bring docs/hardware-status.md up to date with the result files: ``python -m benchmarks.hardware_status [--write]``.

A line of the page is written by hand and names the command that verifies it. It is closed, ``- [x]`` with device, date, commit and file, as soon as a
result file of a GPU has what its command makes: the tests of a file all passed, or the times of a step or an operation. A failure leaves it
open and says so. A line that sets a goal for a time stays open too, with what was measured beside it: whoever reads the figures closes it. What no
file of this form can show stays in the hands of who writes the page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.store import RESULTS, load
from cmt_fast.testing.results import device_name

PAGE = RESULTS.parents[1] / "docs" / "hardware-status.md"

Row = dict[str, Any]

#: A line of the page, with the lines that continue it.
_LINE = re.compile(r"^- \[[ x]\] .*(?:\n  .*)*", re.MULTILINE)
#: What :func:`update` added to it before.
_SEEN = re.compile(r" \((?:verified|measured|failed) on [^()]*\)$")
#: Words of a line that sets a goal.
_GOAL = re.compile(r"\b(?:at least|at most|aims?|goals?)\b")
_NO_BRACKETS = str.maketrans("()", "[]")
_COMMAND = re.compile(r"`([^`]*)`")
#: By the beginning of a command: the kind of what it makes, and where the command names it.
_MAKES = {
    "pytest -m gpu ": ("tests", re.compile(r"tests/\S+\.py")),
    "python -m benchmarks.kernels ": ("step", re.compile(r"--step (\w+)")),
    "python -m benchmarks.run ": ("op", re.compile(r"--op (\w+)")),
    "python -m benchmarks.attention ": ("in training", re.compile(r"benchmarks\.(attention)")),
}
#: By kind: the operation of the rows that show it.
_OPS = {"step": "packed {}", "op": "{}", "in training": "{} in training"}


def update(page: str, files: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """The page with every line that a result file settles closed, or told to have failed or what was measured.

    Args:
        page: its text.
        files: (path, content) of result files, the oldest first. Those without a GPU do not count.
    """
    evidence = [(path, data) for path, data in files if "gpu" in data["machine"]]

    def line(match: re.Match[str]) -> str:
        text = _SEEN.sub("", match[0])[len("- [ ] ") :]
        wanted = list(_wanted(text))
        verdicts = [verdict for what in wanted if (verdict := _verdict(what, evidence)) is not None]
        failures = [said for passed, said in verdicts if not passed]
        if failures:
            return f"- [ ] {text} (failed on {'; '.join(failures)})"
        if wanted and len(verdicts) == len(wanted):
            seen = "; ".join(said for _, said in verdicts)
            if not _GOAL.search(text) or all(kind == "tests" for kind, _ in wanted):
                return f"- [x] {text} (verified on {seen})"
            if match[0].startswith("- [ ]"):
                return f"- [ ] {text} (measured on {seen})"
        return match[0]

    return _LINE.sub(line, page)


def _wanted(text: str) -> Iterator[tuple[str, str]]:
    """What a line's commands make, as far as a result file can hold it: (kind, name)."""
    for command in _COMMAND.findall(text):
        for beginning, (kind, names) in _MAKES.items():
            if command.startswith(beginning):
                yield from ((kind, name) for name in dict.fromkeys(names.findall(command)))


def _verdict(wanted: tuple[str, str], evidence: Sequence[tuple[str, dict[str, Any]]]) -> tuple[bool, str] | None:
    """Whether the newest file that has it is in favour, and where that is written; None if none has it."""
    for path, data in reversed(evidence):
        rows = [row for row in data["rows"] if _is(row, wanted)]
        if rows:
            facts = data["machine"]
            where = f"{device_name(facts)}, {facts['date'][:10]}, {facts['commit']}, {path}"
            passed, what = _judge(rows)
            return passed, f"{where}: {what}"
    return None


def _is(row: Row, wanted: tuple[str, str]) -> bool:
    kind, name = wanted
    if kind == "tests":
        return row.get("provider") == "pytest" and row.get("op") == name
    return row.get("op") == _OPS[kind].format(name) and row.get("provider") == "triton"


def _judge(rows: Sequence[Row]) -> tuple[bool, str]:
    if rows[0].get("provider") == "pytest":
        passed, failed = (sum(row[name] for row in rows) for name in ("passed", "failed"))
        return passed > 0 and failed == 0, f"{passed} passed, {failed} failed"
    timed = [row for row in rows if row["median_us"] is not None]
    if len(timed) < len(rows):
        return False, next(row["note"] for row in rows if row["median_us"] is None).translate(_NO_BRACKETS)
    shares = [row["of_copy"] for row in timed if row.get("of_copy")]
    return True, f"{min(shares):.0%} to {max(shares):.0%} of copy bandwidth" if shares else f"{len(timed)} times"


def result_files(root: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """All of them, by the date that they carry; paths as the page names them."""
    files = [(path.relative_to(root).as_posix(), load(path)) for path in root.rglob("*.json")]
    return sorted(files, key=lambda file: file[1]["machine"]["date"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it; returns 1 if it was not up to date and is not written."""
    parser = argparse.ArgumentParser("python -m benchmarks.hardware_status", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help=f"write docs/{PAGE.name}; else say whether it is up to date"
    )
    options = parser.parse_args(arguments)
    old = PAGE.read_text(encoding="utf-8")
    new = update(old, result_files())
    if options.write:
        PAGE.write_text(new, encoding="utf-8")
    closed, lines = (len(re.findall(pattern, new, re.MULTILINE)) for pattern in (r"^- \[x\]", r"^- \[[ x]\]"))
    print(
        f"{closed} of {lines} lines are closed; {'written' if options.write else 'up to date' if old == new else 'NOT up to date'}"
    )
    return int(old != new and not options.write)


if __name__ == "__main__":
    sys.exit(main())
