"""The text every machine has: Python's own standard library, split into train and validation.

Policy: a module belongs to the side its *family* hashes to. The family is the top-level name (`json` for `json.decoder`),
and a module of the `test` package belongs to the family it tests (`test.test_json` -> `json`), so that neither the teacher
nor a student ever trains on a sibling or on the tests of a held-out module. Generated tables (`encodings`, `pydoc_data`)
are left out: they are data, not text.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]

SPLIT_SALT = "teacher-cache demo"
VALIDATION_SHARE = 1 / 16
_GENERATED = {"encodings", "pydoc_data", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted `name`, its `text`, the `split` it belongs to, and whether it is a test."""

    name: str
    text: str
    split: Split
    is_test: bool


def family(name: str) -> str:
    """The unit of the split: `json.decoder` -> `json`, `test.test_json.test_decode` -> `json`."""
    parts = name.split(".")
    if parts[0] == "test" and len(parts) > 1:
        return parts[1].removeprefix("test_").removeprefix("_test_")
    return parts[0].removeprefix("_")


def split_of(name: str) -> Split:
    """The side of a module, a pure function of its name."""
    digest = hashlib.sha256(f"{SPLIT_SALT}\0{family(name)}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE else "train"


def modules(root: Path | None = None) -> Iterator[Module]:
    """Every readable module below `root` (default: this interpreter's standard library), in order of its name."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = sorted((".".join(path.relative_to(root).with_suffix("").parts), path) for path in root.rglob("*.py"))
    for name, path in names:
        if _GENERATED & set(name.split(".")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the test package holds files that are broken on purpose
            continue
        if text.strip():
            tested = bool({"test", "tests", "idle_test"} & set(name.split(".")))
            yield Module(name, text, split_of(name), tested)
