"""One forward pass of the teacher over a batch: what of it is read out, in the unit's token order."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_taps.attention import RowQuery, refuse_silent_rows, tap_attention_rows
from model_taps.head import final_hidden, own_logits
from model_taps.slices import State, refuse_silent_taps, tap_states
from signal_store.errors import SignalStoreError
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.teacher.batches import BatchLayout, TeacherBatch, lay_out
from teacher_cache.teacher.gradients import gradients_of_activations, loss_gradients
from teacher_cache.teacher.load import Teacher


@dataclass(frozen=True, slots=True)
class TapRequest:
    """What is read out of the teacher while it runs: states at taps, attention rows of these layers, gradients of the loss with
    respect to the outputs of these blocks."""

    states: tuple[State, ...] = ()
    row_layers: tuple[int, ...] = ()
    gradient_layers: tuple[int, ...] = ()


NOTHING_MORE = TapRequest()
NO_PLACES: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What the teacher gave for the tokens of a batch, in the unit's token order; `tokens` are their places in the unit.

    `hidden` [n, D] what the output head reads; `logits` [n, V] float32 of a teacher without a usable head, else None; `states`
    (tap, layer) -> [n, d]; `rows` layer -> [R, H, L] attention of the tokens at `row_places` [R]; `gradients` layer -> [n, D].
    """

    tokens: slice
    hidden: Tensor
    logits: Tensor | None
    states: dict[State, Tensor]
    rows: dict[int, Tensor]
    row_places: NDArray[np.int64]
    row_lengths: Tensor
    gradients: dict[int, Tensor]


def forward(
    teacher: Teacher,
    unit: UnitPlan,
    batch: TeacherBatch,
    tap_request: TapRequest = NOTHING_MORE,
    row_places: NDArray[np.int64] | None = None,
) -> TeacherOutputs:
    """One forward pass over a batch, and a backward one where gradients are wanted. `row_places`: whose attention rows, ascending
    places in the unit. Running out of memory is an error, never a smaller batch."""
    laid = lay_out(unit, batch)
    wanted, query = _row_query(laid, NO_PLACES if row_places is None else row_places, teacher.device)
    ids = laid.input_ids.to(teacher.device)
    positions = None if laid.positions is None else laid.positions.to(teacher.device)
    flat_n = torch.from_numpy(laid.flat)

    def in_order(states: Tensor) -> Tensor:
        return states.detach().flatten(0, -2)[flat_n.to(states.device)].to(teacher.device)

    gradient_states: list[State] = [("block_output", layer) for layer in tap_request.gradient_layers]
    every_state: list[State] = list(dict.fromkeys([*tap_request.states, *gradient_states]))
    grad_mode = gradients_of_activations(teacher.model) if gradient_states else torch.inference_mode()
    wanted_rows = dict.fromkeys(tap_request.row_layers, query)
    with (
        grad_mode,
        tap_states(teacher.model, every_state) as states,
        tap_attention_rows(wanted_rows) as rows,
    ):
        logits = None
        if teacher.head is None:
            logits = own_logits(teacher.model, ids, positions)
            hidden = logits.new_zeros(*ids.shape, 0)
        else:
            hidden = final_hidden(teacher.model, ids, positions)
        refuse_silent_taps(teacher.model, states, every_state, ids.shape)
        refuse_silent_rows(teacher.model, rows, tap_request.row_layers)
        taken = [states[state] for state in gradient_states]
        gradients = loss_gradients(teacher, unit, laid, hidden, taken) if taken else []
    tapped = {f"{tap} {layer}": state for (tap, layer), state in states.items()}
    _refuse_not_finite({"final hidden state": hidden, **tapped}, unit, batch)
    return TeacherOutputs(
        laid.tokens,
        in_order(hidden),
        None if logits is None else in_order(logits)[:, : teacher.vocab_size],
        {state: in_order(states[state]) for state in tap_request.states},
        {layer: r.detach().to(teacher.device) for layer, r in rows.items()},
        wanted,
        query.lengths,
        {layer: in_order(g) for layer, g in zip(tap_request.gradient_layers, gradients, strict=True)},
    )


def _row_query(laid: BatchLayout, places: NDArray[np.int64], device: torch.device) -> tuple[NDArray[np.int64], RowQuery]:
    """Which of the unit's places are in the batch, and where their rows are."""
    width = laid.input_ids.shape[1]
    wanted = places[(places >= laid.tokens.start) & (places < laid.tokens.stop)]
    local = wanted - laid.tokens.start
    columns = (laid.flat[local] // width, laid.flat[local] % width, laid.segment_first[local])
    return wanted, RowQuery(*(torch.from_numpy(part).to(device) for part in columns))


def _refuse_not_finite(states: Mapping[str, Tensor], unit: UnitPlan, batch: TeacherBatch) -> None:
    """SignalStoreError naming the state and the documents, rather than codes of a number that is none."""
    for name, state in states.items():
        if not bool(state.sum(dtype=torch.float32).isfinite()):
            documents = sorted({int(d) for d in unit.document[batch.first : batch.last]})
            raise SignalStoreError(
                f"the teacher's {name} is not finite",
                expected="numbers",
                found="infinity or NaN",
                where=f"documents {documents[:10]} of source {int(unit.source[batch.first])}",
                remedy="Run the teacher in bfloat16 or float32, or leave these documents out.",
            )
