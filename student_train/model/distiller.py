"""The one wrapped module of a training step: student, what the terms learn, and all losses inside a single forward.

Outside of it DDP would leave gradients unsynchronised in silence, and FSDP2 would raise. Every trainable parameter takes part in
every micro-step: a term without tokens sums over nothing, and its gradient is zero.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.attention import captured_layers, enable_row_capture, refuse_silent_rows, tap_attention_rows
from model_taps.blocks import model_body
from model_taps.head import final_hidden, output_head
from model_taps.slices import refuse_silent_taps, tap_states
from student_train.data.aligned_rows import AlignedRows
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.signals.attention import AttentionPart
from student_train.data.signals.distribution import DistributionPart
from student_train.losses.attention_rows import HeadPairs, decoded_rows, match_heads
from student_train.losses.gate import RowLosses
from student_train.losses.head_terms import OutputTargets
from student_train.losses.objective import Objective
from student_train.losses.output_head import Impl, output_loss
from student_train.losses.row_queries import joined_queries, split_rows, stored_rows
from student_train.losses.temporal import TemporalLoss
from student_train.losses.term import StudentOutputs

Sums = dict[str, Tensor]
"""Plain sums over a micro-batch by name, detached: of each term a float32 scalar; `GATE_WEIGHTS` where there is a gate."""
GATE_WEIGHTS = "gate_weights"
"""float32 [levels, token types, 2]: (Σ weight, tokens)."""


class Distiller(nn.Module):
    """Student and terms. `forward(batch, scales)` gives (scaled total, in the graph; sums by term); `forward(batch, look=f)` gives
    what `f` makes of the student and the batch."""

    def __init__(self, student: PreTrainedModel, objective: Objective, *, impl: Impl = "torch") -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.impl: Impl = impl
        self.terms = nn.ModuleDict(objective.states)
        self.gate = objective.gate
        self.codecs = Codecs(None)
        self.head_pairs: HeadPairs = {}
        self._open_taps = contextlib.ExitStack()
        if objective.student_rows:
            enable_row_capture(student)

    def forward(
        self,
        batch: CodedBatch,
        scales: Mapping[str, float] | None = None,
        progress: float = 0.0,
        *,
        look: "Callable[[Distiller, CodedBatch], Any] | None" = None,
    ) -> Any:
        """Losses of a micro-batch, or what `look` makes of it: whatever runs the student goes through here.

        Taps stay open until `close_taps`: activation checkpointing runs blocks again in the backward pass, and must meet the same.
        An error closes them.

        Args:
            batch: one micro-batch, on the student's device.
            scales: by term, its weight times the number of ranks over its global count.
            progress: of the run, in [0, 1].
            look: an evaluation, or the matching of heads, instead of losses; no gradient is asked of it.
        Returns:
            (Σ scale · sum over the terms, float32 scalar in the graph; the sums by term, detached), or what `look` returns.
        """
        if look is not None:
            return look(self, batch)
        assert scales is not None, "losses need their scales"
        try:
            return self._losses(batch, scales, progress)
        except BaseException:
            self.close_taps()
            raise

    def refuse_silent_rows(self) -> None:
        """InputError where a term reads attention rows of a block that gives none."""
        wanted = {layer for layers in self.objective.student_rows.values() for layer in layers}
        if wanted:
            vocab_size = self.student.config.get_text_config(decoder=True).vocab_size
            refuse_silent_rows(self.student, captured_layers(self.student, vocab_size), wanted)

    def close_taps(self) -> None:
        """After the backward pass."""
        self._open_taps.close()

    def _losses(self, batch: CodedBatch, scales: Mapping[str, float], progress: float) -> tuple[Tensor, Sums]:
        objective = self.objective
        wanted = objective.student_rows
        states = self._open_taps.enter_context(tap_states(self.student, objective.student_states))
        queries = {rows_of: rows_of(batch) for rows_of in wanted}
        taken = self._open_taps.enter_context(tap_attention_rows(joined_queries(wanted, queries)))
        (final, balance), head = self._hidden_and_balance(batch), output_head(self.student)
        codes, aligned = DistributionPart.codes_of(batch), batch.part(AlignedRows)
        targets = OutputTargets(batch.labels, codes, self.codecs.distribution, batch.importance, aligned)
        terms = objective.output_terms(scales)
        total, losses_KN = output_loss(final[batch.flat], head, targets, list(terms.values()), impl=self.impl)
        sums = {name: losses_N.sum() for name, losses_N in zip(terms, losses_KN, strict=True) if name in scales}
        if balance is not None:
            sums["router_balance"] = balance
            total = total + scales["router_balance"] * balance
        refuse_silent_taps(self.student, states, objective.student_states, batch.input_ids.shape)
        rows = split_rows(wanted, queries, taken)
        outputs = StudentOutputs(batch, self.codecs, states, queries, rows, final, head, self.head_pairs, progress)
        levels = () if self.gate is None else self.gate.levels
        for name, term in self.terms.items():
            if name not in levels:
                sums[name] = term(outputs)
                total = total + scales[name] * sums[name]
        if self.gate is not None:
            losses = {name: term.per_token(outputs) for name, term in self.terms.items() if isinstance(term, TemporalLoss)}
            fused = self.gate.fuse(losses, RowLosses.of(list(terms.values()), list(losses_KN)), outputs)
            total = total + scales["gate"] * fused.own
            sums |= {"gate": fused.own, GATE_WEIGHTS: fused.weight_sums}
            for name in levels:
                sums[name] = losses[name].sum()
                total = total + scales[name] * fused.weighted[name]
        return total, {name: value.detach() for name, value in sums.items()}

    def final_hidden(self, batch: CodedBatch) -> Tensor:
        """[B · S, D]: the student's states before its output head, of every token of the batch."""
        return final_hidden(self.student, batch.input_ids, batch.position_ids if batch.packed else None).flatten(0, 1)

    def _hidden_and_balance(self, batch: CodedBatch) -> tuple[Tensor, Tensor | None]:
        """What the output head reads, and the sum of the experts' balance, None where it is off: nothing else is run then."""
        if self.objective.balance is None:
            return self.final_hidden(batch), None
        positions = batch.position_ids if batch.packed else None
        body = model_body(self.student)
        found = body(batch.input_ids, position_ids=positions, use_cache=False, output_router_logits=True)
        return found.last_hidden_state.flatten(0, 1), self.objective.balance(found.router_logits, batch.real)

    @torch.no_grad()
    def choose_heads(self, batch: CodedBatch) -> bool:
        """Match heads once, on the keywords of a batch; False if it has none."""
        keyword = AttentionPart.of(batch).keyword
        if not keyword.any():
            return False
        query = stored_rows(batch)
        with tap_attention_rows(dict.fromkeys(self.objective.student_rows[stored_rows], query)) as taken:
            self.final_hidden(batch)
        for pair in self.objective.matched_layers:
            teacher = decoded_rows(batch, pair.teacher)
            assert teacher is not None
            every_head = list(range(teacher.weights.shape[1]))
            self.head_pairs[pair.teacher] = match_heads(teacher.of(keyword, every_head), taken[pair.student][keyword])
        return True
