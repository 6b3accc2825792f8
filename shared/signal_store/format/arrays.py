"""The shape of an array of the cache: its rows, its chunks, its shards, its codec. `hierarchy` has the zarr metadata that says so.

Policy: an array grows along its first axis only, by a fixed number of rows per unit (its capacity), so that every shard
belongs to one unit. The fill value is never valid data. Stock zarr codecs only, crc32c on every inner chunk.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

MAX_SHARD_BYTES = 64 * 2**20
TARGET_CHUNK_BYTES = 2**20
LEVEL, CODE_LEVEL = 6, 1
"""zstd's. Bytes of codes are noise but for their histogram: what a higher level searches for is not there, and looking for it costs
ten times the time and some per cent of the size (tools/bench/LOG.md)."""
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]

FILL: dict[str, int | float] = {
    "uint8": 255,
    "int8": -128,
    "uint16": 2**16 - 1,
    "int16": -(2**15),
    "uint32": 2**32 - 1,
    "uint64": 2**64 - 1,
    "int64": -1,
    "float16": math.nan,
    "float32": math.nan,
}
"""The value of a row that holds nothing, by dtype; never valid data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of the cache.

    `path` is its place in the hierarchy; `row_shape` what follows the first axis; `capacity_rows` the rows a unit has.
    """

    path: str
    dtype: str
    row_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    capacity_rows: int
    chunk_rows: int
    shard_rows: int
    shuffle: Shuffle
    transposed: bool = False
    """Inner chunks are stored column by column: alike values lie together, and zstd finds them."""
    level: int
    attributes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        path: str,
        dtype: str,
        capacity_rows: int,
        *dimension_names: str,
        row_shape: tuple[int, ...] = (),
        shuffle: Shuffle = "noshuffle",
        transposed: bool = False,
        min_chunk_rows: int = 1,
        level: int | None = None,
        **attributes: str,
    ) -> Self:
        """The array with the chunk and shard sizes that the format prescribes for its rows; `level` None is that of its dtype."""
        row_bytes = np.dtype(dtype).itemsize * math.prod(row_shape)
        capacity, chunk, shard = grid(capacity_rows, row_bytes, min_chunk_rows)
        return cls(
            path=path,
            dtype=dtype,
            row_shape=row_shape,
            dimension_names=dimension_names,
            capacity_rows=capacity,
            chunk_rows=chunk,
            shard_rows=shard,
            shuffle=shuffle,
            transposed=transposed,
            level=level or (CODE_LEVEL if np.dtype(dtype).itemsize == 1 else LEVEL),
            attributes=tuple(sorted(attributes.items())),
        )

    @property
    def fill(self) -> np.generic:
        """The fill value as a numpy scalar."""
        scalar: np.generic = np.dtype(self.dtype).type(FILL[self.dtype])
        return scalar

    @property
    def shards_per_unit(self) -> int:
        """How many shards hold the rows of one unit."""
        return self.capacity_rows // self.shard_rows

    @property
    def chunks_per_shard(self) -> int:
        """How many inner chunks a shard has."""
        return self.shard_rows // self.chunk_rows

    def shard_key(self, shard: int) -> str:
        """The zarr key of the array's shard number `shard`."""
        return "/".join([self.path, "c", str(shard)] + ["0"] * len(self.row_shape))

    def to_json(self) -> dict[str, Any]:
        """The JSON form that the manifest keeps."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "row_shape": list(self.row_shape),
            "dimension_names": list(self.dimension_names),
            "capacity_rows": self.capacity_rows,
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "shuffle": self.shuffle,
            "transposed": self.transposed,
            "level": self.level,
            "attributes": dict(self.attributes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            **{
                **value,
                "row_shape": tuple(value["row_shape"]),
                "dimension_names": tuple(value["dimension_names"]),
                "attributes": tuple(sorted(value["attributes"].items())),
            }
        )


def grid(capacity_rows: int, row_bytes: int, min_chunk_rows: int) -> tuple[int, int, int]:
    """(capacity, chunk, shard) rows: chunks are powers of two of at most 1 MiB raw (but at least `min_chunk_rows`), shards at
    most 64 MiB raw, and the capacity is rounded up so that both divide it."""
    chunk = max(1, TARGET_CHUNK_BYTES // max(1, row_bytes), min_chunk_rows)
    chunk = 2 ** int(math.log2(chunk))
    while chunk > 1 and chunk >= 2 * capacity_rows:
        chunk //= 2
    chunks = max(1, math.ceil(capacity_rows / chunk))
    chunks_per_shard = min(chunks, 2 ** int(math.log2(max(1, MAX_SHARD_BYTES // max(1, chunk * row_bytes)))))
    shards = math.ceil(chunks / chunks_per_shard)
    chunks_per_shard = math.ceil(chunks / shards)
    return shards * chunks_per_shard * chunk, chunk, chunks_per_shard * chunk
