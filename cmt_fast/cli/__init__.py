"""The command line ``cmt-fast``; one file a command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point. A mistake of the user ends in one clear line and exit code 2; ``CMT_FAST_TRACEBACK=1`` shows where it arose."""
    try:
        from cmt_fast.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"cmt-fast needs {error.name}: pip install 'cmt-fast[cli]'")
    from cmt_fast.cli.console import errors

    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("CMT_FAST_TRACEBACK") == "1":
            raise
        errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        sys.exit(2)
