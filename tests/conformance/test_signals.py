"""What holds of every signal on the teacher's side, whichever there are: its arrays mean something, its rows fit, they come out the
same again, alone or packed, and after a stop."""

import json
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import SEALS
from signal_store.signals import Signals, meaning
from teacher_cache.builder.calibrate import Calibrated, batches_of
from teacher_cache.commands.build import build
from teacher_cache.commands.calibrate import calibrate
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.base import first_row
from teacher_cache.signals.batch import extract_batch, plan_rows
from teacher_cache.signals.extracted import Extracted, Rows
from teacher_cache.signals.registry import capacities_of, extractor_class
from teacher_cache.signals.unit_work import UnitWork
from teacher_cache.teacher.batches import TeacherBatch
from tests.conftest import EVERY_SIGNAL, Once, RecipeMaker, every_source
from tests.tiny import needs_torch

pytestmark = needs_torch
SHARED_MEANINGS = {"row_start", "rows", "position"}
SIGNALS = {
    **EVERY_SIGNAL,
    "distribution": {"rank": 8, "samples": 2},
    "hidden": {"positions": {"fraction": 0.5}, "rank": 6},
    "stats": {"gradient": True},
    "replay": {"gradient": True},
}
NOISE = {"distribution/tail_codes": 8, "distribution/head_codes": 2}
"""Codes are compared as numbers: by so many steps they may differ where another kernel adds up in another order."""


@pytest.fixture(scope="module")
def recipe(once: Once, recipe_for: RecipeMaker, texts: dict[str, Path]) -> CacheRecipe:
    """Of a cache with every signal that this version has, built once."""

    def make(folder: Path) -> CacheRecipe:
        others: dict[str, Any] = {name: {} for name in Signals.model_fields if name not in SIGNALS}
        sources = [{**source, "max_documents": 10} for source in every_source(folder, texts)]
        return recipe_for(folder / "cache.zarr", signals={**SIGNALS, **others}, sources=sources, overlap=8)

    return make(once("conformance", lambda folder: build(make(folder))))


@pytest.fixture(scope="module")
def calibrated(recipe: CacheRecipe) -> Calibrated:
    return calibrate(recipe)


@pytest.fixture(scope="module")
def works(calibrated: Calibrated, recipe: CacheRecipe) -> list[UnitWork]:
    objects = objects_at(recipe.cache)
    return [UnitWork(number, calibrated.plan.unit(objects, number)) for number in range(calibrated.plan.num_units)]


def test_every_signal_has_an_extractor_of_its_own(calibrated: Calibrated) -> None:
    assert {extractor.name for extractor in calibrated.extractors} == {*Signals.model_fields, "tags"}
    for name in Signals.model_fields:
        section = type(getattr(calibrated.manifest.signals, name))
        assert extractor_class(name).__orig_bases__[0].__args__[0] is section  # type: ignore[attr-defined]


def test_arrays_mean_something(calibrated: Calibrated) -> None:
    named = {extractor.name for extractor in calibrated.extractors}
    for spec in calibrated.manifest.specs:
        if spec.path.split("/")[0] in named and spec.path.split("/")[-1] not in SHARED_MEANINGS:
            found = meaning(spec.path)
            assert found is not None or spec.path.endswith("/scale"), spec.path
            assert found is None or all(found), spec.path


def test_capacities_suffice_and_every_row_is_written(calibrated: Calibrated, works: list[UnitWork]) -> None:
    signals, plan = calibrated.manifest.signals, calibrated.manifest.plan
    needs = reduce(Capacities.union, (capacities_of(work.plan, signals, plan.context) for work in works))
    assert plan.capacities.holds(needs)
    assert all(needs.rows(name) > 0 for name in Capacities.model_fields)
    specs = {spec.path: spec for spec in calibrated.manifest.specs}
    for work in works:
        rows = unit_rows(calibrated, work)
        assert set(rows) == set(specs)
        for path, array in rows.items():
            assert array.dtype == specs[path].dtype, path
            assert array.shape[1:] == specs[path].row_shape, path
            assert len(array) <= specs[path].capacity_rows, path
        for name in Signals.model_fields:
            if f"{name}/rows/position" in specs:
                assert len(rows[f"{name}/rows/position"]) == int(rows[f"{name}/segments/rows"].sum())
                starts = rows[f"{name}/segments/row_start"]
                assert starts[0] == first_row(calibrated.manifest, f"{name}/rows/position", work.number)


def test_the_same_batch_gives_the_same_rows(calibrated: Calibrated, works: list[UnitWork]) -> None:
    for batch in batches_of(calibrated, works[0].plan)[:2]:
        first, second = (extract_batch(calibrated, UnitWork(0, works[0].plan), batch) for _ in range(2))
        assert first.saturated == second.saturated
        assert set(first.rows) == set(second.rows)
        for path, array in first.rows.items():
            assert array.tobytes() == second.rows[path].tobytes(), path


def test_neighbours_do_not_matter(calibrated: Calibrated, works: list[UnitWork]) -> None:
    """Segments one by one, and as the cache batches them. Ids that are drawn belong to the batch: they are drawn by its place."""
    work = works[0]
    batches = [batch for batch in batches_of(calibrated, work.plan) if batch.last - batch.first > 1][:3]
    assert batches
    for batch in batches:
        together = extract_batch(calibrated, work, batch)
        alone = [extract_batch(calibrated, work, TeacherBatch(s, s + 1, ((s,),))) for s in range(batch.first, batch.last)]
        for path, array in together.rows.items():
            if "sampled_ids" in path:
                continue
            parts = np.concatenate([one.rows[path] for one in alone])
            assert parts.shape == array.shape, path
            a, b = parts.astype(np.float64), array.astype(np.float64)
            room = 2e-2 * max(1.0, float(np.nanmax(np.abs(b)))) if array.dtype.kind == "f" and array.size else 2
            close = np.isclose(a, b, rtol=1e-3, atol=NOISE.get(path, room), equal_nan=True)
            assert close.mean() >= 0.99 if array.size else True, path  # near ties fall either way


def test_a_stopped_build_goes_on_to_the_same_bytes(recipe: CacheRecipe, tmp_path: Path) -> None:
    root = Path(shutil.copytree(recipe.cache, tmp_path / "cache.zarr"))
    shutil.rmtree(root / SEALS)
    lost = max((root / "ledger/units").iterdir())
    before = json.loads(lost.read_text())["body"]
    lost.unlink()
    build(recipe.model_copy(update={"cache": str(root)}))
    assert json.loads(lost.read_text())["body"] == before


def unit_rows(calibrated: Calibrated, work: UnitWork) -> Rows:
    """All rows of a unit."""
    parts = [extract_batch(calibrated, work, batch) for batch in batches_of(calibrated, work.plan)]
    joined = {path: np.concatenate([part.rows[path] for part in parts]) for path in parts[0].rows}
    return {**plan_rows(calibrated, work), **joined}


@pytest.mark.parametrize("name", Signals.model_fields)
def test_rows_that_are_not_the_batchs_are_refused(
    name: str, calibrated: Calibrated, works: list[UnitWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batches_of(calibrated, works[0].plan)[0]
    kind = next(type(extractor) for extractor in calibrated.extractors if extractor.name == name)
    whole: Any = kind.extract
    axes = {spec.path: spec.dimension_names[0] for spec in calibrated.manifest.specs}

    def short(self: Any, prepared: Any, seen: Any) -> Extracted:
        rows = whole(self, prepared, seen).rows
        return Extracted({path: array if axes[path] == "entry" else array[:-1] for path, array in rows.items()})

    def another(self: Any, prepared: Any, seen: Any) -> Extracted:
        return Extracted({"elsewhere/values": np.zeros(1)})

    made = extract_batch(calibrated, works[0], batch).rows
    counted = any(len(array) and path.startswith(f"{name}/") and axes[path] != "entry" for path, array in made.items())
    wrongs: list[tuple[Any, str]] = [(another, f"array that the signal does not have; .*signals.{name}")]
    for wrong, words in wrongs + ([(short, f"not a row for each .*signals.{name}")] if counted else []):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=words):
            patch.setattr(kind, "extract", wrong)
            extract_batch(calibrated, works[0], batch)
