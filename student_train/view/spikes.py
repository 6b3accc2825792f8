"""Which samples were behind the jumps of a run's loss.

A spike is a step whose loss lies far above the steps before it: more than `SPREADS` times their median absolute deviation above
their median. The stream is a function, so the step's rows are made again, from the tokens alone and cut as the run's record says;
segments are ranked by how much the teacher was surprised by them, where the cache holds that, and shown with their escapes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError, NotFoundError
from signal_view import CacheView
from signal_view.coloured import surprise_and_entropy
from signal_view.summary import printable
from student_train.align.aligned_cache import segment_lengths
from student_train.data.request import TOKENS_ONLY
from student_train.data.stream import Stream
from student_train.recipe import RunRecipe
from student_train.session.reading import finished_cache
from student_train.session.run_record import Begun
from student_train.student.build import build_student
from student_train.student.packing import packs_rows
from student_train.train.metrics import METRICS, read_metrics
from student_train.view.students import cache_of, recipe_of

BEFORE = 50
LEAST_BEFORE = 8
SPREADS = 8.0
LEAST_SHARE = 0.02
"""Of the median: a smaller jump is none, however quiet the steps before were."""
SHOWN_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Suspect:
    """A segment of a step: `surprise` mean −log p of its tokens by the teacher, in nats, None where the cache does not hold it;
    `text` how it begins, escapes shown."""

    segment: int
    source: str
    document: int
    tokens: int
    surprise: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Spike:
    """Step `step` (from 1) had `loss` where the steps before had `usual`; `suspects`, the most surprising first."""

    step: int
    loss: float
    usual: float
    suspects: tuple[Suspect, ...]


def spike_steps(losses: list[tuple[int, float]]) -> Iterator[tuple[int, float, float]]:
    """(step, loss, median before) of the jumps in (step, loss) pairs: of every loss that is not finite, and of those far above the
    steps before; the first `LEAST_BEFORE` have too few before them to be judged, and are, against those after."""
    values = np.asarray([loss for _, loss in losses])
    for place, (step, loss) in enumerate(losses):
        near = values[max(0, place - BEFORE) : place] if place >= LEAST_BEFORE else np.delete(values[: 2 * LEAST_BEFORE + 1], place)
        near = near[np.isfinite(near)]
        usual = float(np.median(near)) if len(near) else math.nan
        spread = max(float(np.median(np.abs(near - usual))), LEAST_SHARE * abs(usual) / SPREADS) if len(near) else math.nan
        if not math.isfinite(loss) or (len(near) >= LEAST_BEFORE and loss > usual + SPREADS * spread):
            yield step, loss, usual


def find_spikes(run: Path, most: int, suspects: int) -> list[Spike]:
    """Find them, and make the rows of their steps again. See `student_train.commands.doctor`."""
    path = run / METRICS
    if not path.is_file():
        raise NotFoundError("the run has no log", expected=METRICS, where=run)
    recipe = recipe_of(run)
    if recipe.checkpoint.accept_other_cache:
        raise InputError("the run went over to another cache: its early steps cannot be made again", where=run)
    records = {int(record["step"]): record for record in read_metrics(path) if isinstance(record.get("loss"), int | float)}
    losses = [(step, float(record["loss"])) for step, record in records.items()]
    found = sorted(spike_steps(losses), key=lambda spike: (math.isfinite(spike[1]), spike[2] - spike[1], spike[0]))[:most]
    if not found:
        return []
    cache, packed = cache_of(run), Begun.of(run).packed
    read = finished_cache(recipe, cache)
    segments = segments_of(recipe, read, {step for step, _, _ in found}, packed)
    for step, numbers in segments.items():
        made, logged = sum(segment_lengths(read, numbers)), int(records[step].get("tokens", -1))
        if made != logged:
            raise _other_rows(run, step, made, logged, packed)
    return [Spike(step, loss, usual, tuple(_ranked(cache, set(segments[step]))[:suspects])) for step, loss, usual in sorted(found)]


def _other_rows(run: Path, step: int, found: int, logged: int, packed: bool | None) -> MismatchError:
    """A student that packs rows here and did not there has seen others."""
    unknown = "Run it where the run was made: whether rows are packed depends on the attention there, and the record does not say."
    return MismatchError(
        "the step's rows cannot be made again here",
        expected=f"{logged} tokens",
        found=found,
        where=f"{run}, step {step}",
        remedy="Use the version of teacher-cache that the record names." if packed is not None else unknown,
    )


def segments_of(recipe: RunRecipe, cache: Cache, steps: set[int], packed: bool | None = None) -> dict[int, list[int]]:
    """By step (from 1), the segments of its rows, one that stands in it twice, in a small cache, twice; the stream is walked from
    its beginning. `packed`: whether its rows hold several segments; None asks the student, as records of before did not say."""
    stream = recipe.stream
    if packed is None:
        packed = packs_rows(build_student(recipe.student, cache)[0], cache, stream.sequence_length, stream.forward_rows)
    config = stream.model_copy(update={"micro_batch_rows": None})
    batches = Stream(cache, TOKENS_ONLY, config, packed=packed).micro_batches({}, 0)
    return {step: sorted(batch.segments) for step, batch in enumerate(islice(batches, max(steps)), start=1) if step in steps}


def _ranked(cache: CacheView, segments: set[int]) -> list[Suspect]:
    held = cache.manifest.signals.distribution is not None
    found = []
    for number in segments:
        segment = cache[number]
        surprise = None
        if held:
            values, _ = surprise_and_entropy(segment)
            surprise = float(np.nanmean(values)) if np.isfinite(values).any() else None
        text = ascii(segment.text[:SHOWN_CHARACTERS])
        found.append(Suspect(segment.index, segment.source, segment.document, len(segment), surprise, text))
    return sorted(found, key=lambda suspect: -(suspect.surprise or 0.0))


def facts_of(found: Sequence[Spike]) -> list[dict[str, Any]]:
    """For JSON, which knows no number that is not finite."""
    return [asdict(spike) | {"loss": _finite(spike.loss), "usual": _finite(spike.usual)} for spike in found]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text_of(found: Sequence[Spike]) -> str:
    """For a terminal, escapes shown."""
    if not found:
        return "no spike: no step's loss lies far above the steps before it"
    lines = []
    for spike in found:
        lines.append(f"step {spike.step}: loss {spike.loss:.4f}, before it {spike.usual:.4f}")
        for s in spike.suspects:
            surprise = "" if s.surprise is None else f", teacher's surprise {s.surprise:.2f} nats"
            about = f"{printable(s.source)}, document {s.document}, {s.tokens} tokens{surprise}"
            lines.append(f"  segment {s.segment} ({about}): {s.text}")
    return "\n".join(lines)
