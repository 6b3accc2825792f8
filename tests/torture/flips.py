"""Single-bit flips over every kind of object of a cache, and truncated, deleted, swapped and duplicated objects.

    python -m tests.torture.flips --flips 2000

Each must be reported by `verify` with the object's name; and a reader that touches the object must refuse it, or get exactly what
was stored. Nothing is silently read.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from run_kit.command_line import guarded
from signal_store.cache import open_cache
from signal_store.errors import SignalStoreError
from teacher_cache.commands.build import build
from teacher_cache.commands.verify import verify
from tests.torture.material import make_material, recipe_at

KINDS = ("bit", "bit", "bit", "bit", "bit", "bit", "truncated", "deleted", "swapped", "duplicated")


def kind_of(key: str) -> str:
    """The kind of object a key is."""
    if key.endswith("zarr.json"):
        return "metadata"
    if key.startswith("ledger/"):
        return "ledger " + key.split("/")[1].split(".")[0]
    return "constant" if key.startswith(("units/", "calibration/")) else "shard"


class Victim:
    """A sealed cache that is damaged, looked at, and put right again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        cache = open_cache(root)
        self.arrays = sorted(path for part in cache.parts for path in part.paths)
        self.rows: dict[str, NDArray[Any]] = {path: cache.read(path) for path in self.arrays}
        self.tokenizer = cache.tokenizer_files()
        self.by_kind: dict[str, list[str]] = {}
        for key in self.keys:
            self.by_kind.setdefault(kind_of(key), []).append(key)

    def damage(self, chance: random.Random) -> tuple[str, list[str], dict[str, bytes | None]]:
        """Do harm: what, the keys that are not what they were, and what they held (None: nothing)."""
        what = chance.choice(KINDS)
        key = chance.choice(self.by_kind[chance.choice(sorted(self.by_kind))])
        path = self.root / key
        data = path.read_bytes()
        if what == "bit":
            spoiled = bytearray(data)
            spoiled[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(spoiled))
        elif what == "truncated":
            path.write_bytes(data[: chance.randrange(len(data))])
        elif what == "deleted":
            path.unlink()
        elif what == "duplicated":
            stranger = f"{key}.copy"
            shutil.copy(path, self.root / stranger)
            return what, [stranger], {stranger: None}
        else:
            others = [k for k in self.by_kind[kind_of(key)] if k != key and (self.root / k).read_bytes() != data]
            if not others:
                return "nothing", [], {}
            other = chance.choice(others)
            held = (self.root / other).read_bytes()
            path.write_bytes(held)
            (self.root / other).write_bytes(data)
            return what, [key, other], {key: data, other: held}
        return what, [key], {key: data}

    def restore(self, held: dict[str, bytes | None]) -> None:
        for key, data in held.items():
            if data is None:
                (self.root / key).unlink()
            else:
                (self.root / key).write_bytes(data)

    def named(self) -> set[str]:
        """What `verify` names, in its list or in the one error that stops it."""
        try:
            return {damage.key for damage in verify(str(self.root)).damages}
        except SignalStoreError as error:
            return {key for key in self.keys if key in str(error)}

    def silently_wrong(self, keys: list[str]) -> str | None:
        """An array that the reader gives wrongly without a word, of those that the keys belong to."""
        try:
            cache = open_cache(self.root)
        except SignalStoreError:
            return None
        touched = [path for path in self.arrays if any(key.startswith(path + "/") for key in keys)] or self.arrays[:1]
        for path in touched:
            try:
                rows = cache.read(path)
            except SignalStoreError:
                continue
            expected = self.rows[path]
            if rows.shape != expected.shape or not np.array_equal(rows, expected, equal_nan=rows.dtype.kind == "f"):
                return path
        try:
            return None if cache.tokenizer_files() == self.tokenizer else "tokenizer"
        except SignalStoreError:
            return None


def run(flips: int, seed: int) -> dict[str, Any]:
    """The torture; AssertionError naming the first harm that went unseen."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    began = time.perf_counter()
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_material(folder)
        build(recipe_at(folder, folder / "cache.zarr"))
        victim = Victim(folder / "cache.zarr")
        while done["bit"] < flips:
            what, keys, held = victim.damage(chance)
            if not keys:
                continue
            named = victim.named()
            wrong = victim.silently_wrong(keys)
            victim.restore(held)
            if not any(key in named for key in keys):
                raise AssertionError(f"{what} of {keys} was not named: {sorted(named)[:5]}")
            if wrong is not None:
                raise AssertionError(f"{what} of {keys}: the reader gave {wrong} without a word")
            done[what] += 1
            done[f"on {kind_of(keys[0].removesuffix('.copy'))}"] += 1
        if victim.named():
            raise AssertionError("the victim was not put right")
    return {"harm": dict(sorted(done.items())), "seed": seed, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=2000, help="bit flips; the other harms come on top")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(run(args.flips, args.seed)) + "\n")


if __name__ == "__main__":
    guarded(main)
