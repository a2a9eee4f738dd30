"""The consoles every command prints to."""

from rich.console import Console

console = Console()
errors = Console(stderr=True)
