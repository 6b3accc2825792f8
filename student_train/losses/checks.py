"""What an objective wants of a cache as a whole, and the refusals where it is not there. What a term wants, its file refuses."""

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.losses.section import Losses
from student_train.losses.term import not_cached

MIN_HEAD_MASS = 0.9
"""Least mean mass of the head at which a cache without a tail serves a temperature."""


def check_distribution(losses: Losses, cache: Cache) -> None:
    """MismatchError where a divergence has nothing to compare with."""
    for name in losses.divergences:
        if cache.manifest.signals.distribution is None:
            raise not_cached(name, "signals.distribution", cache)


def check_temperatures(losses: Losses, cache: Cache) -> None:
    """MismatchError where the cache, which holds the distribution, cannot serve a temperature."""
    for name, section in losses.divergences.items():
        _check_temperature(name, section.temperature, cache)


def check_tags(losses: Losses, cache: Cache) -> None:
    """MismatchError where weights of tokens have nothing to go by, or nothing to weigh."""
    if "tags/roles" not in cache.capacity_rows:
        raise MismatchError(
            "importance needs the roles of words, which the cache does not hold",
            expected="tags/roles",
            found="none",
            where=cache.uri,
            remedy="Build a cache whose sources have a tagger, or switch importance off.",
        )
    if not losses.divergences:
        raise MismatchError("importance weighs the tokens of a divergence", expected="one", found="none", where="losses")


def check_tail_rank(losses: Losses, cache: Cache, tail_rank: int | None) -> None:
    """A coarser tail is the user's wish, even none at all; a finer one than is cached cannot be."""
    held = cache.manifest.calibration.tail_rank
    if tail_rank is not None and (not losses.divergences or tail_rank > held):
        raise MismatchError(
            "tail_rank asks for what is not there", expected=f"a divergence, and at most {held}", found=tail_rank, where="tail_rank"
        )


def _check_temperature(term: str, wanted: float, cache: Cache) -> None:
    signal = cache.manifest.signals.distribution
    assert signal is not None
    if wanted not in signal.temperatures:
        raise MismatchError(
            f"{term}: the cache cannot serve this temperature",
            expected=f"one of {list(signal.temperatures)}",
            found=wanted,
            where=cache.uri,
            remedy="Train at one of them, or build a cache whose signals.distribution.temperatures hold it.",
        )
    mass = cache.manifest.calibration.coverage[signal.temperatures.index(wanted)]
    if cache.manifest.calibration.tail_rank == 0 and mass < MIN_HEAD_MASS:
        raise MismatchError(
            f"{term}: the cache has no tail and its head holds too little at this temperature",
            expected=f"a mean mass of {MIN_HEAD_MASS}",
            found=f"{mass:.3f}",
            where=cache.uri,
            remedy="Lower the temperature, or build a cache with a tail.",
        )
