"""What a seal says, and the packed form of all unit records: stock arrays `units/...`, so that opening reads no thousand files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from signal_store.arrays import ArraySpec
from signal_store.ledger import UnitRecord
from signal_store.shard_writer import ShardRecord

ABSENT = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Seal:
    """Generation, parent, and digests of everything that is read before or beside the shards.

    `metadata`: sha256 of every zarr.json. `constants`: sha256 of every object of the arrays that no unit owns.
    `content_digest`: over all unit records.
    """

    cache_id: str
    generation: int
    parent: str | None
    num_units: int
    content_digest: str
    metadata: Mapping[str, str]
    constants: Mapping[str, str]

    def to_body(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "cache_id": self.cache_id,
            "generation": self.generation,
            "parent": self.parent,
            "num_units": self.num_units,
            "content_digest": self.content_digest,
            "metadata": dict(self.metadata),
            "constants": dict(self.constants),
        }

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """The inverse of `to_body`."""
        return cls(**body)


def group_of(path: str) -> str:
    """The group that packs the records of one array: `distribution/scalars` -> `units/distribution.scalars`."""
    return "units/" + path.replace("/", ".")


def pack_records(records: Sequence[UnitRecord], specs: Sequence[ArraySpec]) -> dict[str, NDArray[np.generic]]:
    """Rows of the packed arrays, by path: one row per shard (units in order). sha256 as 32 bytes, checksums as u64 whose fill
    marks a chunk that holds nothing."""
    packed: dict[str, NDArray[np.generic]] = {"units/plan/revision": np.asarray([r.revision for r in records], dtype=np.uint32)}
    for spec in specs:
        shards: list[ShardRecord] = [shard for record in records for shard in record.shards[spec.path]]
        crcs = [[ABSENT if c is None else c for c in shard.chunk_crc32c] for shard in shards]
        group = group_of(spec.path)
        packed[f"{group}/length"] = np.asarray([s.length for s in shards], dtype=np.uint64)
        packed[f"{group}/index_crc32c"] = np.asarray([s.index_crc32c for s in shards], dtype=np.uint64)
        packed[f"{group}/chunk_crc32c"] = np.asarray(crcs, dtype=np.uint64).reshape(len(shards), spec.chunks_per_shard)
        digests = b"".join(bytes.fromhex(s.sha256.removeprefix("sha256:")) for s in shards)
        packed[f"{group}/sha256"] = np.frombuffer(digests, dtype=np.uint8).reshape(len(shards), 32)
    return packed


def constant_spec(path: str, rows: NDArray[np.generic]) -> ArraySpec:
    """The spec of an array that no unit owns, written once with exactly these rows; its dimensions are its own, for xarray's
    sake."""
    names = [f"{path.rsplit('/', 1)[1]}_{axis}" for axis in range(rows.ndim)]
    return ArraySpec.of(path, str(rows.dtype), len(rows), *names, row_shape=rows.shape[1:], shuffle="shuffle")
