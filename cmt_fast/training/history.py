"""What every epoch gave, as a file of JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_history(path: Path, records: list[Record]) -> None:
    """Write one line a record; the old file is replaced at once or not at all."""
    new = path.with_name(path.name + ".tmp")
    new.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(new, path)
