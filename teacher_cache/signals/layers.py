"""Which blocks of a teacher a signal is taken at."""

from model_taps.blocks import layer_at_depth
from signal_store.errors import InputError
from teacher_cache.teacher.load import Teacher


def chosen_layers(numbers: tuple[int, ...] | None, depths: tuple[float, ...], teacher: Teacher) -> tuple[int, ...]:
    """The blocks of these numbers (from 1), ascending, or those at these depths."""
    count = teacher.identity.num_layers
    if numbers is None:
        return tuple(sorted({layer_at_depth(f, count) for f in depths}))
    return tuple(sorted(set(numbers)))


def refuse_no_rows(teacher: Teacher, signal: str, remedy: str = "") -> None:
    """InputError where no block's attention rows can be had. `remedy`: what else than leaving the signal out helps."""
    if not teacher.row_layers:
        raise InputError(
            "no attention rows of this family can be had",
            expected="softmax attention that goes through transformers' attention interface",
            found=teacher.identity.model_type,
            where=f"signals.{signal}",
            remedy=f"Leave signals.{signal} out{remedy}.",
        )
