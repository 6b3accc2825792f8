"""What a seal says, and the packed form of all unit records: stock arrays `units/<generation>/...`, so that opening reads no
thousand files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from signal_store.format.arrays import ArraySpec
from signal_store.io.shard_writer import ShardRecord
from signal_store.ledger.documents import EXTENSIONS, UnitRecord
from signal_store.manifest import SourceIdentity

ABSENT = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Seal:
    """One generation of a cache. Its cost does not grow with the number of units.

    `parent`: digest of the seal before it. `content_digest`: over all unit records. `metadata`: sha256 of every zarr.json.
    `constant_arrays`: those that no unit owns, as `ArraySpec.to_json` with their `rows`; `constants`: sha256 of their objects.
    `tokenizer`: sha256 of its files. `ledger`: digests of plan, extensions and calibration. `sources`: added since the manifest.
    """

    cache_id: str
    generation: int
    parent: str | None
    num_units: int
    num_segments: int
    content_digest: str
    metadata: Mapping[str, str]
    constant_arrays: tuple[dict[str, Any], ...]
    constants: Mapping[str, str]
    tokenizer: Mapping[str, str]
    ledger: Mapping[str, str]
    sources: tuple[dict[str, Any], ...]

    def to_body(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "constant_arrays": list(self.constant_arrays), "sources": list(self.sources)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """The inverse of `to_body`."""
        return cls(**{**body, "constant_arrays": tuple(body["constant_arrays"]), "sources": tuple(body["sources"])})

    @property
    def num_extensions(self) -> int:
        """Extensions of the plan that this generation covers."""
        return sum(key.startswith(EXTENSIONS) for key in self.ledger)

    @property
    def added_sources(self) -> tuple[SourceIdentity, ...]:
        """Sources of the extensions."""
        return tuple(SourceIdentity.model_validate(source) for source in self.sources)

    @property
    def constant_specs(self) -> dict[ArraySpec, int]:
        """The arrays that no unit owns, and their rows."""
        found = {}
        for array in self.constant_arrays:
            fields = dict(array)
            rows = fields.pop("rows")
            found[ArraySpec.from_json(fields)] = int(rows)
        return found


def units_group(generation: int) -> str:
    """The group of a generation's packed records."""
    return f"units/{generation:06d}"


def group_of(path: str, generation: int) -> str:
    """The group that packs the records of one array: `distribution/scalars` -> `units/000000/distribution.scalars`."""
    return f"{units_group(generation)}/{path.replace('/', '.')}"


def pack_records(records: Sequence[UnitRecord], specs: Sequence[ArraySpec], generation: int) -> dict[str, NDArray[np.generic]]:
    """Rows of the packed arrays, by path: one row per shard (units in order). sha256 as 32 bytes, checksums as u64 whose fill
    marks a chunk that holds nothing."""
    plan = f"{units_group(generation)}/plan"
    packed: dict[str, NDArray[np.generic]] = {f"{plan}/revision": np.asarray([r.revision for r in records], dtype=np.uint32)}
    for spec in specs:
        shards: list[ShardRecord] = [shard for record in records for shard in record.shards[spec.path]]
        crcs = [[ABSENT if c is None else c for c in shard.chunk_crc32c] for shard in shards]
        group = group_of(spec.path, generation)
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
