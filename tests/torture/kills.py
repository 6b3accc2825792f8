"""SIGKILL at random moments of plan, calibrate, fill and seal, with one to three workers, two of them on the same units.

    python -m tests.torture.kills --kills 200

Each round builds a cache while workers are killed, until it is sealed; then it must equal the undisturbed one in every byte of
every array and of every record outside its `about` block. Every second round, attempts are made to differ on purpose: then every
unit must be whole and of one attempt. Workers are forked from a process that has imported everything, so that kills hit work.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from run_kit.command_line import guarded
from signal_store.cache import open_cache
from signal_store.io.local import LocalObjects
from signal_store.ledger.documents import newest_generation
from teacher_cache.builder import fill as fill_module
from teacher_cache.commands.build import build
from teacher_cache.commands.fill import fill
from teacher_cache.commands.seal import seal
from teacher_cache.commands.verify import verify
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.batch import extract_batch
from teacher_cache.worker import Worker
from tests.torture.material import contents, make_material, recipe_at

MARK = 0
"""Column of `distribution/scalars` that a marked attempt overwrites with its own number."""


def marked_extract(*args: Any) -> Any:
    found = extract_batch(*args)
    found.rows["distribution/scalars"][:, MARK] = -float(os.getpid() % 1999)
    return found


def start(recipe: CacheRecipe, worker: Worker, *, marked: bool) -> int:
    """Fork a worker that fills and seals; its process id."""
    pid = os.fork()
    if pid:
        return pid
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    if marked:
        setattr(fill_module, "extract_batch", marked_extract)  # noqa: B010  (a module attribute)
    code = 1
    try:
        fill(recipe, worker)
        seal(recipe.cache)
        code = 0
    finally:
        os._exit(code)


def reap(pids: list[int], *, kill: bool) -> int:
    """Kill and wait for all; how many were still at work when they were killed."""
    for pid in pids if kill else []:
        os.kill(pid, signal.SIGKILL)
    return sum(os.WIFSIGNALED(os.waitpid(pid, 0)[1]) for pid in pids)


def is_sealed(recipe: CacheRecipe) -> bool:
    return newest_generation(LocalObjects(recipe.cache)) is not None


def torment(recipe: CacheRecipe, chance: random.Random, longest: float, wanted: int, *, marked: bool) -> int:
    """Start and kill workers until the cache is sealed, or enough kills have been; then let one finish. Number of kills."""
    kills = 0
    while not is_sealed(recipe) and kills < wanted:
        # Labels 0/1 twice are two workers on the same units; 0/2 and 1/2 share them.
        workers = chance.choice(
            [[Worker()], [Worker(), Worker()], [Worker(0, 2), Worker(1, 2)], [Worker(), Worker(0, 2), Worker(1, 2)]]
        )
        pids = [start(recipe, worker, marked=marked) for worker in workers]
        time.sleep(chance.uniform(0.0, longest))
        kills += reap(pids, kill=True)
    reap([start(recipe, Worker(), marked=marked)], kill=False)
    return kills


def check_marks(recipe: CacheRecipe) -> None:
    """Every unit is of one attempt, and the whole is as it was committed."""
    cache = open_cache(recipe.cache)
    rows = cache.capacity_rows["distribution/scalars"]
    scalars = cache.read("distribution/scalars")[:, MARK]
    for unit in range(cache.seal.num_units):
        own = scalars[unit * rows : (unit + 1) * rows]
        if len(np.unique(own[~np.isnan(own)])) != 1:
            raise AssertionError(f"unit {unit} is of several attempts")


def run(kills: int, seed: int) -> dict[str, Any]:
    """The torture; AssertionError where the cache is not what it should be."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_material(folder)
        undisturbed = recipe_at(folder, folder / "undisturbed.zarr")
        started = time.perf_counter()
        build(undisturbed)
        longest = 0.7 * (time.perf_counter() - started)
        expected = contents(Path(undisturbed.cache))
        done, rounds = 0, 0
        while done < kills:
            marked = rounds % 2 == 1
            recipe = recipe_at(folder, folder / f"round-{rounds}.zarr")
            done += torment(recipe, chance, longest, kills - done, marked=marked)
            rounds += 1
            if damages := verify(recipe.cache).damages:
                raise AssertionError(f"round {rounds}: {damages[:3]}")
            if marked:
                check_marks(recipe)
            else:
                found = contents(Path(recipe.cache))
                differ = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
                if differ:
                    raise AssertionError(f"round {rounds}: differs in {sorted(differ)[:5]}")
            shutil.rmtree(recipe.cache)
    return {"kills": done, "rounds": rounds, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(run(args.kills, args.seed)) + "\n")


if __name__ == "__main__":
    guarded(main)
