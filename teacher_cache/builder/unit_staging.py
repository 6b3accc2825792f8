"""From texts to unit plans that wait in a staging folder: tokens, segments, whole segments to units."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import vocabulary_size
from run_kit.progress import progress_bar
from signal_store.canonical import sha256
from signal_store.errors import InputError, SignalStoreError
from signal_store.format.capacities import Capacities
from signal_store.format.grid import rounded_capacity
from signal_store.io.objects import Objects
from signal_store.ledger.documents import plan_unit_key
from signal_store.manifest import Split
from teacher_cache.builder.source_stats import SourceStats, tell_skips
from teacher_cache.corpus.cutting import BadRow, Cutter, Job
from teacher_cache.corpus.processes import Cutting
from teacher_cache.corpus.roles import make_tagger
from teacher_cache.corpus.rows import Row
from teacher_cache.corpus.segments import PlannedSegment
from teacher_cache.corpus.template import template_of
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.registry import capacities_of

SPLITS: tuple[Split, ...] = ("train", "validation")
NOTHING = Capacities()
MOST_ROWS, MOST_BYTES = 256, 2**18
"""Rows of one job: about a second of tokenising."""
NO_ROOM = Capacities(segments=1, hidden_rows=1, attention_rows=1, attention_entries=1, replay_rows=1)


@dataclass(frozen=True, slots=True)
class StagedUnits:
    """Units that wait in a staging folder: what the plan says of each, and the room they need."""

    units: list[dict[str, Any]]
    needs: Capacities


def stage_units(
    recipe: CacheRecipe,
    objects: Objects,
    prefix: str,
    tokenizer: PreTrainedTokenizerFast,
    all_stats: list[SourceStats],
    room: Capacities | None,
    processes: int = 1,
) -> StagedUnits:
    """Write the unit plans of all the sources' texts to `prefix`; no unit needs more than `room` where there is one."""
    units: list[dict[str, Any]] = []
    needs = NO_ROOM
    _prepare(all_stats, tokenizer)
    cutter = Cutter(recipe, tokenizer, {stats.source.name: stats.words for stats in all_stats})
    vocabulary = vocabulary_size(tokenizer)

    def needs_of(unit: UnitPlan) -> Capacities:
        return capacities_of(unit, recipe.signals, recipe.context)

    with progress_bar() as progress, Cutting(cutter, processes) as cutting:
        bar = progress.add_task("plan", total=None, unit="tokens")
        for split in SPLITS:
            segments = _segments(cutting, [t for t in all_stats if t.source.split == split])
            for unit in _units(segments, recipe.resolved_unit_tokens, needs_of, room):
                _refuse_unknown_ids(unit, vocabulary)
                data = unit.to_bytes()
                objects.put(f"{prefix}/{len(units):07d}", data)
                units.append({"digest": sha256(data), "split": split, "segments": len(unit.length), "tokens": unit.num_tokens})
                needs = needs.union(needs_of(unit))
                progress.advance(bar, unit.num_tokens)
        for stats in all_stats:
            tell_skips(stats, progress.console)
    return StagedUnits(units, needs)


def publish_units(objects: Objects, prefix: str, units: Sequence[dict[str, Any]], first: int) -> None:
    """Move staged unit plans to their keys, which name their content: another planner moves the same bytes or other keys."""
    for number, unit in enumerate(units):
        objects.publish(f"{prefix}/{number:07d}", plan_unit_key(first + number, unit["digest"]))


def _prepare(all_stats: Sequence[SourceStats], tokenizer: PreTrainedTokenizerFast) -> None:
    """All that may be missing, for every source before anything is tokenised."""
    for stats in all_stats:
        source = stats.source
        if source.messages is not None:
            template_of(tokenizer, source.chat_template, tools=source.tools is not None, where=f"source {source.name}")
        if stats.source.tagger is not None:
            stats.words, stats.tagger = make_tagger(stats.source.tagger)


def _refuse_unknown_ids(unit: UnitPlan, vocabulary: int) -> None:
    largest = int(unit.input_ids.max())
    if largest >= vocabulary:
        raise InputError(
            "the tokenizer gives an id that its vocabulary lacks",
            expected=f"below {vocabulary}",
            found=largest,
            where="tokenizer.json",
        )


def _units(
    segments: Iterable[tuple[SourceStats, PlannedSegment]],
    unit_tokens: int,
    needs_of: Callable[[UnitPlan], Capacities],
    room: Capacities | None,
) -> Iterator[UnitPlan]:
    """Units of one split: whole segments, in order, until the next would not fit."""
    pending: list[PlannedSegment] = []
    free, used = unit_tokens, NOTHING
    for stats, segment in segments:
        needed = NOTHING if room is None else needs_of(UnitPlan.of([segment]))
        if room is not None and not room.holds(needed):
            raise InputError(
                "a new segment has more rows than the cache has room for",
                expected=room.model_dump(),
                found=needed.model_dump(),
                where=f"source {stats.source.name}",
                remedy="Build such documents into a cache of their own.",
            )
        if len(segment) > free or (room is not None and not room.holds(used.plus(needed))):
            yield UnitPlan.of(pending)
            pending, free, used = [], unit_tokens, NOTHING
        pending.append(segment)
        free -= len(segment)
        used = used.plus(needed)
    if pending:
        yield UnitPlan.of(pending)


def rounded(capacities: Capacities) -> Capacities:
    """The room that the arrays really have."""
    return Capacities(**{name: rounded_capacity(rows) for name, rows in capacities.model_dump().items()})


def _segments(cutting: Cutting, all_stats: Sequence[SourceStats]) -> Iterator[tuple[SourceStats, PlannedSegment]]:
    """All segments of some sources, in order, each with the source that it counts for."""
    by_number = {stats.number: stats for stats in all_stats}
    for job, outcomes in cutting.outcomes(_jobs(all_stats)):
        stats = by_number[job.number]
        for outcome in outcomes:
            if stats.is_full:
                break
            if isinstance(outcome, BadRow):
                _skip(stats, outcome)
                if outcome.text is None:
                    continue
            if stats.has_its_documents:  # where rows to skip were expected: the text is another, as its digest will show
                stats.known_skips = 0
                break
            assert outcome.text is not None
            stats.see(outcome.text)
            if isinstance(outcome, BadRow):  # it counts as a document, for it is one whenever the source is read again
                stats.num_unfit_documents += 1
                continue
            stats.num_empty_documents += outcome.is_empty
            for segment in outcome.segments:
                stats.see_segment(segment)
                yield stats, replace(segment, document=stats.first_document + stats.num_documents - 1)
        if job.failure is not None and not stats.is_full:
            raise job.failure


def _skip(stats: SourceStats, row: BadRow) -> None:
    if stats.source.on_bad_row == "stop":
        raise row.error
    if row.text is None:
        stats.skips.add(row.number, row.error)
    else:
        stats.skips.tell(row.number, row.error)


def _jobs(all_stats: Sequence[SourceStats]) -> Iterator[Job]:
    """Rows of some sources in handy numbers. What stops the reading comes with the rows before it."""
    for stats in all_stats:
        failure = None
        while not stats.is_full and failure is None:
            left = MOST_ROWS if stats.limit is None else max(1, stats.limit - stats.num_documents)
            taken, failure = _taken(stats.rows, min(left, MOST_ROWS))
            if not taken and failure is None:
                break
            yield Job(stats.source, stats.number, taken, failure)


def _taken(rows: Iterator[Row], most: int) -> tuple[list[Row], SignalStoreError | None]:
    taken: list[Row] = []
    size = 0
    try:
        while len(taken) < most and size < MOST_BYTES and (row := next(rows, None)) is not None:
            taken.append(row)
            size += row.size
    except SignalStoreError as error:
        return taken, error
    return taken, None
