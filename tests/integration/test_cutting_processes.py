"""Cutting in processes: in order, with errors as they are."""

import os
import time
from typing import Any

import pytest

from signal_store.errors import InputError, OutOfMemoryError
from teacher_cache.corpus import processes
from teacher_cache.corpus.cutting import BadRow, Job, Outcome
from teacher_cache.corpus.processes import Cutting
from teacher_cache.corpus.rows import Row
from teacher_cache.recipe import Source


class Slow:
    """Stands in for a cutter. Later jobs are done earlier; what it is told to do by a row's place, it does."""

    def elsewhere(self) -> "Slow":
        return self

    def cut(self, job: Job) -> list[Outcome]:
        (row,) = job.rows
        if row.where == "die":
            os._exit(7)
        if row.where == "refuse":
            raise InputError("refused", found=(i for i in "nothing that can be sent"), where="row 3", remedy="Repair it.")
        time.sleep(0.02 * (4 - row.number % 5))
        return [BadRow(row.number, InputError("none", found=os.getpid()))]


def numbered(*places: str) -> list[Job]:
    source = Source(name="s", jsonl="a.jsonl")
    return [Job(source, 0, [Row(number, place, b"", 0)]) for number, place in enumerate(places)]


def test_outcomes_come_in_order_and_errors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.0)
    cutter: Any = Slow()
    with Cutting(cutter, 2) as cutting:
        found = [outcomes[0] for _, outcomes in cutting.outcomes(numbered(*"abcdefghijklmn"))]
        assert [bad.number for bad in found if isinstance(bad, BadRow)] == list(range(14))
        assert os.getpid() not in {bad.error.found for bad in found if isinstance(bad, BadRow)}
        with pytest.raises(InputError) as caught:
            list(cutting.outcomes(numbered("a", "refuse", "b")))
        assert "refused; found <generator" in str(caught.value)
        assert str(caught.value).endswith("in row 3. Repair it.")
        with pytest.raises(OutOfMemoryError, match="ended from outside"):
            list(cutting.outcomes(numbered("a", "die", "b", "c")))


def test_a_small_corpus_starts_no_process() -> None:
    cutter: Any = Slow()
    with Cutting(cutter, 8) as cutting:
        found = [outcomes[0] for _, outcomes in cutting.outcomes(numbered("a", "b"))]
    assert [bad.error.found for bad in found if isinstance(bad, BadRow)] == [os.getpid()] * 2
