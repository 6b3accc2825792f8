"""Attention along the text: a keyword's row and the rows of the three tokens before it, as one tensor.

D = A_T - A_S, [layer pair, head, step, key], rows shorter than the keyword's padded with zeros; Σ_n ‖D₍ₙ₎‖_* / (4 √numel) over its
four unfoldings. The nuclear norm keeps a gradient of constant size where D is nothing but the codec's rounding:
each singular value σ counts √(σ² + ε²) - ε, ε the largest that rounding makes. Where the cache keeps the heaviest columns only, D
lives on those and on what is left over. Legend: K keywords, A layer pairs, H heads, T steps, L keys.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.codecs.attention import MAX_ERROR
from signal_store.errors import MismatchError
from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.data.signals.attention import AttentionPart, AttentionRequest
from student_train.losses.attention_rows import TeacherRows, decoded_rows
from student_train.losses.kinds import Kind
from student_train.losses.pairing import row_pairs
from student_train.losses.row_queries import stored_rows
from student_train.losses.schedule import WeightField, constant
from student_train.losses.temporal import TemporalLoss, TokenLosses
from student_train.losses.term import Reads, StateTerm, StudentOutputs, TermSection

STEPS = 4


class AttentionEvolutionSection(TermSection):
    """Σ_n ‖D₍ₙ₎‖_* / (4 √numel), D = teacher's less student's attention at a keyword and the three steps before it, a tensor
    [layer, head, step, key] and D₍ₙ₎ its unfoldings, smoothed at the codec's noise; mean over keywords."""

    weight: WeightField = constant(0.2)


class AttentionEvolution(TemporalLoss):
    """Keywords with the rows before them, head by matched head."""

    def __init__(self, _section: AttentionEvolutionSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__()
        signal = cache.manifest.signals.attention
        held = 0 if signal is None else signal.previous_steps
        if held < STEPS - 1:
            raise MismatchError(
                "attention_evolution: the cache holds too few steps before a keyword",
                expected=f"signals.attention.previous_steps of at least {STEPS - 1}",
                found=held,
                where=cache.uri,
            )
        layers = tuple(a.layer for a in cache.manifest.calibration.attention)
        self.matched = row_pairs("attention_evolution", layers, cache, student)
        self.reads = Reads(
            SignalRequest.of(AttentionRequest(layers, steps=True)), rows={stored_rows: tuple(p.student for p in self.matched)}
        )

    def count(self, batch: CodedBatch) -> int:
        """Keywords with three tokens before them."""
        return len(step_rows(batch))

    def per_token(self, outputs: StudentOutputs) -> TokenLosses:
        """Of keywords."""
        with torch.autocast(outputs.final.device.type, enabled=False):
            return self._of_keywords(outputs)

    def _of_keywords(self, outputs: StudentOutputs) -> TokenLosses:
        rows_KT = step_rows(outputs.batch)
        rows = {pair: outputs.rows[stored_rows, pair.student] for pair in self.matched}
        if not len(rows_KT):
            nothing = 0 * torch.stack([own.sum() for own in rows.values()]).sum()
            return TokenLosses(rows_KT[:, 0], nothing.new_zeros(0), nothing)
        keys = min(own.shape[2] for own in rows.values())  # a layer of which other rows are wanted too may be padded further
        differences = []
        for pair, own_RGL in rows.items():
            teacher = decoded_rows(outputs.batch, pair.teacher)
            assert teacher is not None
            heads = outputs.head_pairs[pair.teacher]
            everywhere = torch.ones(len(own_RGL), dtype=torch.bool, device=own_RGL.device)
            chosen = teacher.of(everywhere, [t for t, _ in heads])
            differences.append(row_differences(chosen, own_RGL[:, [s for _, s in heads], :keys])[rows_KT].transpose(1, 2))
        part, keyword_K = AttentionPart.of(outputs.batch), rows_KT[:, 0]
        numel_K = part.length[rows_KT].sum(1) * len(self.matched) * differences[0].shape[1]
        flat_K = part.batch[keyword_K] * outputs.batch.input_ids.shape[1] + part.query[keyword_K]
        return TokenLosses(flat_K, tensor_nuclear_norm(torch.stack(differences, 1), numel_K, MAX_ERROR))


def step_rows(batch: CodedBatch) -> Tensor:
    """int64 [K, T]: of each keyword that has them, its row and those of the three tokens before it."""
    rows = AttentionPart.of(batch)
    keyword_K = rows.keyword.nonzero()[:, 0]
    back_T = torch.arange(STEPS, device=keyword_K.device)
    rows_KT = keyword_K[:, None] - back_T
    inside_KT = rows_KT >= 0
    rows_KT = rows_KT.clamp(min=0)
    same = inside_KT & (rows.query[rows_KT] == rows.query[keyword_K][:, None] - back_T)
    for place in (rows.batch, rows.first):
        same &= place[rows_KT] == place[keyword_K][:, None]
    return rows_KT[same.all(1)]


def row_differences(teacher: TeacherRows, student_RHL: Tensor) -> Tensor:
    """A_T - A_S on the teacher's columns, and of what lies outside of them.

    Args:
        teacher: R rows of H heads, on M stored columns each.
        student_RHL: float [R, H, L], the student's matched heads, in the graph; L at least the teacher's longest row.
    Returns:
        Float [R, H, L + 1]; the last column is the mass outside the stored columns, 0 where all are stored.
    """
    kept_RHM = teacher.weights > 0
    matched_RHM = student_RHL.gather(2, teacher.columns)
    if teacher.residual is None:
        dense_RHL = torch.nn.functional.pad(teacher.weights, (0, student_RHL.shape[2] - teacher.weights.shape[2])) - student_RHL
        return torch.nn.functional.pad(dense_RHL, (0, 1))
    apart_RHM = (teacher.weights - matched_RHM) * kept_RHM
    dense_RHL = torch.zeros_like(student_RHL).scatter_add(2, teacher.columns, apart_RHM)
    rest_RH = teacher.residual - (1 - (matched_RHM * kept_RHM).sum(2))
    return torch.cat([dense_RHL, rest_RH[..., None]], 2)


def tensor_nuclear_norm(tensor_KAHTL: Tensor, numel_K: Tensor, noise: float) -> Tensor:
    """1/4 Σ_n Σ_i (√(σ²_ni + ε²) - ε) / √numel, σ_ni the singular values of the n-th unfolding, ε = noise · √numel.

    Args:
        tensor_KAHTL: float32 or float64 [K, A, H, T, L], filled up with zeros.
        numel_K: int64, entries of each tensor without the filling.
        noise: the largest error of an entry, of which the norm has no slope.
    Returns:
        Float [K], at least 0, in units of an entry's root mean square; not reduced.
    Source: Liu et al. 2013, "Tensor Completion for Estimating Missing Values in Visual Data", for the norm over unfoldings.
    """
    unfoldings = [tensor_KAHTL.movedim(axis, 1).flatten(2) for axis in range(1, 5)]
    scale_K = numel_K.to(tensor_KAHTL.dtype).clamp(min=1).sqrt()
    floor_K1 = (noise * scale_K)[:, None]
    total_K = torch.zeros_like(scale_K)
    for matrix in unfoldings:
        short = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
        squares = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0)
        total_K = total_K + ((squares + floor_K1.square()).sqrt() - floor_K1).sum(1)
    return total_K / (len(unfoldings) * scale_K)


TERM = StateTerm(section=AttentionEvolutionSection, kind=Kind.TEMPORAL, module=AttentionEvolution, residue=1e-3)
