"""The run's record: one JSON line a step and a validation, and TensorBoard where it is wanted. The main process writes.

On resume, lines after the checkpoint are cut off.
"""

import json
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from signal_store.errors import CorruptError, InputError
from signal_store.io.local import LocalObjects

METRICS = "metrics.jsonl"


class RunLog:
    """Appends to `metrics.jsonl` of a run's folder; every line is flushed."""

    def __init__(self, out: Path, resume_step: int, accelerator: Accelerator, *, tensorboard: bool) -> None:
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        if not accelerator.is_main_process:
            return
        path = out / METRICS
        kept = [line for line in path.read_text().splitlines() if _whole(line, resume_step)] if path.exists() else []
        LocalObjects(out, scratch=".").put(METRICS, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")
        if tensorboard:
            self._tensorboard = _tensorboard(out)

    def write(self, *, step: int, **record: Any) -> None:
        """One line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in record.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard is not installed", expected='pip install "teacher-cache[tensorboard]"', where="tensorboard"
        ) from error
    return SummaryWriter(out / "tensorboard")


def _whole(line: str, resume_step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= resume_step
    except ValueError:  # a line cut short by a kill
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that a kill, or a run that is writing, left unfinished is none. CorruptError for any other line."""
    lines = path.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise CorruptError("a line of the log is not JSON", found=line[:80], where=f"{path}, line {number}") from error
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise CorruptError("a line of the log is no record", expected="a step", found=line[:80], where=f"{path}, line {number}")
        found.append(record)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; CorruptError where it is not whole."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CorruptError("a run's file is not JSON", found=error, where=path, remedy="Look at the run's folder.") from error
    if not isinstance(found, dict):
        raise CorruptError("a run's file is not a JSON object", found=type(found).__name__, where=path)
    return found
