"""How many rows a unit has room for, of arrays that have not one row per token."""

from pydantic import ConfigDict

from signal_store.format.section import Section


class Capacities(Section):
    """Rows that every unit has room for, in the arrays that do not have one row per token: maxima over the plan's units. A signal
    that has no field here names its own, such as `sharpness_rows`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]

    segments: int = 0
    hidden_rows: int = 0
    attention_rows: int = 0
    attention_entries: int = 0
    replay_rows: int = 0
    evidence_rows: int = 0
    coverage_rows: int = 0

    def rows(self, name: str) -> int:
        """Those of this name; 0 where a plan has none."""
        return int(dict(self).get(name, 0))

    def union(self, other: "Capacities") -> "Capacities":
        """Room for both."""
        return Capacities(**{name: max(self.rows(name), other.rows(name)) for name in {**dict(self), **dict(other)}})

    def plus(self, other: "Capacities") -> "Capacities":
        """Rows of both, one after the other."""
        return Capacities(**{name: self.rows(name) + other.rows(name) for name in {**dict(self), **dict(other)}})

    def holds(self, other: "Capacities") -> bool:
        """Whether the other fits."""
        return self.union(other) == self
