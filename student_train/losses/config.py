"""The recipe of an objective: which terms, how heavy, with which settings; and the presets."""

from typing import Any, Literal

from pydantic import Field

from signal_store.signals import Section
from student_train.losses.schedule import Weight, WeightField


def _constant(value: float) -> Weight:
    return Weight(start=value, end=value)


class CrossEntropyTerm(Section):
    """-log q(next token), mean over tokens whose label is stored."""

    weight: WeightField = _constant(1.0)


class TlaTerm(Section):
    """Temperature-scaled alignment of logits (REQUIREMENTS 66): T² · KL(p_T ‖ q_T), mean over tokens."""

    weight: WeightField = _constant(1.0)
    temperature: float = Field(3.0, gt=0)


class ReverseKlTerm(Section):
    """T² · KL(q_T ‖ p_T), which seeks the teacher's modes; mean over tokens. log p is floored at -40 nats."""

    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)


class JsdTerm(Section):
    """T² · (β KL(p_T ‖ m) + (1 - β) KL(q_T ‖ m)), m = β p_T + (1 - β) q_T: generalised Jensen-Shannon; mean over tokens."""

    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)


class TotalVariationTerm(Section):
    """T² · ½ Σ |q_T - p_T|, mean over tokens."""

    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)


DivergenceTerm = TlaTerm | ReverseKlTerm | JsdTerm | TotalVariationTerm


class LhsmTerm(Section):
    """Layer-wise hidden-state matching (67): mean squared difference of LayerNorm(P h_S) and LayerNorm(h_T); or P on the
    teacher's."""

    weight: WeightField = _constant(0.8)
    project: Literal["student", "teacher"] = "student"
    """Whose states the learned map is applied to, onto the width of the other's."""


class ApcTerm(Section):
    """Attention pattern at keywords (68): KL(a_T ‖ a_S), mean over keyword rows and heads."""

    weight: WeightField = Weight(start=0.0, end=0.5, begin=0.2)


class AsrTerm(Section):
    """Activation sparsity (71): |a| of the FFN's activations, mean over tokens, units and blocks; or their sum over units."""

    weight: WeightField = _constant(1e-3)
    reduction: Literal["mean", "sum"] = "mean"


class Losses(Section):
    """Terms by name; one that is left out is off."""

    cross_entropy: CrossEntropyTerm | None = None
    tla: TlaTerm | None = None
    reverse_kl: ReverseKlTerm | None = None
    jsd: JsdTerm | None = None
    total_variation: TotalVariationTerm | None = None
    lhsm: LhsmTerm | None = None
    apc: ApcTerm | None = None
    asr: AsrTerm | None = None

    @property
    def divergences(self) -> dict[str, DivergenceTerm]:
        """Terms that compare with the cached distribution, by name."""
        found = {name: getattr(self, name) for name in ("tla", "reverse_kl", "jsd", "total_variation")}
        return {name: term for name, term in found.items() if term is not None}


PRESETS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"cross_entropy": {}},
    "demo_kl": {"tla": {"temperature": 1.0}},
    "flash_004": {
        "tla": {"temperature": 3.0, "weight": {"start": 1.0, "end": 0.3}},
        "lhsm": {"weight": 0.8},
        "apc": {"weight": {"start": 0.0, "end": 0.5, "begin": 0.2}},
        "asr": {"weight": 1e-3},
    },
}
"""`flash_004` is the seed's objective and schedule (REQUIREMENTS 66-73); `demo_kl` is forward KL at temperature 1 alone."""
