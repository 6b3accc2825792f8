"""The run's record: one JSON line a step and a validation. On resume, lines after the checkpoint are cut off."""

import json
from pathlib import Path
from typing import Any

from signal_store.local_objects import LocalObjects


class MetricsLog:
    """Appends to `path`; every line is flushed."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in path.read_text().splitlines() if _whole(line, resume_step)] if path.exists() else []
        LocalObjects(path.parent, scratch=".").put(path.name, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")

    def write(self, **record: Any) -> None:
        """One line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole(line: str, resume_step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= resume_step
    except ValueError:  # a line cut short by a kill
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records."""
    return [json.loads(line) for line in path.read_text().splitlines()]
