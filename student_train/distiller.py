"""The one wrapped module of a training step: student, projections and all losses inside a single forward.

Outside of it DDP would leave gradients unsynchronised in silence. Every trainable parameter takes part in every micro-step: a
term without tokens sums over nothing, and its gradient is zero.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.attention import RowQuery, enable_row_capture, tap_attention_rows
from model_taps.blocks import mean_abs_activation, num_layers
from model_taps.head import final_hidden, output_head
from model_taps.slices import State, tap_states
from signal_store.attention_codec import decode_attention
from signal_store.cache import Cache
from signal_store.distribution_codec import DistributionCodec
from signal_store.hidden_codec import HiddenCodec
from student_train.batch import AttentionCodes, CodedBatch
from student_train.losses.apc import TeacherRows, apc_rows, match_heads
from student_train.losses.chunked import OutputTargets, output_loss
from student_train.losses.lhsm import lhsm_sum, make_projection
from student_train.losses.objective import Objective

HeadPairs = dict[int, list[tuple[int, int]]]
"""By teacher layer: (stored head of the teacher, head of the student)."""


@dataclass(slots=True)
class Codecs:
    """The cache's calibrated constants on the training device."""

    distribution: DistributionCodec | None
    hidden: dict[State, HiddenCodec] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache, objective: Objective, device: torch.device) -> "Codecs":
        """Read what the objective needs of `calibration/`."""
        signal = cache.manifest.signals.distribution
        distribution = None
        if objective.needs.distribution and signal is not None:
            rank = cache.manifest.calibration.tail_rank
            names = ("head_range", "tail_bias", *(("mean", "encode_matrix", "tail_step", "tail_basis") if rank else ()))
            arrays = {f"distribution/{name}": _constant(cache, f"distribution/{name}") for name in names}
            if not rank:  # zarr keeps no array of no columns
                empty = np.zeros((len(arrays["distribution/tail_bias"]), 0), np.float32)
                arrays |= {f"distribution/{name}": empty for name in ("mean", "encode_matrix", "tail_basis")}
                arrays["distribution/tail_step"] = np.zeros(0, np.float32)
            distribution = DistributionCodec.from_arrays(arrays, signal, cache.manifest.teacher.logit_softcap).to(device)
        hidden = {}
        held = cache.manifest.signals.hidden
        for layout in cache.manifest.calibration.hidden:
            if (layout.tap, layout.layer) in objective.needs.hidden:
                names = ("mean", "spread", *(("basis",) if layout.rank is not None else ()))
                place = layout.group.replace("/", ".")
                found = {f"{layout.group}/{name}": _constant(cache, f"{place}/{name}") for name in names}
                bits = 8 if held is None or held.values == "int8" else 16
                hidden[layout.tap, layout.layer] = HiddenCodec.from_arrays(found, layout.group, bits).to(device)
        return cls(distribution, hidden)


def _constant(cache: Cache, path: str) -> NDArray[np.float32]:
    return cache.read(f"calibration/{path}").astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class StepLosses:
    """The scaled `total`, in the graph; and per term the plain sum over this micro-batch, detached."""

    total: Tensor
    sums: dict[str, Tensor]


class Distiller(nn.Module):
    """Student and projections; `forward(batch, scales)` gives the losses of a micro-batch."""

    def __init__(self, student: PreTrainedModel, objective: Objective, cache: Cache) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        widths = {h.layer: h.width for h in cache.manifest.calibration.hidden if h.tap == "block_output"}
        own = student.config.get_text_config().hidden_size
        self.projections = nn.ModuleDict({str(p.teacher): make_projection(own, widths[p.teacher]) for p in objective.hidden_pairs})
        self.codecs = Codecs(None)
        self.head_pairs: HeadPairs = {}
        if objective.attention_pairs:
            enable_row_capture(student)

    @property
    def _no_split_modules(self) -> list[str]:
        return list(self.student._no_split_modules or [])  # noqa: SLF001  (what FSDP wraps by)

    def get_input_embeddings(self) -> nn.Module:
        """The student's, as accelerate asks for them."""
        return self.student.get_input_embeddings()

    def forward(self, batch: CodedBatch, scales: Mapping[str, float]) -> StepLosses:
        """Losses of a micro-batch. `scales`: by term, weight times ranks over the global count."""
        objective = self.objective
        query = RowQuery(batch.row_batch, batch.row_query, batch.row_first)
        with contextlib.ExitStack() as taps:
            states: list[State] = [("block_output", p.student) for p in objective.hidden_pairs]
            if objective.losses.asr:
                states += [("ffn_activation", layer) for layer in range(1, num_layers(self.student) + 1)]
            blocks = taps.enter_context(tap_states(self.student, states))
            rows = taps.enter_context(tap_attention_rows(query, [p.student for p in objective.attention_pairs]))
            hidden_BSD = final_hidden(self.student, batch.input_ids, batch.position_ids if batch.packed else None)
        targets = OutputTargets(batch.labels, batch.distribution, self.codecs.distribution)
        terms = objective.output_terms(scales)
        total, row_sums = output_loss(hidden_BSD.flatten(0, 1)[batch.flat], output_head(self.student), targets, terms)
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
        return StepLosses(total, {name: value.detach() for name, value in sums.items()})

    def _lhsm(self, batch: CodedBatch, states: dict[State, Tensor]) -> Tensor:
        parts = []
        for pair in self.objective.hidden_pairs:
            states_PD = states["block_output", pair.student].flatten(0, 1)[batch.hidden_flat]
            projection = self.projections[str(pair.teacher)]
            assert isinstance(projection, nn.Linear)
            codes = batch.hidden.get(("block_output", pair.teacher))
            codec = self.codecs.hidden["block_output", pair.teacher]
            target = states_PD.new_zeros(0, len(codec.mean)) if codes is None else codec.decode(codes.values, codes.scale)
            parts.append(lhsm_sum(states_PD, target, projection))
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
            final_hidden(self.student, batch.input_ids, batch.position_ids if batch.packed else None)
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
