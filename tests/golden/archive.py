"""Golden caches, one of each format version: a zip, and beside it the sha256 of every array as decoded by plain zarr, NaN and fill
values included."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import zarr

FOLDER = Path(__file__).parent
VERSIONS = sorted(path.stem for path in FOLDER.glob("cache-v*.json"))


def unpack(version: str, root: Path) -> None:
    """The golden cache of a format version, into a folder."""
    with zipfile.ZipFile(FOLDER / f"{version}.zip") as archive:
        archive.extractall(root)


def digests(root: Path) -> dict[str, str]:
    """sha256 of the rows of every array, as plain zarr reads them."""
    group = zarr.open_group(root, mode="r", zarr_format=3)
    found = {}
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            rows = np.ascontiguousarray(member[...])
            found[path] = hashlib.sha256(f"{rows.dtype}{rows.shape}".encode() + rows.tobytes()).hexdigest()
    return dict(sorted(found.items()))
