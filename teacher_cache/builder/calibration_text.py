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
    """Segments spread evenly over each source, until its share is reached; every source is met."""
    chosen_units = _spread_units(planned)
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


def _spread_units(planned: Plan) -> list[int]:
    """Units spread evenly over the plan, and one in the middle of each source's own range, so that a small one is not missed."""
    count = planned.num_units
    chosen = set(planned.spread_units(MAX_UNITS_READ))
    ends = np.cumsum([unit["tokens"] for unit in planned.units])
    in_units = {split: sum(u["tokens"] for u in planned.units if u["split"] == split) for split in SPLITS}
    own = {split: sum(s.num_tokens for s in planned.sources if s.split == split) for split in SPLITS}
    with_context = {split: in_units[split] / max(1, own[split]) for split in SPLITS}  # overlap shows tokens twice
    for split in SPLITS:
        start = 0 if split == "train" else in_units["train"]
        for source in planned.sources:
            if source.split == split:
                tokens = round(source.num_tokens * with_context[split])
                chosen.add(min(count - 1, int(np.searchsorted(ends, start + tokens // 2, side="right"))))
                start += tokens
    return sorted(int(unit) for unit in chosen)
