"""The stream over a cache: every segment once an epoch, the cache's own numbers in batches, ranks and workers that change nothing."""

import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.data import signals
from student_train.data.batch import CodedBatch, LaneCursor
from student_train.data.loader import load
from student_train.data.placement import Row
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.attention import AttentionPart, AttentionRequest
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.data.stream import Cursor, Stream
from teacher_cache.commands.build import build
from tests.tiny import CODE, CONTEXT, PROSE, write_jsonl

ALL = SignalRequest.of(DistributionRequest(), HiddenRequest(tuple(("block_output", n) for n in (1, 2, 3))), AttentionRequest((4,)))


def stream_of(cache: Cache, request: SignalRequest = TOKENS_ONLY, **config: Any) -> Stream:
    return Stream(
        cache,
        request,
        StreamSection.model_validate({"sequence_length": 64, "global_batch_rows": 6, "window_units": 2, **config}),
        packed=True,
    )


def train_segments(cache: Cache) -> list[int]:
    firsts = np.concatenate([[0], np.cumsum(cache.segments_per_unit)])
    return [s for u in cache.units("train") for s in range(firsts[u], firsts[u + 1])]


def lane_rows(stream: Stream, number: int, epochs: int) -> list[Row]:
    """A lane's rows up to the end of an epoch."""
    lane = stream.lane(number, LaneCursor())
    rows: list[Row] = []
    while True:
        row = lane.row(len(rows))
        if lane.at.epoch >= epochs:
            return rows
        rows.append(row)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lanes", [1, 3])
def test_an_epoch_holds_every_segment_once(cache: Cache, lanes: int, packed: bool) -> None:
    stream = replace(stream_of(cache, lanes=lanes), packed=packed)
    assert stream.lanes == min(lanes, len(cache.units("train")))
    rows = [row for lane in range(stream.lanes) for row in lane_rows(stream, lane, 1)]
    seen = [unit.first_segment + segment for row in rows for unit, segment in row]
    assert sorted(seen) == train_segments(cache)
    assert all(sum(int(u.segments["length"][s]) for u, s in row) <= 64 for row in rows)
    assert packed or all(len(row) == 1 for row in rows)
    twice = [
        unit.first_segment + segment for lane in range(stream.lanes) for row in lane_rows(stream, lane, 2) for unit, segment in row
    ]
    assert sorted(twice) == sorted(2 * train_segments(cache))


@given(rows=st.integers(1, 40), lanes=st.integers(1, 9), row=st.integers(0, 10**12))
def test_rows_are_dealt_to_lanes_without_gap_or_overlap(cache: Cache, rows: int, lanes: int, row: int) -> None:
    stream = stream_of(cache, global_batch_rows=rows, lanes=lanes)
    places = [stream.place_of(row + i) for i in range(3 * rows * lanes)]
    for lane in range(stream.lanes):
        inside = [n for number, n in places if number == lane]
        assert inside == list(range(inside[0], inside[0] + len(inside))) if inside else True


def steps_of(stream: Stream, cursor: Cursor, first_step: int, count: int) -> tuple[list[tuple[int, ...]], Cursor]:
    """The segments of each step, and where the lanes go on."""
    found = []
    micro = stream.micro_batches(cursor, first_step)
    for _ in range(count):
        batches = list(islice(micro, stream.micro_steps))
        found.append(tuple(s for batch in batches for s in batch.segments))
        for batch in batches:
            cursor = cursor | batch.cursor
    return found, cursor


@settings(max_examples=20, deadline=None)
@given(
    steps=st.integers(0, 9), world=st.sampled_from([1, 2, 3, 8]), micro=st.booleans(), workers=st.integers(1, 3),
    lanes=st.integers(1, 5), packed=st.booleans(),
)  # fmt: skip
def test_ranks_and_workers_share_one_stream_and_resume_exactly(
    cache: Cache, steps: int, world: int, micro: bool, workers: int, lanes: int, packed: bool
) -> None:
    alone = replace(stream_of(cache, global_batch_rows=24, lanes=lanes), packed=packed)
    whole, _ = steps_of(alone, {}, 0, steps + 2)
    _, cursor = steps_of(alone, {}, 0, steps)
    kept = json.loads(json.dumps({str(lane): asdict(at) for lane, at in cursor.items()}))
    again = {int(lane): LaneCursor(**at) for lane, at in kept.items()}
    config = {"micro_batch_rows": 24 // world // 3} if micro and world < 8 else {}
    found: list[list[int]] = [[] for _ in range(2)]
    for rank in range(world):
        mine = replace(
            alone, config=StreamSection.model_validate({**alone.config.model_dump(), **config}), rank=rank, world_size=world
        )
        made = [mine.micro_batches(again, steps, worker, workers) for worker in range(workers)]
        for number in range(2 * mine.micro_steps):
            found[number // mine.micro_steps] += next(made[number % workers]).segments
    assert [tuple(step) for step in found] == whole[steps:]


def test_rank_reads_only_the_lanes_of_its_rows(cache: Cache) -> None:
    touched = []
    for rank in range(2):
        mine = replace(stream_of(cache, global_batch_rows=8, lanes=4), rank=rank, world_size=2)
        touched.append({lane for batch in islice(mine.micro_batches({}, 0), 3) for lane in batch.cursor})
    assert touched == [{0, 1}, {2, 3}]


def test_each_array_of_a_unit_is_read_once_a_window(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[tuple[str, int]] = Counter()
    plain = Cache.read_unit

    def counted(self: Cache, unit: int, rows: Mapping[str, int]) -> Any:
        read.update((path, unit) for path in rows)
        return plain(self, unit, rows)

    monkeypatch.setattr(Cache, "read_unit", counted)
    stream = stream_of(cache, ALL, lanes=2, window_units=1)
    rows = sum(len(lane_rows(stream, lane, 1)) for lane in range(2))
    list(islice(stream.micro_batches({}, 0), rows // 12))  # half an epoch: the next one's first windows are not read ahead
    assert max(count for (path, _), count in read.items() if path.startswith("distribution/")) == 1
    assert not [path for path, _ in read if path.startswith(("hidden/block_input", "stats/"))]


@pytest.mark.parametrize("by", ["tokens", "samples"])
def test_sources_come_in_the_proportions_of_the_recipe(two_sources: Cache, by: Literal["tokens", "samples"]) -> None:
    stream = stream_of(two_sources, lanes=1, mix={"weights": {"code": 3, "prose": 1}, "by": by}, sequence_length=CONTEXT)
    rows = lane_rows(stream, 0, 40)
    counts: Counter[int] = Counter()
    for row in rows:
        for unit, segment in row:
            counts[int(unit.segments["source"][segment])] += int(unit.segments["length"][segment]) if by == "tokens" else 1
    assert counts[0] / (counts[0] + counts[1]) == pytest.approx(0.75, abs=0.02)
    held = {s.name: s.num_tokens if by == "tokens" else s.num_segments for s in two_sources.sources}
    assert sum(counts.values()) == pytest.approx(40 * sum(held.values()), rel=0.05)
    assert [r[0][1] for r in lane_rows(stream, 0, 2)] == [r[0][1] for r in lane_rows(stream, 0, 2)]
    for weights, match in (
        ({"code": 1}, "no weight"),
        ({"code": 1, "x": 1, "prose": 1}, "no such"),
        ({"code": 0, "prose": 0}, "is 0"),
    ):
        with pytest.raises(InputError, match=match):
            stream_of(two_sources, mix={"weights": weights}).lane(0, LaneCursor())


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, recipe_for: Callable[..., Any]) -> Cache:
    folder = tmp_path_factory.mktemp("two")
    sources = [
        {"name": "code", "jsonl": write_jsonl(folder / "a.jsonl", CODE * 4)},
        {"name": "prose", "jsonl": write_jsonl(folder / "b.jsonl", PROSE * 4)},
    ]
    return build(recipe_for(folder / "cache.zarr", sources=sources, signals={"distribution": {"rank": 4}}))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_stream(cache: Cache, workers: int) -> None:
    plain = [b.contents.segments for b in islice(load(stream_of(cache, workers=0), {}, 0, pin_memory=False), 5)]
    ahead = [b.contents.segments for b in islice(load(stream_of(cache, workers=workers), {}, 0, pin_memory=False), 5)]
    assert plain == ahead


def test_a_stream_opens_again_in_a_spawned_process(cache: Cache) -> None:
    stream = stream_of(cache)
    there: Stream = pickle.loads(pickle.dumps(stream))
    assert steps_of(there, {}, 0, 2)[0] == steps_of(stream, {}, 0, 2)[0]


def check_batch(cache: Cache, batch: CodedBatch) -> None:
    """A batch against the cache, segment by segment, the slow way."""
    width = batch.input_ids.shape[1]
    columns = [0] * len(batch.input_ids)
    starts = torch.nonzero((batch.position_ids == 0) & batch.real).tolist()
    assert len(starts) == len(batch.segments)
    rows = hidden_rows = attention_rows = 0
    distribution, hidden, attention = batch.part(DistributionPart), batch.part(HiddenPart), batch.part(AttentionPart)
    assert distribution is not None
    assert hidden is not None
    assert attention is not None
    for (row, column), number in zip(starts, batch.segments, strict=True):
        segment = cache[number]
        n = len(segment)
        assert column == columns[row]
        columns[row] += n
        assert batch.input_ids[row, column : column + n].tolist() == segment.input_ids.tolist()
        labels = [*segment.input_ids[1:].tolist(), segment.next_token]
        for t in range(n):
            if segment.loss_mask[t] == 0:
                continue
            assert batch.flat[rows] == row * width + column + t
            assert batch.labels[rows] == (labels[t] if segment.loss_mask[t] == 1 else -100)
            place = segment.token_start + t
            for name in ("head_codes", "tail_codes"):
                codes = getattr(distribution.codes, name)[rows]
                assert np.array_equal(codes, cache.read(f"distribution/{name}", place, place + 1)[0])
            rows += 1
        for (tap, layer), states in hidden.states.items():
            stored = cache.read(f"hidden/{tap}/{layer}/values", segment.token_start, segment.token_start + n)
            assert np.array_equal(states.values[hidden_rows : hidden_rows + n], stored)
        hidden_rows += n
        positions = cache.read("attention/rows/position")
        mine = np.flatnonzero((positions >= segment.token_start) & (positions < segment.token_start + n))
        for i in mine:
            assert attention.query[attention_rows] == column + positions[i] - segment.token_start
            assert attention.first[attention_rows] == column
            assert attention.batch[attention_rows] == row
            attention_rows += 1
    assert rows == len(batch.flat)
    assert hidden_rows == len(hidden.flat)
    assert attention_rows == len(attention.batch)
    assert int(attention.length.sum()) == len(attention.layers[4].weights)


def test_batches_hold_what_the_cache_holds(cache: Cache) -> None:
    for batch in islice(stream_of(cache, ALL).micro_batches({}, 0), 3):
        check_batch(cache, batch)


def test_validation_is_read_once_and_in_order(cache: Cache) -> None:
    batches = list(stream_of(cache).once("validation"))
    seen = [s for b in batches for s in b.segments]
    assert sorted(seen) == sorted(set(range(len(cache))) - set(train_segments(cache)))
    dealt = [
        s for rank in range(3) for b in replace(stream_of(cache), rank=rank, world_size=3).once("validation") for s in b.segments
    ]
    assert sorted(dealt) == sorted(seen)


def test_bad_rows_are_refused(cache: Cache) -> None:
    with pytest.raises(InputError, match="longer than a row"):
        stream_of(cache, sequence_length=CONTEXT - 1)
    with pytest.raises(InputError, match="divide evenly"):
        stream_of(cache, micro_batch_rows=4)


def test_every_signal_of_a_cache_is_found_by_its_name_and_read(knowing_cache: Cache) -> None:
    request = SignalRequest.whole(knowing_cache)
    assert {kind.signal() for kind in request} == {*dict(knowing_cache.manifest.signals.cached()), "tags"}
    batch = next(stream_of(knowing_cache, request).micro_batches({}, 0))
    names = {type(part).__module__.rpartition(".")[2] for part in batch.signals.values()}
    assert names == {kind.signal() for kind in request}
    read = request.reads(knowing_cache)
    unread = {path for path in knowing_cache.capacity_rows if path not in read}
    assert not [path for path in unread if not path.startswith(("segments/", "tokens/byte_end")) and "/segments/" not in path]


FURTHER = """
from dataclasses import dataclass

from torch import Tensor

from student_train.data.placement import Placement
from student_train.data.part import Part
from student_train.data.signals.base import Request


@dataclass(frozen=True, slots=True)
class FurtherPart(Part):
    flat: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True)
class FurtherRequest(Request):
    def groups(self) -> tuple[str, ...]:
        return ("tokens/byte_end",)

    def gather(self, placement: Placement) -> FurtherPart:
        rows = placement.rows("further")
        return FurtherPart(placement.flat(placement.places("further", rows)), placement.gathered("tokens/byte_end", rows))
"""


def test_a_signal_that_is_one_file_more_is_found_and_batched(
    knowing_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "further.py").write_text(FURTHER)
    monkeypatch.setattr(signals, "__path__", [*signals.__path__, str(tmp_path)])
    signals.request_kinds.cache_clear()
    try:
        request = SignalRequest.of(signals.request_kinds()["further"]())
        batch = next(stream_of(knowing_cache, request, workers=0).micro_batches({}, 0))
        (part,) = batch.signals.values()
        flat, ends = part.flat, part.ends  # type: ignore[attr-defined]
        segments = [knowing_cache[number] for number in batch.segments]
        stored = [knowing_cache.read("tokens/byte_end", s.token_start, s.token_start + len(s)) for s in segments]
        assert ends.tolist() == np.concatenate(stored).tolist()
        assert batch.input_ids.flatten()[flat].tolist() == np.concatenate([s.input_ids for s in segments]).tolist()
        moved = batch.mapped(lambda tensor: tensor.clone(), torch.Tensor)
        assert moved.signals[type(part)].ends.tolist() == ends.tolist()  # type: ignore[attr-defined]
        (tmp_path / "further.py").write_text("")
        sys.modules.pop("student_train.data.signals.further")
        signals.request_kinds.cache_clear()
        with pytest.raises(TypeError, match="one class of Request, and has 0"):
            signals.request_kinds()
    finally:
        sys.modules.pop("student_train.data.signals.further", None)
        signals.request_kinds.cache_clear()
