"""Which segments calibration reads: spread evenly over each source."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from signal_store.io.objects import Objects
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.unit_staging import SPLITS
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.teacher.batches import TeacherBatch

MAX_UNITS_READ = 64


@dataclass(frozen=True, slots=True)
class Pick:
    """Segments of a unit to calibrate on, as batches of one segment each."""

    number: int
    unit: UnitPlan
    batches: list[TeacherBatch]


def picks(planned: Plan, objects: Objects, by_source: Sequence[int]) -> list[Pick]:
    """Segments spread evenly over what `sampled_units` hold of each source, until its share of tokens is reached; of every source
    that has tokens one segment at least."""
    chosen_units = sampled_units(planned)
    units = [planned.unit(objects, u) for u in chosen_units]
    picked: list[list[int]] = [[] for _ in units]
    for source in range(len(planned.sources)):
        places = [(u, int(s)) for u, unit in enumerate(units) for s in np.flatnonzero(unit.source == source)]
        total = sum(int(units[u].length[s] - units[u].context_only[s]) for u, s in places)
        count = min(len(places), max(1, round(len(places) * by_source[source] / max(1, total))))
        for i in np.linspace(0, len(places) - 1, count).round().astype(int) if places else ():
            u, s = places[i]
            picked[u].append(s)
    return [
        Pick(number, unit, [TeacherBatch(s, s + 1, ((s,),)) for s in sorted(set(segments))])
        for number, unit, segments in zip(chosen_units, units, picked, strict=True)
        if segments
    ]


def sampled_units(planned: Plan) -> list[int]:
    """The units that calibration reads: of a plan of `MAX_UNITS_READ` or fewer all, of a longer one so many spread evenly, and the
    unit that holds the middle segment of each source, so that a small one is not missed. A plan lays segments out source by source,
    train before validation, and counts them: no unit is read to know whose it is."""
    chosen, first = set(planned.spread_units(MAX_UNITS_READ)), 0
    for document in (planned.document, *planned.extensions):
        counts = np.asarray([s["num_segments"] for split in SPLITS for s in document.body["sources"] if s["split"] == split])
        ends = np.cumsum([unit["segments"] for unit in document.body["units"]])
        middles = (np.cumsum(counts) - counts + counts // 2)[counts > 0]
        chosen |= {first + int(unit) for unit in np.searchsorted(ends, middles, side="right")}
        first += len(ends)
    return sorted(chosen)
