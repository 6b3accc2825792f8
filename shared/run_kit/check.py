"""One line of `doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """`ok`, `note` (works, but know it), or `bad` (will fail)."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""
