"""The quality of a distribution that a recipe leaves open: `standard`, or what the cache was calibrated for before that was so."""

from pathlib import Path

import pytest

from signal_store.errors import MismatchError
from signal_store.signals import QUALITIES
from teacher_cache.builder.quality import DEFAULT
from teacher_cache.commands.build import build
from tests.conftest import RecipeMaker

BEFORE = {"head": 16, "rank": "auto", "max_scaled_kl_nats": 6e-3, "max_angle_degrees": 0.5}


def test_a_recipe_that_asks_for_none_gets_the_default(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    place = tmp_path / "cache.zarr"
    found = build(recipe_for(place, signals={"distribution": {"temperatures": [1, 2]}}))
    signal = found.manifest.signals.distribution
    assert signal is not None
    assert (signal.quality, signal.bounds, signal.temperatures) == (DEFAULT, QUALITIES[DEFAULT], (1.0, 2.0))
    for again in ({"temperatures": [1, 2]}, {"temperatures": [1, 2], "quality": DEFAULT}):
        assert build(recipe_for(place, signals={"distribution": again})).manifest.cache_id == found.manifest.cache_id


def test_a_cache_of_before_there_was_a_default_goes_on(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    place = tmp_path / "cache.zarr"
    found = build(recipe_for(place, signals={"distribution": BEFORE}))
    assert build(recipe_for(place, signals={"distribution": {}})).manifest.cache_id == found.manifest.cache_id
    with pytest.raises(MismatchError, match=r"signals\.distribution\.quality"):
        build(recipe_for(place, signals={"distribution": {"quality": DEFAULT}}))


def test_another_quality_is_not_taken_for_none(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    place = tmp_path / "cache.zarr"
    build(recipe_for(place, signals={"distribution": {"quality": "lean"}}))
    with pytest.raises(MismatchError, match=r"signals\.distribution\.quality: 'lean'"):
        build(recipe_for(place, signals={"distribution": {}}))
