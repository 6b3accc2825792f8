"""Making a view: any number of processes and machines, each unit written once, all of it read again before it counts."""

import json
import os
import platform
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from run_kit.progress import progress_bar
from run_kit.worker_pool import worker_pool
from signal_store.cache import Cache, open_cache
from signal_store.canonical import sha256
from signal_store.errors import MismatchError, OutOfMemoryError
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import refuse_inside_a_cache
from student_train.align.spelling import spellings
from student_train.align.tokenizers import cached_tokenizer
from student_train.align.turns import TurnPair
from student_train.align.unit_view import view_unit
from student_train.align.view import BEGUN, FORMAT, TOKENIZER, UNITS, VIEW, View, read_json, read_unit, units_there
from student_train.align.vocabularies import Vocabularies

MOST_REFUSED = 0.02
"""Share of the segments."""
ALONE_SECONDS = 10.0
"""Work of this process before others are started: about what starting them costs."""


def make_view(
    cache: Cache, tokenizer: PreTrainedTokenizerFast, uri: str, *, processes: int = 1, first_units: int | None = None
) -> View:
    """Tell every unit again that is not there yet, or only of the first so many, to look at. Several machines may do so at a time:
    each goes over the units in an order of its own, and leaves out what has come meanwhile.

    Raises:
        InputError: if the tokens of a tokenizer do not say their bytes, or the place is inside a cache.
        MismatchError: if another view lies there; or where more than `MOST_REFUSED` of the segments cannot be told, because one of
            the tokenizers changes them, with the first place that differs.
    """
    objects = objects_at(uri)
    if isinstance(objects, LocalObjects):
        refuse_inside_a_cache(Path(objects.uri))
    worker = _Worker(cache, tokenizer, uri)  # refuses tokenizers whose tokens do not say their bytes, before anything is written
    about = _begin(cache, tokenizer, objects)
    numbers = range(cache.seal.num_units if first_units is None else min(first_units, cache.seal.num_units))
    with progress_bar() as progress:
        bar = progress.add_task("align", total=len(numbers), unit="units")
        there = set(units_there(objects))
        progress.advance(bar, len(there))
        missing = [n for n in numbers if n not in there]
        random.Random(f"{os.getpid()} {platform.node()}").shuffle(missing)
        for _ in _told(worker, tokenizer, missing, processes):
            progress.advance(bar)
    return _finish(worker, about, len(numbers))


def _begin(cache: Cache, tokenizer: PreTrainedTokenizerFast, objects: Objects) -> dict[str, Any]:
    """Claim the place, or find it claimed for the same."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    about = {
        "format": FORMAT,
        "cache_id": cache.manifest.cache_id,
        "units": cache.seal.num_units,
        "teacher_tokenizer": cache.manifest.tokenizer.digest,
        "student_tokenizer": tokenizer_digest(tokenizer),
        "student_end": tokenizer.eos_token,
        "tokenizer_files": list(files),
    }
    for name, data in files.items():
        objects.create(f"{TOKENIZER}/{name}", data)
    if not objects.create(BEGUN, _bytes(about)) and (standing := read_json(objects, BEGUN)) != about:
        differ = [name for name in about if standing.get(name) != about[name]]
        raise MismatchError(
            f"another view lies here ({', '.join(differ)} differ)",
            expected={name: about[name] for name in differ},
            found={name: standing.get(name) for name in differ},
            where=objects.uri,
            remedy="Give another place.",
        )
    return about


def _told(worker: "_Worker", tokenizer: PreTrainedTokenizerFast, units: list[int], processes: int) -> Iterator[int]:
    started = time.perf_counter()
    waiting = deque(units)
    while waiting and (processes == 1 or time.perf_counter() - started < ALONE_SECONDS):
        yield worker.tell(waiting.popleft())
    if not waiting:
        return
    places = [(part.uri, part.seal.generation) for part in worker.cache.parts]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        arguments = ([uri for uri, _ in places], places[0][1], folder, worker.objects.uri)
        with worker_pool(min(processes, len(waiting)), _begin_process, arguments) as pool:
            try:
                yield from pool.map(_tell, waiting)
            except BrokenProcessPool as error:
                raise OutOfMemoryError(
                    "a process that aligns was ended from outside",
                    found="most often a system short of memory",
                    remedy="Lower --processes; the same command goes on.",
                ) from error


class _Worker:
    """Of one process."""

    here: "_Worker"

    def __init__(self, cache: Cache, tokenizer: PreTrainedTokenizerFast, uri: str) -> None:
        teacher, student = spellings(cached_tokenizer(cache), tokenizer)
        self.cache, self.objects = cache, objects_at(uri)
        self.vocabularies = Vocabularies(teacher, student, len(student.symbols))
        self.turns = TurnPair.of(teacher, student) if any(source.chats is not None for source in cache.sources) else None

    def tell(self, unit: int) -> int:
        """Write a unit, unless it has come meanwhile."""
        if unit in units_there(self.objects):
            return unit
        data = view_unit(self.cache, unit, self.vocabularies, self.turns).to_bytes()
        self.objects.put(f"{UNITS}/{unit:07d}-{sha256(data).removeprefix('sha256:')}", data)
        return unit


def _begin_process(cache: list[str], generation: int, tokenizer: str, uri: str) -> None:
    opened = open_cache(cache, generation=generation if len(cache) == 1 else None)
    _Worker.here = _Worker(opened, load_tokenizer(tokenizer), uri)


def _tell(unit: int) -> int:
    return _Worker.here.tell(unit)


def _finish(worker: _Worker, about: dict[str, Any], num_units: int) -> View:
    """Read all of it once more, and write down what it is."""
    objects = worker.objects
    there = units_there(objects)
    longest, rows = 0, Counter[str]()
    for number in range(num_units):
        unit = read_unit(objects, number, there[number])
        longest = max(longest, int(unit.length.max()))
        counts = unit.counts
        rows["segments"] += len(unit.length)
        rows["untold_segments"] += int((unit.length == 0).sum())
        rows["refused_segments"] += int(unit.refused.sum())
        rows["tokens"] += int(unit.length.sum())
        rows["counted"] += int(counts.sum())
        rows["one_to_one"] += int((counts & unit.one_to_one).sum())
        rows["same_text"] += int((counts & unit.same_text).sum())
        rows["within"] += int((counts & unit.within).sum())
        rows["text_bytes"] += int(unit.text_bytes[1:][counts[:-1]].sum())
    if rows["refused_segments"] > MOST_REFUSED * rows["segments"]:
        for number in range(num_units):
            view_unit(worker.cache, number, worker.vocabularies, worker.turns, raises=True)  # says where the first of them differs
    if not rows["counted"]:
        raise MismatchError(
            "no segment can be told in the student's tokens",
            expected="texts, or chats that both templates render",
            found=f"{rows['untold_segments']} segments that cannot",
            where=objects.uri,
        )
    digests = [there[number] for number in range(num_units)]
    body = {"about": about, "units": digests, "longest": longest, "rows": dict(rows)}
    objects.create(VIEW, _bytes(body))
    return View.of_body(objects.uri, read_json(objects, VIEW))


def _bytes(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()
