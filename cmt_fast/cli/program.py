"""How the user started this program, for commands to copy."""

from __future__ import annotations

import os
import shlex
import sys


def command_line(*arguments: object) -> str:
    """``cmt-fast`` with ``arguments``, as a shell command that works in the current folder."""
    started = sys.argv[0]
    if os.path.basename(started) == "__main__.py":
        program = [sys.executable, "-m", "cmt_fast"]
    elif os.path.sep not in started or any(started == os.path.join(p, "cmt-fast") for p in os.get_exec_path()):
        program = ["cmt-fast"]
    else:
        program = [os.path.relpath(started) if started.startswith(os.getcwd() + os.path.sep) else started]
    return shlex.join([*program, *map(str, arguments)])
