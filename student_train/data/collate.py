"""Rows of segments to a micro-batch of codes. Pure: arrays in, tensors out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signal_store.codecs.distribution import DistributionCodes
from signal_store.format.roles import token_types
from signal_store.signals.distribution import SCALARS
from student_train.data.batch import AttentionCodes, CodedBatch, CoverageCodes, EvidenceCodes, HiddenCodes, LaneCursor, ReplayCodes
from student_train.data.reader import Needs, State, UnitReader
from student_train.importance.weigher import Weigher

WIDTH_STEP = 64
"""Rows of one segment are as wide as the longest, rounded up to this: few shapes to compile for."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A segment and where it goes: row `row` of the batch, from column `column`."""

    unit: UnitReader
    segment: int
    row: int
    column: int

    def of(self, name: str) -> int:
        """A column of the segment table."""
        return int(self.unit.segments[name][self.segment])

    def slice_of(self, start: str, count: str) -> slice:
        """The segment's rows of an array."""
        return slice(self.of(start), self.of(start) + self.of(count))

    @property
    def tokens(self) -> slice:
        """Its token rows."""
        return self.slice_of("token_start", "length")


def place(rows: Sequence[Sequence[tuple[UnitReader, int]]]) -> list[Placed]:
    """Segments end to end in their rows."""
    placed = []
    for number, row in enumerate(rows):
        column = 0
        for unit, segment in row:
            placed.append(Placed(unit, segment, number, column))
            column += int(unit.segments["length"][segment])
    return placed


def collate(
    rows: Sequence[Sequence[tuple[UnitReader, int]]],
    width: int,
    needs: Needs,
    *,
    packed: bool,
    cursor: dict[int, LaneCursor],
    weigher: Weigher | None = None,
) -> CodedBatch:
    """A micro-batch of these rows, each filled up to `width` tokens, or, where rows hold one segment, as long as the longest; a row
    may be empty."""
    placed = place(rows)
    text = _text(placed, len(rows), width, packed=packed)
    distribution = _distribution(placed, text.kept) if needs.distribution else None
    roles = _next_roles(placed, text.kept) if needs.tags and placed else None
    importance = None
    if weigher is not None and roles is not None and distribution is not None:
        entropies = distribution.scalars[:, SCALARS.index("entropy")].float().numpy()
        importance = torch.from_numpy(weigher.weights(roles, entropies))
    row_batch, row_query, row_first, row_length, row_keyword = _attention_positions(placed, needs)
    return CodedBatch(
        input_ids=torch.from_numpy(text.ids),
        position_ids=torch.from_numpy(text.positions),
        real=torch.from_numpy(text.real),
        flat=_joined(text.flats),
        labels=_joined(text.labels),
        distribution=distribution,
        importance=importance,
        types=None if roles is None else torch.from_numpy(token_types(roles)),
        hidden_flat=_hidden_flat(placed, needs, text.width),
        hidden={state: _hidden(placed, state) for state in needs.hidden} if placed else {},
        row_batch=row_batch,
        row_query=row_query,
        row_first=row_first,
        row_length=row_length,
        row_keyword=row_keyword.bool(),
        attention={layer: _attention(placed, layer, needs) for layer in needs.attention} if placed else {},
        statistics={n: _of_segments(placed, f"stats/attention/{n}/values") for n in needs.statistics} if placed else {},
        sparsity=_of_segments(placed, "stats/ffn/values") if needs.sparsity and placed else None,
        replay=_replay(placed, text.width) if needs.replay and placed else None,
        evidence=_evidence(placed, needs) if needs.evidence and placed else None,
        coverage=_coverage(placed) if needs.coverage and placed else None,
        segments=tuple(p.unit.first_segment + p.segment for p in placed),
        sources=tuple(p.of("source") for p in placed),
        segment_rows=tuple(len(rows) for rows in text.labels),
        hidden_rows=tuple(len(_hidden_rows(p)[0]) for p in placed) if needs.hidden else (),
        context_only=tuple(p.of("context_only") for p in placed),
        packed=packed,
        cursor=cursor,
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """`ids`, `positions` int64 and `real` bool [B, width]; by segment: `kept`, its rows in its unit that count, `flats` where they
    are in the batch, and their `labels`."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    real: NDArray[np.bool_]
    kept: list[slice | NDArray[np.int64]]
    flats: list[NDArray[np.int64]]
    labels: list[NDArray[np.int64]]

    @property
    def width(self) -> int:
        """Tokens of a row, filler included."""
        return int(self.ids.shape[1])


def _text(placed: Sequence[Placed], rows: int, width: int, *, packed: bool) -> _Text:
    longest = max((p.of("length") for p in placed), default=1)
    if not packed:
        width = min(width, -(-longest // WIDTH_STEP) * WIDTH_STEP)
    shape = (rows, width)
    text = _Text(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool), [], [], [])
    used = np.zeros(rows, np.int64)
    counting = np.arange(width)
    for p in placed:
        tokens, unit = p.tokens, p.unit.text
        length = tokens.stop - tokens.start
        used[p.row] = p.column + length
        columns = slice(p.column, p.column + length)
        text.ids[p.row, columns], text.positions[p.row, columns] = unit.input_ids[tokens], counting[:length]
        wanted = unit.kept[p.segment]
        text.kept.append(wanted)
        text.labels.append(unit.labels[wanted])
        rows_kept = np.arange(wanted.start, wanted.stop) if isinstance(wanted, slice) else wanted
        text.flats.append(rows_kept + (p.row * width + p.column - tokens.start))
    for row, start in enumerate(used):
        text.real[row, :start] = True
        text.positions[row, start:] = counting[: width - start] % longest  # filler too stays among positions that the student has
    return text


def _next_roles(placed: Sequence[Placed], kept: Sequence[NDArray[np.int64] | slice]) -> NDArray[np.uint8]:
    """uint8 [N, 4]: roles of the tokens that the rows which count predict."""
    return np.concatenate([p.unit.next_roles[rows] for p, rows in zip(placed, kept, strict=True)])


def _joined(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)


def _gathered(placed: Sequence[Placed], path: str, wanted: Sequence[NDArray[np.int64] | slice]) -> Tensor:
    """Rows of an array, segment after segment; unsigned ones as int32, since torch computes with that."""
    arrays = [p.unit.rows(path)[rows] for p, rows in zip(placed, wanted, strict=True)]
    joined = np.concatenate(arrays)
    if joined.dtype == np.uint16:
        joined = joined.astype(np.int32)
    return torch.from_numpy(joined.view(np.int32) if joined.dtype == np.uint32 else joined)


def _distribution(placed: Sequence[Placed], kept: Sequence[NDArray[np.int64] | slice]) -> DistributionCodes | None:
    if not placed:
        return None
    unit = placed[0].unit
    scalars = _gathered(placed, "distribution/scalars", kept)

    def part(name: str, dtype: torch.dtype) -> Tensor:
        return (
            _gathered(placed, path, kept) if unit.has(path := f"distribution/{name}") else torch.zeros(len(scalars), 0, dtype=dtype)
        )

    return DistributionCodes(
        part("head_ids", torch.int32), part("head_codes", torch.uint8), part("tail_codes", torch.int8), scalars
    )


def _hidden_rows(p: Placed) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows of the hidden arrays, places in the segment) of a segment's stored states; context rows hold none."""
    if "hidden_row_start" in p.unit.segments:
        rows = np.arange(p.of("hidden_row_start"), p.of("hidden_row_start") + p.of("hidden_rows"))
        return rows, p.unit.rows("hidden/rows/position")[rows] - p.of("token_start")
    places = np.arange(p.of("context_only"), p.of("length"))
    return p.of("token_start") + places, places


def _hidden_flat(placed: Sequence[Placed], needs: Needs, width: int) -> Tensor:
    if not needs.hidden:
        return torch.zeros(0, dtype=torch.int64)
    return _joined([p.row * width + p.column + _hidden_rows(p)[1] for p in placed])


def _hidden(placed: Sequence[Placed], state: State) -> HiddenCodes:
    group = f"hidden/{state[0]}/{state[1]}"
    rows = [_hidden_rows(p)[0] for p in placed]
    return HiddenCodes(_gathered(placed, f"{group}/values", rows), _gathered(placed, f"{group}/scale", rows))


def _stored_rows(p: Placed, needs: Needs) -> NDArray[np.int64]:
    """Rows of the attention arrays: a keyword's own, and those of the tokens before it where they are wanted."""
    rows = np.arange(p.of("attention_row_start"), p.of("attention_row_start") + p.of("attention_rows"))
    wanted: NDArray[np.int64] = rows if needs.steps else rows[p.unit.rows("attention/rows/keyword")[rows] == 1]
    return wanted


def _attention_positions(placed: Sequence[Placed], needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row of the batch, query column, first column of the segment, stored entries, and 1 for a keyword's own, of every row."""
    if not needs.attention:
        return tuple(torch.zeros(0, dtype=torch.int64) for _ in range(5))  # type: ignore[return-value]
    batch, query, first, length, keyword = [], [], [], [], []
    for p in placed:
        rows = _stored_rows(p, needs)
        positions = p.unit.rows("attention/rows/position")[rows] - p.of("token_start")
        batch.append(np.full(len(positions), p.row, np.int64))
        query.append(p.column + positions)
        first.append(np.full(len(positions), p.column, np.int64))
        length.append(p.unit.rows("attention/rows/length")[rows].astype(np.int64))
        keyword.append(p.unit.rows("attention/rows/keyword")[rows].astype(np.int64))
    return _joined(batch), _joined(query), _joined(first), _joined(length), _joined(keyword)


def _attention(placed: Sequence[Placed], layer: int, needs: Needs) -> AttentionCodes:
    group = f"attention/{layer}"
    row_numbers = [_stored_rows(p, needs) for p in placed]
    entries = []
    for p, rows in zip(placed, row_numbers, strict=True):
        offsets, lengths = (p.unit.rows(f"attention/rows/{name}")[rows].astype(np.int64) for name in ("offset", "length"))
        inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        entries.append(np.repeat(offsets, lengths) + inside)
    sparse = bool(placed) and placed[0].unit.has(f"{group}/columns")
    return AttentionCodes(
        weights=_gathered(placed, f"{group}/weights", entries),
        columns=_gathered(placed, f"{group}/columns", entries) if sparse else None,
        residual=_gathered(placed, f"{group}/residual", row_numbers) if sparse else None,
    )


def _of_segments(placed: Sequence[Placed], path: str) -> Tensor:
    """Of an array with one row a segment."""
    return torch.from_numpy(np.stack([p.unit.rows(path)[p.segment] for p in placed]))


def _sampled(placed: Sequence[Placed], signal: str) -> list[NDArray[np.int64]]:
    """By segment, its rows of a sampled signal."""
    return [np.arange(p.of(f"{signal}_row_start"), p.of(f"{signal}_row_start") + p.of(f"{signal}_rows")) for p in placed]


def _numbers(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """The batch's number of the segment that each row is of."""
    return torch.from_numpy(np.repeat(np.arange(len(rows)), [len(r) for r in rows]))


def _evidence(placed: Sequence[Placed], needs: Needs) -> EvidenceCodes:
    rows = _sampled(placed, "evidence")
    starts = [p.unit.rows("evidence/rows/position")[r] - p.of("token_start") for p, r in zip(placed, rows, strict=True)]
    start, length = _joined(starts), _gathered(placed, "evidence/rows/length", rows).long()
    shares = {layer: _gathered(placed, f"evidence/{layer}/share", rows) for layer in needs.evidence}
    return EvidenceCodes(_numbers(rows), torch.stack([start, start + length], 1), shares)


def _coverage(placed: Sequence[Placed]) -> CoverageCodes:
    rows = _sampled(placed, "coverage")
    token = _gathered(placed, "coverage/rows/token", rows).long()
    return CoverageCodes(_numbers(rows), token, _gathered(placed, "coverage/words/probability", rows))


def _replay(placed: Sequence[Placed], width: int) -> ReplayCodes:
    rows = _sampled(placed, "replay")
    places = [p.unit.rows("replay/rows/position")[r] for p, r in zip(placed, rows, strict=True)]
    starts = [p.row * width + p.column - p.of("token_start") for p in placed]
    return ReplayCodes(
        flat=_joined([start + place for start, place in zip(starts, places, strict=True)]),
        labels=_joined([p.unit.text.labels[place] for p, place in zip(placed, places, strict=True)]),
        values=_gathered(placed, "replay/path/values", rows),
        scale=_gathered(placed, "replay/path/scale", rows),
        nll=_gathered(placed, "replay/path/nll", rows),
    )
