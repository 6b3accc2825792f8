"""Whether a teacher gives what a recipe asks for: each signal is tried on the first segment, before any work."""

from collections.abc import Sequence

import torch

from model_taps.blocks import unsupported
from model_taps.head import final_norm
from model_taps.neighbours import relative_difference, tolerance
from model_taps.slices import State
from signal_store.format.manifest import StatsLayout
from signal_store.signals import Signals
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.teacher.forward import Listening, Teacher, TeacherBatch, think


def listening_of(
    signals: Signals,
    states: Sequence[State],
    row_layers: Sequence[int],
    stats: StatsLayout | None,
    replay_layers: Sequence[int],
    evidence_layers: Sequence[int],
    last_layer: int,
) -> Listening:
    """All that the signals read of the teacher: `states` and `row_layers` of hidden and attention, layers of the others."""
    wanted, rows = list(states), [*row_layers]
    gradients: list[int] = []
    if signals.stats is not None and stats is not None:
        wanted += [("ffn_activation", layer) for layer in stats.layers] if signals.stats.ffn else []
        rows += stats.attention_layers if signals.stats.attention else ()
        gradients += stats.layers if signals.stats.gradient else ()
    if signals.replay is not None:
        wanted.append(("block_output", last_layer))
        gradients += replay_layers if signals.replay.gradient else ()
    rows += evidence_layers
    return Listening(tuple(dict.fromkeys(wanted)), tuple(dict.fromkeys(rows)), tuple(dict.fromkeys(gradients)))


def refuse_unsupported(signals: Signals, listening: Listening, teacher: Teacher, unit: UnitPlan) -> None:
    """InputError or MismatchError naming what of the signals the family does not give."""
    last: State = ("block_output", teacher.identity.num_layers)
    thoughts = think(teacher, unit, TeacherBatch(0, 1, ((0,),)), listening)
    for layer, rows in thoughts.rows.items():
        if rows.shape[1] != teacher.identity.num_heads:
            heads = f"{rows.shape[1]} where its config says {teacher.identity.num_heads}"
            raise unsupported(teacher.model, f"block {layer} has attention rows of another number of heads", heads)
    if signals.replay is not None:
        norm = final_norm(teacher.model)
        with torch.no_grad():
            difference = relative_difference(norm(thoughts.states[last]), thoughts.hidden)
        if difference > tolerance(teacher.model):
            raise unsupported(
                teacher.model,
                "the head does not read the last block's output through the final norm alone",
                f"a relative difference of {difference:.2g}; signals.replay cannot be cached",
            )
