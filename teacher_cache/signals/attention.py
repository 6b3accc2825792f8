"""Attention rows of chosen tokens: the stored heads side by side, on one flat entry axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from model_taps.attention_statistics import normalised_entropy
from signal_store.codecs.attention import encode_attention
from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.manifest import Manifest
from signal_store.signals import AttentionLayout, AttentionSignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import Arrays, CalibrationSample, Facts, SampledExtractor, Scale, Trial, first_row
from teacher_cache.signals.extracted import Extracted, Rows, numpy_of
from teacher_cache.signals.layers import refuse_no_rows
from teacher_cache.signals.unit_work import Places, SignalBatch, UnitWork
from teacher_cache.teacher.forward import TapRequest
from teacher_cache.teacher.load import Teacher

LONG_CONTEXT, COLUMNS_OF_LONG = 1024, 64
"""A context above which, where the recipe does not say, so many columns of a row are kept."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Ascending `position` of each stored row, whether it is a `keyword`'s own, and how many `keys` it has."""

    position: Places
    keyword: NDArray[np.bool_]
    keys: NDArray[np.int64]

    def entries(self, max_columns: int | None) -> NDArray[np.int64]:
        """How many of a row's keys are stored: all, or the heaviest."""
        return self.keys if max_columns is None else np.minimum(self.keys, max_columns)


class AttentionExtractor(SampledExtractor[AttentionSignal, tuple[AttentionLayout, ...]]):
    """Rows of keywords and of the tokens before them."""

    document_key = "attention"
    trial: ClassVar[Trial] = {"heads": 1}

    @property
    def max_columns(self) -> int | None:
        """Columns kept of a row, or None for all."""
        return self.section.max_columns or (COLUMNS_OF_LONG if self.context > LONG_CONTEXT else None)

    def rows(self, unit: UnitPlan) -> AttentionRows:
        """Keyword rows and the rows of the tokens before them, within their segment; a row has keys from its segment's start to
        itself."""
        segment = unit.segment_of_token
        wanted = [unit.keyword]
        for back in range(1, self.section.previous_steps + 1):
            before = unit.keyword - back
            inside = before >= unit.token_start[segment[unit.keyword]] + unit.context_only[segment[unit.keyword]]
            wanted.append(before[inside])
        position = np.unique(np.concatenate(wanted))
        keys = position - unit.token_start[segment[position]] + 1
        return AttentionRows(position, np.isin(position, unit.keyword), keys)

    def positions(self, unit: UnitPlan) -> Places:
        """Of the rows."""
        return self.rows(unit).position

    def attention_places(self, unit: UnitPlan) -> Places:
        """The same."""
        return self.positions(unit)

    def planned(self) -> dict[str, Any]:
        """How many rows and entries."""
        return {"max_columns": self.max_columns, "previous_steps": self.section.previous_steps}

    def capacities(self, unit: UnitPlan) -> dict[str, int]:
        """Rows, and the entries of all of them."""
        rows = self.rows(unit)
        return {"attention_rows": len(rows.position), "attention_entries": int(rows.entries(self.max_columns).sum())}

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """Where each row's entries begin, how many they are, whether it is a keyword's own."""
        rows, layout = work.once(self.rows), manifest.calibration.attention[0]
        lengths = rows.entries(layout.max_columns)
        return {
            **super().plan_rows(work, manifest),
            "attention/rows/offset": first_row(manifest, f"{layout.group}/weights", work.number) + np.cumsum(lengths) - lengths,
            "attention/rows/length": lengths,
            "attention/rows/keyword": rows.keyword,
        }

    def refuse_empty(self, needs: Capacities) -> None:
        """Keywords there must be."""
        if needs.attention_entries <= 1:
            raise InputError(
                "no keyword was found for the attention signal",
                expected="a source whose keywords are found, and some in its text",
                found="none",
                remedy="Give sources a lexer (prose: a tagger with keywords: true), or leave signals.attention out.",
            )

    @property
    def needs_attention(self) -> bool:
        """Always."""
        return True

    def refuse_beyond(self, config: PretrainedConfig) -> None:
        """Blocks or heads that are not there."""
        super().refuse_beyond(config)
        wanted, heads, where = self.section.heads, getattr(config, "num_attention_heads", None), "signals.attention.heads"
        if isinstance(wanted, int) and heads is not None and wanted > heads:
            raise InputError("more than the teacher has", expected=f"at most {heads}", found=wanted, where=where)
        if isinstance(wanted, tuple) and heads is not None and not all(0 <= head < heads for head in wanted):
            raise InputError("no such head", expected=f"0 to {heads - 1}", found=list(wanted), where=where)

    def decide(self, teacher: Teacher) -> Facts:
        """The layers, checked: `last` is the last whose attention rows can be had."""
        refuse_no_rows(teacher, "attention")
        if self.section.layers == "last":
            return [{"layer": teacher.row_layers[-1]}]
        unable = [layer for layer in self.section.layers if layer not in teacher.row_layers]
        if unable:
            raise InputError(
                "a block has no attention rows", expected=f"of {teacher.row_layers}", found=unable, where="signals.attention.layers"
            )
        return [{"layer": layer} for layer in self.section.layers]

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """Rows of these layers."""
        return TapRequest(row_layers=_layers(facts))

    def calibration_taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """The same."""
        return self.taps(facts, teacher)

    def calibration_places(self, unit: UnitPlan) -> Places:
        """Keywords alone."""
        return np.unique(unit.keyword)

    def collect(self, facts: Facts, batch: SignalBatch) -> dict[int, Tensor]:
        """By layer the entropy of keyword rows; rows of one key say nothing and are left out."""
        long = torch.from_numpy(batch.captured(batch.unit.keyword)).to(batch.device) & (batch.outputs.row_lengths > 1)
        lengths_R = batch.outputs.row_lengths[long]
        return {n: normalised_entropy(batch.outputs.rows[n][long].double(), lengths_R).cpu() for n in _layers(facts)}

    def fit(self, facts: Facts, collected: Sequence[Any], sample: CalibrationSample) -> tuple[Facts, Arrays]:
        """The heads of each layer."""
        return [
            {
                "layer": layer,
                "head_ids": chosen_heads(self.section.heads, torch.cat([segment[layer] for segment in collected])),
                "max_columns": self.max_columns,
            }
            for layer in _layers(facts)
        ], {}

    def prepare(self, facts: Facts, manifest: Manifest, arrays: Arrays, teacher: Teacher) -> tuple[AttentionLayout, ...]:
        """Layer and heads."""
        return tuple(AttentionLayout.model_validate(fact) for fact in facts)

    def extract(self, prepared: tuple[AttentionLayout, ...], batch: SignalBatch) -> Extracted:
        """Entries of the stored rows."""
        stored = torch.from_numpy(batch.captured(batch.work.once(self.positions))).to(batch.device)
        rows, lengths = batch.outputs.rows, batch.outputs.row_lengths[stored]
        return Extracted.joined([extract_attention(layout, rows[layout.layer][stored], lengths) for layout in prepared])

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """Most weights are small, and their codes alike."""
        layers = 1 if self.section.layers == "last" else len(self.section.layers)
        heads = self.section.heads if isinstance(self.section.heads, int) else len(self.section.heads)
        entries = layers * heads * scale.per_token("attention_entries")
        return 0.15 * entries, 1.1 * entries


def _layers(facts: Facts) -> tuple[int, ...]:
    return tuple(fact["layer"] for fact in facts)


def chosen_heads(wanted: int | tuple[int, ...], entropy_RH: Tensor) -> list[int]:
    """The heads of these numbers, or so many with the lowest mean entropy; ascending."""
    if not isinstance(wanted, int):
        return sorted(set(wanted))
    if not len(entropy_RH):
        raise InputError("no keyword in the calibration text", expected="some, to choose attention heads by", found="none")
    return sorted(entropy_RH.mean(0).argsort(stable=True)[:wanted].tolist())


@torch.inference_mode()
def extract_attention(layout: AttentionLayout, rows_RHL: Tensor, lengths_R: Tensor) -> Extracted:
    """Entries of R rows, one row after another: all columns, or the heaviest `max_columns` of each head, heaviest first, with
    their column numbers and what is left over."""
    group = layout.group
    kept_RHL = rows_RHL[:, list(layout.head_ids)]
    if layout.max_columns is None:
        inside_RL = torch.arange(kept_RHL.shape[2], device=kept_RHL.device) < lengths_R[:, None]
        return Extracted({f"{group}/weights": numpy_of(encode_attention(kept_RHL.transpose(1, 2)[inside_RL]), "uint8")})
    width = min(layout.max_columns, kept_RHL.shape[2])
    weights_RHM, columns_RHM = kept_RHL.sort(dim=2, descending=True, stable=True)
    weights_RHM, columns_RHM = weights_RHM[..., :width], columns_RHM[..., :width]
    inside_RM = torch.arange(width, device=kept_RHL.device) < lengths_R[:, None]
    residual_RH = (1 - weights_RHM.sum(2)).clamp(min=0)
    return Extracted(
        {
            f"{group}/weights": numpy_of(encode_attention(weights_RHM.transpose(1, 2)[inside_RM]), "uint8"),
            f"{group}/columns": numpy_of(columns_RHM.transpose(1, 2)[inside_RM], "uint32"),
            f"{group}/residual": numpy_of(residual_RH.to(torch.float16), "float16"),
        }
    )
