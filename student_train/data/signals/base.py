"""What a signal is to a student: which of its arrays a term asks for, and what a micro-batch then holds of it.

A signal is a file of this folder with one `Request` and its `Part`, of the same name as the signal's own in
`signal_store/signals/`. Terms make requests and take parts by their classes; reading and batching go over requests.
"""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch

from signal_store.cache import Cache
from student_train.data.part import Part
from student_train.data.placement import Placement


class Request(ABC):
    """What is read of one signal: a frozen dataclass of tuples and flags. `a | b` reads what either does."""

    __slots__ = ()
    aligns: ClassVar[bool] = False
    """Whether its part means the same where the student's tokens are not the cache's: of tokens that end together alone."""

    @classmethod
    def signal(cls) -> str:
        """Its signal's name: its file's."""
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def whole(cls, _cache: Cache) -> Self:
        """All that there is of a cache that holds the signal: one without choices asks for all anyway."""
        return cls()

    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """What the paths of the arrays that it reads begin with; none where it asks for nothing."""

    @abstractmethod
    def gather(self, placement: Placement) -> Part:
        """The signal's part of a batch with one segment at least."""

    def codecs(self, _cache: Cache, _device: torch.device) -> Any:
        """What its codes are decoded with, on the device; None where they are values."""
        return None

    def described(self) -> tuple[str, ...]:
        """What it reads, for people."""
        return (self.signal(),) if self.groups() else ()

    def __or__(self, other: Self) -> Self:
        both = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))  # type: ignore[arg-type]
        joined = {name: tuple(dict.fromkeys(a + b)) if isinstance(a, tuple) else a or b for name, a, b in both}
        return type(self)(**joined)
