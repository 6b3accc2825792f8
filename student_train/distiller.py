"""The one wrapped module of a training step: student, projections and all losses inside a single forward.

Outside of it DDP would leave gradients unsynchronised in silence, and FSDP2 would raise. Every trainable parameter takes part in
every micro-step: a term without tokens sums over nothing, and its gradient is zero.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.attention import RowQuery, enable_row_capture, tap_attention_rows
from model_taps.blocks import mean_abs_activation, num_layers
from model_taps.head import final_hidden, output_head
from model_taps.slices import State, tap_states
from signal_store.attention_codec import decode_attention
from signal_store.cache import Cache
from student_train.batch import AttentionCodes, CodedBatch
from student_train.codecs import Codecs
from student_train.fidelity import measure_rows
from student_train.losses.apc import TeacherRows, apc_rows, match_heads
from student_train.losses.chunked import OutputTargets, output_loss
from student_train.losses.lhsm import lhsm_sum, make_projection
from student_train.losses.objective import Objective

HeadPairs = dict[int, list[tuple[int, int]]]
"""By teacher layer: (stored head of the teacher, head of the student)."""
Sums = dict[str, Tensor]
"""Plain sums over a micro-batch by name, float32 scalars (evaluation: also vectors), detached."""


class Distiller(nn.Module):
    """Student and projections. `forward(batch, scales)` gives (scaled total, in the graph; sums by term); `forward(batch)`
    evaluates."""

    def __init__(self, student: PreTrainedModel, objective: Objective, cache: Cache, *, compiled: bool = False) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.compiled = compiled
        widths = {h.layer: h.width for h in cache.manifest.calibration.hidden if h.tap == "block_output"}
        own = student.config.get_text_config().hidden_size
        lhsm = objective.losses.lhsm
        self._projects_teacher = lhsm is not None and lhsm.project == "teacher"
        ends = {str(p.teacher): (own, widths[p.teacher])[:: -1 if self._projects_teacher else 1] for p in objective.hidden_pairs}
        self.projections = nn.ModuleDict({name: make_projection(*widths) for name, widths in ends.items()})
        self.codecs = Codecs(None)
        self.head_pairs: HeadPairs = {}
        self._open_taps = contextlib.ExitStack()
        if objective.attention_pairs:
            enable_row_capture(student)

    @property
    def _no_split_modules(self) -> list[str]:
        return list(self.student._no_split_modules or [])  # noqa: SLF001  (what FSDP wraps by)

    def get_input_embeddings(self) -> nn.Module:
        """The student's, as accelerate asks for them."""
        return self.student.get_input_embeddings()

    def forward(self, batch: CodedBatch, scales: Mapping[str, float] | None = None, *, matching: bool = False) -> Any:
        """Losses of a micro-batch. `scales`: by term, weight times ranks over the global count; None measures instead; `matching`
        matches heads instead (`choose_heads`): whatever runs the student goes through here.

        Taps stay open until `close_taps`: activation checkpointing runs blocks again in the backward pass, and must meet the same.
        """
        if matching:
            return self.choose_heads(batch)
        return self._measured(batch) if scales is None else self._losses(batch, scales)

    def close_taps(self) -> None:
        """After the backward pass."""
        self._open_taps.close()

    def _losses(self, batch: CodedBatch, scales: Mapping[str, float]) -> tuple[Tensor, Sums]:
        objective = self.objective
        query = RowQuery(batch.row_batch, batch.row_query, batch.row_first)
        states: list[State] = [("block_output", p.student) for p in objective.hidden_pairs]
        if objective.losses.asr:
            states += [("ffn_activation", layer) for layer in range(1, num_layers(self.student) + 1)]
        blocks = self._open_taps.enter_context(tap_states(self.student, states))
        rows = self._open_taps.enter_context(tap_attention_rows(query, [p.student for p in objective.attention_pairs]))
        hidden_ND = self._hidden(batch)[batch.flat]
        targets = OutputTargets(batch.labels, batch.distribution, self.codecs.distribution)
        terms = objective.output_terms(scales)
        total, row_sums = output_loss(hidden_ND, output_head(self.student), targets, terms, compiled=self.compiled)
        sums = dict(zip((term.kind for term in terms), row_sums, strict=True))
        if objective.losses.lhsm is not None:
            sums["lhsm"] = self._lhsm(batch, blocks)
        if objective.losses.apc is not None:
            sums["apc"] = self._apc(batch, rows)
        if objective.losses.asr is not None:
            activations = [state for (tap, _), state in blocks.items() if tap == "ffn_activation"]
            mean = mean_abs_activation(activations, batch.real)
            units = activations[0].shape[-1] if objective.losses.asr.reduction == "sum" else 1
            sums["asr"] = mean * batch.real.sum() * units
        for name in ("lhsm", "apc", "asr"):
            if name in sums:
                total = total + scales[name] * sums[name]
        return total, {name: value.detach() for name, value in sums.items()}

    def _hidden(self, batch: CodedBatch) -> Tensor:
        return final_hidden(self.student, batch.input_ids, batch.position_ids if batch.packed else None).flatten(0, 1)

    def _measured(self, batch: CodedBatch) -> Sums:
        """By segment: `segment_loss` in nats and `segment_labels` [segments]; and the sums of `fidelity.measure_rows`."""
        hidden_ND, head = self._hidden(batch)[batch.flat], output_head(self.student)
        rows = torch.tensor(batch.segment_rows, dtype=torch.int64, device=hidden_ND.device)
        segment_N = torch.repeat_interleave(torch.arange(len(rows), device=hidden_ND.device), rows)
        loss_N, sums = measure_rows(hidden_ND, head, batch.labels, batch.distribution, self.codecs.whole)
        empty = loss_N.new_zeros(len(rows))
        by_segment = {"segment_loss": loss_N, "segment_labels": (batch.labels >= 0).to(loss_N)}
        return sums | {name: empty.index_add(0, segment_N, value_N) for name, value_N in by_segment.items()}

    def _lhsm(self, batch: CodedBatch, states: dict[State, Tensor]) -> Tensor:
        parts = []
        for pair in self.objective.hidden_pairs:
            states_PD = states["block_output", pair.student].flatten(0, 1)[batch.hidden_flat]
            projection = self.projections[str(pair.teacher)]
            assert isinstance(projection, nn.Linear)
            codes = batch.hidden.get(("block_output", pair.teacher))
            codec = self.codecs.hidden["block_output", pair.teacher]
            target = states_PD.new_zeros(0, len(codec.mean)) if codes is None else codec.decode(codes.values, codes.scale)
            mapped, other = (target, states_PD) if self._projects_teacher else (states_PD, target)
            parts.append(lhsm_sum(mapped, other, projection))
        return torch.stack(parts).mean()

    def _apc(self, batch: CodedBatch, rows: dict[int, Tensor]) -> Tensor:
        parts = []
        for pair in self.objective.attention_pairs:
            teacher, has_residual = teacher_rows(batch, pair.teacher)
            if teacher is None:
                parts.append(rows[pair.student].sum() * 0)
                continue
            heads = self.head_pairs[pair.teacher]
            chosen = [t for t, _ in heads]
            kept = TeacherRows(teacher.weights[:, chosen], teacher.columns[:, chosen], teacher.residual[:, chosen])
            kl_RH = apc_rows(kept, rows[pair.student][:, [s for _, s in heads]], has_residual=has_residual)
            parts.append(kl_RH.mean(1).sum())
        return torch.stack(parts).mean()

    @torch.no_grad()
    def choose_heads(self, batch: CodedBatch) -> bool:
        """Match heads once, on a batch with keyword rows; False if it has none."""
        if not len(batch.row_batch):
            return False
        query = RowQuery(batch.row_batch, batch.row_query, batch.row_first)
        with tap_attention_rows(query, [p.student for p in self.objective.attention_pairs]) as rows:
            self._hidden(batch)
        for pair in self.objective.attention_pairs:
            teacher, has_residual = teacher_rows(batch, pair.teacher)
            assert teacher is not None
            self.head_pairs[pair.teacher] = match_heads(teacher, rows[pair.student], has_residual=has_residual)
        return True


def teacher_rows(batch: CodedBatch, layer: int) -> tuple[TeacherRows | None, bool]:
    """The decoded keyword rows of one teacher layer, padded to the longest; and whether they leave a residual."""
    codes: AttentionCodes | None = batch.attention.get(layer)
    if codes is None or not len(batch.row_length):
        return None, False
    lengths_R = batch.row_length
    columns_M = torch.arange(int(lengths_R.max()), device=lengths_R.device)
    inside_RM = columns_M < lengths_R[:, None]
    heads = codes.weights.shape[1]
    weights_RMH = torch.zeros(*inside_RM.shape, heads, device=lengths_R.device)
    weights_RMH[inside_RM] = decode_attention(codes.weights)
    if codes.columns is None:
        columns_RMH = columns_M[None, :, None].expand(len(lengths_R), -1, heads)
        residual_RH = weights_RMH.new_zeros(len(lengths_R), heads)
    else:
        columns_RMH = torch.zeros(*inside_RM.shape, heads, dtype=torch.int64, device=lengths_R.device)
        columns_RMH[inside_RM] = codes.columns.long()
        assert codes.residual is not None
        residual_RH = codes.residual.float()
    rows = TeacherRows(weights_RMH.transpose(1, 2), columns_RMH.transpose(1, 2).contiguous(), residual_RH)
    return rows.normalised(), codes.columns is not None
