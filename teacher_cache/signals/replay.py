"""The path of a final hidden state up the gradient of its own loss: how the teacher's meaning would decay.

From h⁰, the last block's output at a position, K steps h^{j+1} = h^j + η‖h⁰‖ g/‖g‖ with g = ∂(-log p(next token))/∂h through
the frozen final norm and output head alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model_taps.blocks import unsupported
from model_taps.head import final_norm
from model_taps.neighbours import relative_difference, tolerance
from model_taps.slices import State
from signal_store.codecs.hidden import HiddenCodec
from signal_store.errors import InputError
from signal_store.format.capacities import Capacities
from signal_store.signals import ReplaySignal
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.signals.base import Facts, SampledExtractor, Scale, Trial
from teacher_cache.signals.coded_states import coded_states
from teacher_cache.signals.extracted import Extracted, numpy_of
from teacher_cache.signals.layers import chosen_layers
from teacher_cache.signals.sampling import drawn, generator, key_of, per_segment
from teacher_cache.signals.unit_work import Places, SignalBatch
from teacher_cache.teacher.forward import TapRequest, TeacherOutputs
from teacher_cache.teacher.load import Teacher

LogitsOf = Callable[[Tensor], Tensor]
"""From states before the final norm [P, D] to logits [P, V]."""


class ReplayExtractor(SampledExtractor[ReplaySignal, list[int]]):
    """Paths from some positions of finished texts."""

    document_key = "replay_layers"
    trial: ClassVar[Trial] = {"gradient": True}

    def positions(self, unit: UnitPlan) -> Places:
        """Rows whose label counts, of segments that end their document as the model would have."""
        signal = self.section

        def chosen(segment: int, own: Places) -> Places:
            seed, text = key_of(unit, segment, signal.seed)
            sampled = unit.finished[segment] and generator((seed, text ^ 1)).random() < signal.share
            eligible = own[unit.loss_mask[own] == 1] if sampled else own[:0]
            return drawn(eligible, signal.positions_per_segment, (seed, text))

        return per_segment(unit, chosen)

    def planned(self) -> dict[str, Any]:
        """Which positions."""
        return {
            "replay_positions": [self.section.positions_per_segment, self.section.seed],
            "replay_share": self.section.share,
        }

    def refuse_empty(self, needs: Capacities) -> None:
        """Finished texts there must be."""
        if needs.replay_rows <= 1:
            raise InputError(
                "no text ends as the model would end it, so the replay signal has no position",
                expected="append_eos, or chats that end with the assistant",
                found="none",
                where="signals.replay",
            )

    @property
    def needs_head(self) -> bool:
        """Always."""
        return True

    def decide(self, teacher: Teacher) -> Facts:
        """Layers of the gradients."""
        return list(chosen_layers(self.section.layers, self.section.depths, teacher))

    def taps(self, facts: Facts, teacher: Teacher) -> TapRequest:
        """Where the paths begin; gradients where they are wanted."""
        return TapRequest(states=(_start(teacher),), gradient_layers=tuple(facts) if self.section.gradient else ())

    def refuse_unsupported(self, teacher: Teacher, outputs: TeacherOutputs) -> None:
        """A path goes through final norm and head alone: they must be all that follows the last block."""
        with torch.no_grad():
            difference = relative_difference(final_norm(teacher.model)(outputs.states[_start(teacher)]), outputs.hidden)
        if difference > tolerance(teacher.model):
            raise unsupported(
                teacher.model,
                "the head does not read the last block's output through the final norm alone",
                f"a relative difference of {difference:.2g}; signals.replay cannot be cached",
            )

    def extract(self, prepared: list[int], batch: SignalBatch) -> Extracted:
        """Steps and losses of the batch's positions; gradients there."""
        teacher, signal = batch.teacher, self.section
        head = teacher.head
        assert head is not None
        norm, dtype = final_norm(teacher.model), teacher.model.dtype
        places = batch.rows_of(batch.work.once(self.positions))
        states = batch.outputs.states[_start(teacher)][places]
        path = ascend(
            lambda h: head.logits(norm(h.to(dtype)).float()), states, batch.labels[places], signal.steps, signal.step_size
        )
        width = states.shape[1]
        values, scale = HiddenCodec.plain(signal.steps * width).to(path.steps.device).encode(path.steps.flatten(1, 2))
        rows: dict[str, Any] = {
            "replay/path/values": numpy_of(values.view(path.steps.shape), "int8"),
            "replay/path/scale": numpy_of(scale, "float32"),
            "replay/path/nll": numpy_of(path.nll, "float32"),
        }
        plain = HiddenCodec.plain(width).to(path.steps.device)
        for layer in prepared if signal.gradient else ():
            rows |= coded_states(plain, f"replay/gradient/{layer}", batch.outputs.gradients[layer][places]).rows
        return Extracted(rows)

    def bytes_per_token(self, scale: Scale) -> tuple[float, float]:
        """Steps are noise."""
        layers = len(self.section.layers or self.section.depths) if self.section.gradient else 0
        row = 2 * scale.config.hidden_size * (self.section.steps + 1 + layers) * scale.per_token("replay_rows")
        return 0.5 * row, 1.1 * row


def _start(teacher: Teacher) -> State:
    return "block_output", teacher.identity.num_layers


@dataclass(frozen=True, slots=True)
class Path:
    """`steps` [P, K, D]: h^j - h⁰ for j = 1..K; `nll` [P, K + 1] nats at each state, h⁰ first."""

    steps: Tensor
    nll: Tensor


def ascend(logits_of: LogitsOf, states_PD: Tensor, labels_P: Tensor, steps: int, step_size: float) -> Path:
    """The path of each state, in float32."""
    start = states_PD.detach().float()
    length_P1 = step_size * start.norm(dim=1, keepdim=True)
    state, states, losses = start, [], []
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            leaf = state.clone().requires_grad_()
            nll_P = F.cross_entropy(logits_of(leaf), labels_P.clone(), reduction="none")
            (gradient,) = torch.autograd.grad(nll_P.sum(), leaf)
            losses.append(nll_P.detach())
            state = state + length_P1 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            states.append(state - start)
    losses.append(F.cross_entropy(logits_of(state), labels_P, reduction="none"))
    return Path(torch.stack(states, 1), torch.stack(losses, 1))
