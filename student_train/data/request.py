"""What a student reads of a cache: a request for each signal, and the arrays that these come to, the text's own with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from signal_store.cache import Cache
from student_train.data.signals import request_kinds
from student_train.data.signals.base import Request
from student_train.data.unit import Read, UnitReader

RequestKind = TypeVar("RequestKind", bound=Request)
TEXT = ("tokens/input_ids", "tokens/loss_mask")


@dataclass(frozen=True)
class SignalRequest:
    """At most one request a signal, by its name; none that asks for nothing. `a | b` reads what either does."""

    signals: dict[str, Request] = field(default_factory=dict)

    @classmethod
    def of(cls, *requests: Request) -> "SignalRequest":
        """Several requests of one signal are joined."""
        found: dict[str, Request] = {}
        for request in requests:
            if request.groups():
                name = request.signal()
                found[name] = found[name] | request if name in found else request
        return SignalRequest(found)

    @classmethod
    def whole(cls, cache: Cache) -> "SignalRequest":
        """All that a student can read of a cache."""
        kinds = request_kinds().items()
        held = (kind for name, kind in kinds if any(path.startswith(f"{name}/") for path in cache.capacity_rows))
        return cls.of(*(kind.whole(cache) for kind in held))

    def __or__(self, other: "SignalRequest") -> "SignalRequest":
        return SignalRequest.of(*self, *other)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.signals.values())

    def get(self, kind: type[RequestKind]) -> RequestKind | None:
        """What is asked for of one signal, by the class of its request."""
        found = self.signals.get(kind.signal())
        return found if isinstance(found, kind) else None

    def reads(self, cache: Cache) -> dict[str, Read]:
        """By path, the arrays, in the order of the manifest."""
        groups = {TEXT: "tokens"} | {request.groups(): request.signal() for request in self}
        specs = cache.manifest.specs
        return {spec.path: Read(spec, groups[begins]) for spec in specs for begins in groups if spec.path.startswith(begins)}

    def load(self, cache: Cache, units: Sequence[int]) -> list[UnitReader]:
        """Units with their segment tables."""
        reads = self.reads(cache)
        return [UnitReader.of(cache, unit, reads) for unit in units]


TOKENS_ONLY = SignalRequest()
