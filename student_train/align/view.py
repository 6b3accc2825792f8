"""A view of a cache: its segments told again in a student's tokens, made once, by any number of processes, with no teacher.

A folder of its own, or a bucket: `begun.json` says of which cache and which tokenizer, `units/` has one object a unit whose key
holds its digest, and `view.json`, written when all are there, lists them. Every read is compared with that. A view can always be
made again from the cache and the tokenizer, so nothing repairs it: what is damaged is deleted, and `align` fills the gap.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from signal_store.cache import Cache
from signal_store.canonical import sha256
from signal_store.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from signal_store.io.objects import Objects, objects_at
from student_train.align.unit_view import UnitView

FORMAT = 1
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
        return cls.of_body(objects.uri, read_json(objects, VIEW))

    @classmethod
    def of_body(cls, uri: str, body: dict[str, Any]) -> "View":
        """As `view.json` says."""
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
        return read_unit(self.objects, number, self.units[number])

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


def read_unit(objects: Objects, number: int, digest: str) -> UnitView:
    """CorruptError where it is not what was written."""
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


def units_there(objects: Objects) -> dict[int, str]:
    """By number, the digests of units that are there."""
    found = (KEY.fullmatch(key) for key in objects.list(UNITS))
    return {int(match[1]): match[2] for match in found if match}


def read_json(objects: Objects, key: str) -> dict[str, Any]:
    """CorruptError where it is none."""
    try:
        found: dict[str, Any] = json.loads(objects.read(key))
    except ValueError as error:
        raise CorruptError(
            "not what align wrote", found=error, where=f"{objects.uri}/{key}", remedy="Make the view again."
        ) from error
    return found
