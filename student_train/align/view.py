"""A view of a cache: its segments told again in a student's tokens, made once, by any number of processes, with no teacher.

A folder of its own, or a bucket: `begun.json` says of which cache and which tokenizer, `units/` has one object a unit whose key
holds its digest, and `view.json`, written when all are there, lists them. Every read is compared with that. A view can always be
made again from the cache and the tokenizer, so nothing repairs it: what is damaged is deleted, and `align` fills the gap.
"""

import json
import os
import platform
import random
import re
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from run_kit.progress import progress_bar
from run_kit.worker_pool import worker_pool
from signal_store.cache import Cache, open_cache
from signal_store.canonical import sha256
from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError, OutOfMemoryError
from signal_store.io.local import LocalObjects
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import refuse_inside_a_cache
from student_train.align.spelling import spellings
from student_train.align.tokenizers import cached_tokenizer
from student_train.align.turns import TurnPair
from student_train.align.unit_view import UnitView, view_unit
from student_train.align.vocabularies import Vocabularies

FORMAT = 1
MOST_REFUSED = 0.02
"""Share of the segments."""
ALONE_SECONDS = 10.0
"""Work of this process before others are started: about what starting them costs."""
BEGUN, VIEW, UNITS, TOKENIZER = "begun.json", "view.json", "units", "tokenizer"
KEY = re.compile(rf"{UNITS}/([0-9]{{7}})-([0-9a-f]{{64}})")


@dataclass(frozen=True)
class View:
    """A finished one.

    `about`: of what it is, as `begun.json` says; `units`: digests; `longest`: tokens of its longest segment; `rows`: how many
    `segments` and `tokens` it has, how many segments could not be told (`untold_segments`, of which `refused_segments` because a
    tokenizer changes them), how many of its rows count (`counted`), how many of those are `one_to_one`, know the `same_text`, or
    are `within`, and the `text_bytes` that they predict.
    """

    uri: str
    about: dict[str, Any]
    units: tuple[str, ...]
    longest: int
    rows: dict[str, int]

    @classmethod
    def open(cls, uri: str) -> "View":
        """NotFoundError where there is none, IncompleteError where it is not finished."""
        objects = objects_at(uri)
        if not objects.exists(VIEW):
            begun = objects.exists(BEGUN)
            kind = IncompleteError if begun else NotFoundError
            what = "the view is not finished" if begun else "no view here"
            raise kind(what, expected="one made by student-train align", where=uri, remedy="Run student-train align.")
        return cls._of(objects.uri, _json(objects, VIEW))

    @classmethod
    def _of(cls, uri: str, body: dict[str, Any]) -> "View":
        return cls(uri, body["about"], tuple(body["units"]), body["longest"], body["rows"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew."""
        return View.open, (self.uri,)

    @cached_property
    def objects(self) -> Objects:
        """Where it lies."""
        return objects_at(self.uri)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The student's."""
        with tempfile.TemporaryDirectory() as folder:
            for name in self.about["tokenizer_files"]:
                (Path(folder) / name).write_bytes(self.objects.read(f"{TOKENIZER}/{name}"))
            found = load_tokenizer(folder)
        if tokenizer_digest(found) != self.about["student_tokenizer"]:
            raise CorruptError("the view's tokenizer was altered", where=f"{self.uri}/{TOKENIZER}", remedy="Make the view again.")
        return found

    def of_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> "View":
        """The same; MismatchError where it is in another tokenizer's tokens."""
        expected = {"student_tokenizer": tokenizer_digest(tokenizer), "student_end": tokenizer.eos_token}
        found = {name: self.about[name] for name in expected}
        if found != expected:
            raise MismatchError(
                "the view is in the tokens of another tokenizer",
                expected=expected,
                found=found,
                where=self.uri,
                remedy="Give align.view another place.",
            )
        self.__dict__["tokenizer"] = tokenizer
        return self

    def unit(self, number: int) -> UnitView:
        """CorruptError where it is not what was written."""
        return _read_unit(self.objects, number, self.units[number])

    def refuse_another(self, cache: Cache) -> None:
        """MismatchError where it is of another cache."""
        expected = {"cache_id": cache.manifest.cache_id, "units": cache.seal.num_units}
        found = {name: self.about[name] for name in expected}
        if found != expected:
            raise MismatchError(
                "the view is of another cache, or of an older generation",
                expected=expected,
                found=found,
                where=self.uri,
                remedy="Run student-train align into another folder.",
            )


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
        there = set(_there(objects))
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
    if not objects.create(BEGUN, _bytes(about)) and (standing := _json(objects, BEGUN)) != about:
        differ = [name for name in about if standing.get(name) != about[name]]
        raise MismatchError(
            f"another view lies here ({', '.join(differ)} differ)",
            expected={name: about[name] for name in differ},
            found={name: standing.get(name) for name in differ},
            where=objects.uri,
            remedy="Give another place.",
        )
    return about


def _read_unit(objects: Objects, number: int, digest: str) -> UnitView:
    key = f"{UNITS}/{number:07d}-{digest}"
    data = objects.read(key)
    if sha256(data) != f"sha256:{digest}":
        raise CorruptError(
            "a unit of the view was altered",
            expected=digest,
            found=sha256(data),
            where=f"{objects.uri}/{key}",
            remedy=f"Delete it, and {VIEW} if it is there, and run student-train align again.",
        )
    return UnitView.from_bytes(data)


def _there(objects: Objects) -> dict[int, str]:
    """By number, the digests of units that are there."""
    found = (KEY.fullmatch(key) for key in objects.list(UNITS))
    return {int(match[1]): match[2] for match in found if match}


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
        if unit in _there(self.objects):
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
    there = _there(objects)
    longest, rows = 0, Counter[str]()
    for number in range(num_units):
        unit = _read_unit(objects, number, there[number])
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
    return View._of(objects.uri, _json(objects, VIEW))  # noqa: SLF001  (its own module)


def _bytes(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def _json(objects: Objects, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(objects.read(key))
    except ValueError as error:
        raise CorruptError(
            "not what align wrote", found=error, where=f"{objects.uri}/{key}", remedy="Make the view again."
        ) from error
    return found
