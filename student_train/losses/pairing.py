"""Which layer of the student stands for which of the teacher's: by depth fraction; and how heavy each pair is."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from model_taps.attention import softmax_attention_layers
from model_taps.block_parts import Absent
from model_taps.blocks import layer_at_depth, num_layers
from model_taps.slices import resolve
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from signal_store.signals import Tap


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A teacher's layer in the cache and the student's layer at the same depth; `teacher_width` of the states."""

    teacher: int
    student: int
    teacher_width: int = 0


def state_pairs(term: str, tap: Tap, cache: Cache, student: PreTrainedModel, own_tap: Tap | None = None) -> tuple[LayerPair, ...]:
    """The cached layers of a tap, the shallowest first; MismatchError where the cache or the student has none. `own_tap`: where the
    student's are read, if elsewhere."""
    calibration, depth, own = cache.manifest.calibration, cache.manifest.teacher.num_layers, num_layers(student)
    held = sorted((h.layer, h.width) for h in calibration.hidden if h.tap == tap)
    if not held:
        raise MismatchError(
            f"{term}: the cache holds no {tap}",
            expected=f"signals.hidden.taps with {tap}",
            found=sorted({h.tap for h in calibration.hidden}) or "no hidden states",
            where=cache.uri,
            remedy=f"Build a cache (or an overlay) that does, or switch {term} off.",
        )
    pairs = tuple(LayerPair(layer, layer_at_depth(layer / depth, own), width) for layer, width in held)
    for pair in pairs:
        found = resolve(student, own_tap or tap, pair.student)
        if isinstance(found, Absent):
            raise MismatchError(
                f"{term}: block {pair.student} of the student has no {own_tap or tap}",
                expected="a tap that exists",
                found=found.reason,
                where="student",
                remedy=f"Switch {term} off.",
            )
    return pairs


def row_pairs(term: str, layers: tuple[int, ...], cache: Cache, student: PreTrainedModel) -> tuple[LayerPair, ...]:
    """Teacher's layers with softmax attention, and the student's nearest at or above the same depth that have it."""
    able = softmax_attention_layers(student)
    if not able:
        raise MismatchError(f"{term}: the student has no softmax attention", expected="a block that has", where="student")
    depth, own = cache.manifest.teacher.num_layers, num_layers(student)
    wanted = [(layer, layer_at_depth(layer / depth, own)) for layer in layers]
    return tuple(LayerPair(t, max((x for x in able if x <= s), default=able[0])) for t, s in wanted)


def depth_weights(count: int, decay: float, progress: float) -> list[float]:
    """γ^i / Σ_j γ^j of each of `count` layers, the shallowest first; γ = decay + (1 - decay) · progress goes to 1."""
    gamma = decay + (1 - decay) * progress
    powers = [gamma**i for i in range(count)]
    return [power / sum(powers) for power in powers]
