"""Files of JSON lines, which are appended to while others read them."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """The whole lines of a `.jsonl` file, or of its `last` bytes; a torn or foreign one is passed over, and a file that
    is not there, or nobody lets us read, has none."""
    try:
        with path.open("rb") as file:
            file.seek(-min(last, os.fstat(file.fileno()).st_size), os.SEEK_END if last else os.SEEK_SET)
            texts = file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    lines = []
    for text in texts.split("\n"):
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]
