"""The stream: a permutation, the same for any number of ranks, resumed exactly; batches hold what the cache holds."""

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.batch import CodedBatch, Cursor
from student_train.recipe import StreamSection
from student_train.stream.loader import load
from student_train.stream.order import key_of, permuted, shuffled
from student_train.stream.reader import Needs
from student_train.stream.rows import Stream
from tests.tiny import CONTEXT

ALL = Needs(distribution=True, hidden=tuple(("block_output", n) for n in (1, 2, 3)), attention=(4,))
TOKENS = Needs(distribution=False, hidden=(), attention=())


@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_order_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))
    assert sorted(shuffled(size, key)) == list(range(size))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(permuted(i, 50, key_of(seed, epoch)) for i in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def stream_of(cache: Cache, needs: Needs = TOKENS, **config: Any) -> Stream:
    return Stream(
        cache, needs, StreamSection.model_validate({"row_tokens": 64, "rows_per_step": 6, "window_units": 2, **config}), packed=True
    )


def train_segments(cache: Cache) -> list[int]:
    firsts = np.concatenate([[0], np.cumsum(cache.segments_per_unit)])
    return [s for u in cache.units("train") for s in range(firsts[u], firsts[u + 1])]


def test_an_epoch_holds_every_segment_once(cache: Cache) -> None:
    stream = stream_of(cache)
    for epoch in range(2):
        rows = [row for window in range(stream.window_count()) for row in stream.window_rows(epoch, window)]
        seen = [unit.first_segment + segment for row in rows for unit, segment in row]
        assert sorted(seen) == train_segments(cache)
        assert all(sum(int(u.segments["length"][s]) for u, s in row) <= 64 for row in rows)


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(0, 12), world=st.sampled_from([1, 2, 3, 6]), micro=st.sampled_from([None, 1]))
def test_ranks_share_one_stream_and_resume_exactly(cache: Cache, steps: int, world: int, micro: int | None) -> None:
    config: dict[str, Any] = {"micro_rows": micro} if micro else {}
    alone = stream_of(cache)
    whole = [b.segments for b in islice(alone.micro_batches(Cursor()), steps + 3)]
    ranks = [replace(stream_of(cache, **config), rank=r, world_size=world) for r in range(world)]
    cursor = Cursor()
    for batch in islice(alone.micro_batches(Cursor()), steps):
        cursor = batch.cursor
    found = []
    iterators = [r.micro_batches(cursor) for r in ranks]
    for _ in range(3):
        parts = [b.segments for it, r in zip(iterators, ranks, strict=True) for b in islice(it, r.micro_steps)]
        found.append(tuple(s for part in parts for s in part))
    assert found == whole[steps:]


def test_workers_do_not_change_the_stream(cache: Cache) -> None:
    plain = [b.segments for b in islice(load(stream_of(cache, workers=0), Cursor(), pin_memory=False), 5)]
    ahead = [b.segments for b in islice(load(stream_of(cache, workers=1), Cursor(), pin_memory=False), 5)]
    assert plain == ahead


def check_batch(cache: Cache, batch: CodedBatch) -> None:
    """A batch against the cache, segment by segment, the slow way."""
    width = batch.input_ids.shape[1]
    columns = [0] * len(batch.input_ids)
    starts = torch.nonzero((batch.position_ids == 0) & batch.real).tolist()
    assert len(starts) == len(batch.segments)
    rows = hidden_rows = attention_rows = 0
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
            if batch.distribution is not None:
                place = segment.token_start + t
                assert np.array_equal(
                    batch.distribution.head_codes[rows], cache.read("distribution/head_codes", place, place + 1)[0]
                )
                assert np.array_equal(
                    batch.distribution.tail_codes[rows], cache.read("distribution/tail_codes", place, place + 1)[0]
                )
            rows += 1
        for (tap, layer), codes in batch.hidden.items():
            stored = cache.read(f"hidden/{tap}/{layer}/values", segment.token_start, segment.token_start + n)
            assert np.array_equal(codes.values[hidden_rows : hidden_rows + n], stored)
        hidden_rows += n if batch.hidden else 0
        if batch.attention:
            positions = cache.read("attention/rows/position")
            mine = np.flatnonzero((positions >= segment.token_start) & (positions < segment.token_start + n))
            for i in mine:
                assert batch.row_query[attention_rows] == column + positions[i] - segment.token_start
                assert batch.row_first[attention_rows] == column
                assert batch.row_batch[attention_rows] == row
                attention_rows += 1
    assert rows == len(batch.flat)
    assert hidden_rows == len(batch.hidden_flat)
    assert attention_rows == len(batch.row_batch)
    assert int(batch.row_length.sum()) == (len(batch.attention[4].weights) if batch.attention else 0)


def test_batches_hold_what_the_cache_holds(cache: Cache) -> None:
    for batch in islice(stream_of(cache, ALL).micro_batches(Cursor()), 3):
        check_batch(cache, batch)


def test_validation_is_read_once_and_in_order(cache: Cache) -> None:
    batches = list(stream_of(cache).once("validation", None))
    seen = [s for b in batches for s in b.segments]
    assert sorted(seen) == sorted(set(range(len(cache))) - set(train_segments(cache)))
    dealt = [
        s
        for rank in range(3)
        for b in replace(stream_of(cache), rank=rank, world_size=3).once("validation", None)
        for s in b.segments
    ]
    assert sorted(dealt) == sorted(seen)


def test_bad_rows_are_refused(cache: Cache) -> None:
    with pytest.raises(InputError, match="longer than a row"):
        stream_of(cache, row_tokens=CONTEXT - 1)
    with pytest.raises(InputError, match="divide evenly"):
        stream_of(cache, micro_rows=4)
