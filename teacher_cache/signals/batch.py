"""One batch through the teacher and every signal's codec: the rows it adds to its unit. And the rows that need no teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_taps.attention_statistics import attention_statistics
from model_taps.coverage import summary_coverage
from model_taps.evidence import evidence_shares
from model_taps.head import final_norm
from model_taps.segment_statistics import ffn_statistics, gradient_statistics
from signal_store.codecs.hidden import HiddenCodec
from signal_store.format.arrays import ArraySpec
from signal_store.format.manifest import Manifest
from teacher_cache.builder.calibrate import Calibrated
from teacher_cache.builder.positions import (
    AttentionRows,
    Places,
    attention_rows,
    coverage_words,
    evidence_queries,
    evidence_sentences,
    hidden_positions,
    replay_positions,
    statistics_positions,
)
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.attention import extract_attention
from teacher_cache.signals.distribution import extract_distribution
from teacher_cache.signals.hidden import extract_states
from teacher_cache.signals.replay import ascend
from teacher_cache.signals.rows import Extracted, Rows, numpy_of
from teacher_cache.teacher.forward import TeacherBatch, Thoughts, think

NO_PLACES: Places = np.zeros(0, np.int64)


@dataclass(frozen=True)
class UnitWork:
    """A unit to extract: its number, its plan, and where each signal is taken."""

    manifest: Manifest
    number: int
    plan: UnitPlan

    @cached_property
    def hidden(self) -> Places:
        """Places of the sampled hidden states."""
        signal = self.manifest.signals.hidden
        return hidden_positions(self.plan, signal.positions) if signal else NO_PLACES

    @cached_property
    def attention(self) -> AttentionRows:
        """The stored attention rows."""
        signal, layouts = self.manifest.signals.attention, self.manifest.calibration.attention
        if signal is None:
            return AttentionRows(NO_PLACES, np.zeros(0, bool), NO_PLACES)
        return attention_rows(self.plan, signal.previous_steps, layouts[0].max_columns)

    @cached_property
    def statistics(self) -> Places:
        """Places of the rows that attention statistics are taken from."""
        signal = self.manifest.signals.stats
        return statistics_positions(self.plan) if signal is not None and signal.attention else NO_PLACES

    @cached_property
    def replay(self) -> Places:
        """Places where replay paths begin."""
        signal = self.manifest.signals.replay
        return replay_positions(self.plan, signal) if signal else NO_PLACES

    @cached_property
    def sentences(self) -> Places:
        """[n, 2] sentences of questions."""
        return evidence_sentences(self.plan) if self.manifest.signals.evidence else np.zeros((0, 2), np.int64)

    @cached_property
    def queries(self) -> Places:
        """Places of the answers' rows that look for evidence."""
        signal = self.manifest.signals.evidence
        return evidence_queries(self.plan, signal.queries) if signal else NO_PLACES

    @cached_property
    def words(self) -> Places:
        """[n, 2] key words of texts to sum up, with their tokens."""
        signal = self.manifest.signals.coverage
        return coverage_words(self.plan, signal.words) if signal else np.zeros((0, 2), np.int64)

    @cached_property
    def rows(self) -> Places:
        """All places whose attention rows are captured."""
        return np.unique(np.concatenate([self.attention.position, self.statistics, self.queries]))


def extract_batch(calibrated: Calibrated, work: UnitWork, batch: TeacherBatch) -> Extracted:
    """Forward pass and codes of one batch."""
    thoughts = think(calibrated.teacher, work.plan, batch, calibrated.listening, work.rows)
    signals, calibration = calibrated.manifest.signals, calibrated.manifest.calibration
    parts: list[Extracted] = []
    if signals.distribution is not None:
        parts.append(_distribution(calibrated, work, thoughts))
    if signals.hidden is not None:
        for h in calibration.hidden:
            states = thoughts.states[h.tap, h.layer]
            if signals.hidden.positions == "all":
                found = extract_states(calibrated.hidden[h.group], h.group, states)
                parts.append(_blank(found, calibrated.manifest, work.plan.is_context[thoughts.tokens]))
            else:
                parts.append(extract_states(calibrated.hidden[h.group], h.group, states[_local(work.hidden, thoughts, states)]))
    stored = np.isin(thoughts.row_places, work.attention.position)
    for a in calibration.attention:
        kept = torch.from_numpy(stored).to(thoughts.row_lengths.device)
        parts.append(extract_attention(a, thoughts.rows[a.layer][kept], thoughts.row_lengths[kept]))
    if signals.stats is not None:
        parts.append(_statistics(calibrated, work, batch, thoughts))
    if signals.replay is not None:
        parts.append(_replay(calibrated, work, thoughts))
    if signals.evidence is not None:
        parts.append(_evidence(calibrated, work, thoughts))
    if signals.coverage is not None:
        parts.append(_coverage(calibrated, work, batch, thoughts))
    rows = {path: array for part in parts for path, array in part.rows.items()}
    return Extracted(rows, {name: count for part in parts for name, count in part.saturated.items()})


def _local(places: Places, thoughts: Thoughts, like: Tensor) -> Tensor:
    """The places that are in the batch, counted from its first token, as an index."""
    inside = places[(places >= thoughts.tokens.start) & (places < thoughts.tokens.stop)] - thoughts.tokens.start
    return torch.from_numpy(inside).to(like.device)


def _logits(calibrated: Calibrated, thoughts: Thoughts, rows: slice | Tensor) -> Tensor:
    """float32 logits of some of the batch's tokens."""
    if calibrated.teacher.head is not None:
        return calibrated.teacher.head.logits(thoughts.hidden[rows])
    assert thoughts.logits is not None
    return thoughts.logits[rows]


def _evidence(calibrated: Calibrated, work: UnitWork, thoughts: Thoughts) -> Extracted:
    """Rows of one per sentence of the batch's questions."""
    unit, device = work.plan, calibrated.teacher.device
    inside = (work.sentences[:, 0] >= thoughts.tokens.start) & (work.sentences[:, 0] < thoughts.tokens.stop)
    ranges, segments = work.sentences[inside], len(unit.length)
    asked = np.isin(thoughts.row_places, work.queries)
    segment_R = torch.from_numpy(unit.segment_of_token[thoughts.row_places[asked]]).to(device)
    segment_P = unit.segment_of_token[ranges[:, 0]]
    own = torch.from_numpy(ranges - unit.token_start[segment_P][:, None]).to(device)
    kept, of = torch.from_numpy(asked).to(device), torch.from_numpy(segment_P).to(device)
    rows: dict[str, Any] = {}
    for layer in calibrated.manifest.calibration.evidence_layers:
        shares = evidence_shares(thoughts.rows[layer][kept], segment_R, own, of, segments)
        rows[f"evidence/{layer}/share"] = numpy_of(shares.half(), "float16")
    return Extracted(rows, {})


def _coverage(calibrated: Calibrated, work: UnitWork, batch: TeacherBatch, thoughts: Thoughts) -> Extracted:
    """Rows of one per key word of the batch's texts."""
    unit, tokens = work.plan, thoughts.tokens
    words = work.words[(work.words[:, 0] >= tokens.start) & (work.words[:, 0] < tokens.stop)]
    if not len(words):
        return Extracted({"coverage/words/probability": np.zeros(0, np.float16)}, {})
    counted = np.flatnonzero(unit.loss_mask[tokens] > 0)
    segment = unit.segment_of_token[tokens] - batch.first
    device = calibrated.teacher.device
    rows_N, segment_N, tokens_W, segment_W = (
        torch.from_numpy(np.ascontiguousarray(part)).to(device)
        for part in (counted, segment[counted], words[:, 1], segment[words[:, 0] - tokens.start])
    )
    with torch.inference_mode():
        logits_of = partial(_logits, calibrated, thoughts)
        found = summary_coverage(logits_of, rows_N, segment_N, tokens_W, segment_W, batch.last - batch.first)
    return Extracted({"coverage/words/probability": numpy_of(found.half(), "float16")}, {})


def _distribution(calibrated: Calibrated, work: UnitWork, thoughts: Thoughts) -> Extracted:
    signal = calibrated.manifest.signals.distribution
    assert signal is not None
    labels = torch.from_numpy(work.plan.labels()[thoughts.tokens]).to(thoughts.hidden.device)
    key = (work.number, thoughts.tokens.start)
    logits_of = partial(_logits, calibrated, thoughts)
    stored = {spec.path: spec.dtype for spec in calibrated.manifest.specs}
    zigzag = stored.get("distribution/tail_codes") == "uint8"
    found = extract_distribution(calibrated.distribution, logits_of, thoughts.hidden, labels, signal.samples, key, zigzag=zigzag)
    return _blank(found, calibrated.manifest, work.plan.is_context[thoughts.tokens])


def _statistics(calibrated: Calibrated, work: UnitWork, batch: TeacherBatch, thoughts: Thoughts) -> Extracted:
    """Rows of one per segment of the batch; rows that are context only count nowhere."""
    signal, layout = calibrated.manifest.signals.stats, calibrated.manifest.calibration.stats
    assert signal is not None
    assert layout is not None
    segments = batch.last - batch.first
    segment_n = torch.from_numpy(work.plan.segment_of_token[thoughts.tokens] - batch.first).to(calibrated.teacher.device)
    own = torch.from_numpy(np.flatnonzero(~work.plan.is_context[thoughts.tokens])).to(segment_n.device)
    rows: dict[str, Any] = {}
    if signal.attention:
        kept = torch.from_numpy(np.isin(thoughts.row_places, work.statistics)).to(segment_n.device)
        segment_R = segment_n[torch.from_numpy(thoughts.row_places - thoughts.tokens.start).to(segment_n.device)][kept]
        for layer in layout.attention_layers:
            found = attention_statistics(thoughts.rows[layer][kept], thoughts.row_lengths[kept], segment_R, segments)
            rows[f"stats/attention/{layer}/values"] = numpy_of(found.half(), "float16")
    if signal.ffn:
        per_layer = [ffn_statistics(thoughts.states["ffn_activation", n][own], segment_n[own], segments) for n in layout.layers]
        rows["stats/ffn/values"] = numpy_of(torch.stack(per_layer, 1).half(), "float16")
    if signal.gradient:
        variances = [gradient_statistics(thoughts.gradients[n][own], segment_n[own], segments) for n in layout.layers]
        rows["stats/gradient/log10_variance"] = numpy_of(torch.stack(variances, 1).half(), "float16")
    return Extracted(rows, {})


def _replay(calibrated: Calibrated, work: UnitWork, thoughts: Thoughts) -> Extracted:
    signal, head, identity = calibrated.manifest.signals.replay, calibrated.teacher.head, calibrated.manifest.teacher
    assert signal is not None
    assert head is not None
    norm = final_norm(calibrated.teacher.model)
    states = thoughts.states["block_output", identity.num_layers]
    places = _local(work.replay, thoughts, states)
    labels = torch.from_numpy(work.plan.labels()[thoughts.tokens]).to(places.device)[places]
    dtype = calibrated.teacher.model.dtype
    path = ascend(lambda h: head.logits(norm(h.to(dtype)).float()), states[places], labels, signal.steps, signal.step_size)
    values, scale = HiddenCodec.plain(signal.steps * identity.hidden_size).to(path.steps.device).encode(path.steps.flatten(1, 2))
    rows: dict[str, Any] = {
        "replay/path/values": numpy_of(values.view(path.steps.shape), "int8"),
        "replay/path/scale": numpy_of(scale, "float32"),
        "replay/path/nll": numpy_of(path.nll, "float32"),
    }
    plain = HiddenCodec.plain(identity.hidden_size).to(path.steps.device)
    for layer in calibrated.manifest.calibration.replay_layers if signal.gradient else ():
        rows |= extract_states(plain, f"replay/gradient/{layer}", thoughts.gradients[layer][places]).rows
    return Extracted(rows, {})


def _blank(found: Extracted, manifest: Manifest, where: NDArray[np.bool_]) -> Extracted:
    """The same rows with the fill value where a row holds no signal."""
    if not where.any():
        return found
    fill_of = {spec.path: spec.fill for spec in manifest.specs}
    blanked = {p: np.where(where.reshape(-1, *[1] * (a.ndim - 1)), fill_of[p], a) for p, a in found.rows.items()}
    return Extracted(blanked, found.saturated)


def plan_rows(work: UnitWork) -> Rows:
    """The rows that need no teacher: tokens, segments, positions."""
    manifest, unit = work.manifest, work.plan
    specs = {spec.path: spec for spec in manifest.specs}
    first_token = work.number * manifest.plan.unit_tokens
    rows: dict[str, NDArray[Any]] = {}
    if not manifest.plan.overlay:
        names = ("length", "context_only", "document", "source", "next_token", "token_hash", "finished")
        rows = {f"segments/{name}": getattr(unit, name) for name in names}
        rows["segments/token_start"] = unit.token_start + first_token
        rows |= {f"tokens/{name}": getattr(unit, name) for name in ("input_ids", "loss_mask", "byte_end")}
        rows |= {"tags/roles": unit.roles} if "tags/roles" in specs else {}
    sampled = {"hidden": work.hidden, "attention": work.attention.position, "replay": work.replay}
    sampled |= {"evidence": work.sentences[:, 0], "coverage": work.words[:, 0]}
    for signal, places in sampled.items():
        if f"{signal}/rows/position" in specs:
            counts = unit.rows_per_segment(places)
            first_row = work.number * specs[f"{signal}/rows/position"].capacity_rows
            rows[f"{signal}/segments/row_start"] = first_row + np.cumsum(counts) - counts
            rows[f"{signal}/segments/rows"] = counts
            rows[f"{signal}/rows/position"] = places + first_token
    if manifest.calibration.attention:
        lengths = work.attention.length
        first_entry = work.number * specs[f"{manifest.calibration.attention[0].group}/weights"].capacity_rows
        rows["attention/rows/offset"] = first_entry + np.cumsum(lengths) - lengths
        rows["attention/rows/length"] = lengths
        rows["attention/rows/keyword"] = work.attention.keyword
    if manifest.signals.evidence is not None:
        rows["evidence/rows/length"] = work.sentences[:, 1] - work.sentences[:, 0]
    if manifest.signals.coverage is not None:
        rows["coverage/rows/token"] = work.words[:, 1]
    return _typed(rows, specs)


def _typed(rows: Mapping[str, NDArray[Any]], specs: Mapping[str, ArraySpec]) -> Rows:
    return {path: array.astype(specs[path].dtype, copy=False) for path, array in rows.items()}
