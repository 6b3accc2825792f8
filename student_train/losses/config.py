"""The recipe of an objective: which terms, how heavy, with which settings; and the presets.

Each term says which of the five kinds of knowledge it carries (REQUIREMENTS 3). What computes it lies in a file of its own; this
one does not import torch.
"""

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from run_kit.recipe_file import LocalPath
from signal_store.format.section import Section
from student_train.losses.schedule import Weight, WeightField


def _constant(value: float) -> Weight:
    return Weight(start=value, end=value)


Kind = Literal["explicit", "implicit", "structured", "temporal", "task"]
KINDS: dict[Kind, str] = {
    "explicit": "token distributions",
    "implicit": "statistics of attention and activations",
    "structured": "features and residual maps",
    "temporal": "how states and attention move along the text",
    "task": "evidence of answers, coverage of summaries",
}


class Term(Section):
    """One term. `weight` as a function of progress; `kind` of knowledge."""

    kind: ClassVar[Kind]
    weight: WeightField


class CrossEntropyTerm(Term):
    """-log q(next token), mean over tokens whose label is stored."""

    kind: ClassVar[Kind] = "explicit"
    weight: WeightField = _constant(1.0)


class TlaTerm(Term):
    """Temperature-scaled alignment of logits (REQUIREMENTS 66): T² · KL(p_T ‖ q_T), mean over tokens."""

    kind: ClassVar[Kind] = "explicit"
    weight: WeightField = _constant(1.0)
    temperature: float = Field(3.0, gt=0)


class ReverseKlTerm(Term):
    """T² · KL(q_T ‖ p_T), which seeks the teacher's modes; mean over tokens. log p is floored at -40 nats."""

    kind: ClassVar[Kind] = "explicit"
    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)


class JsdTerm(Term):
    """T² · (β KL(p_T ‖ m) + (1 - β) KL(q_T ‖ m)), m = β p_T + (1 - β) q_T: generalised Jensen-Shannon; mean over tokens."""

    kind: ClassVar[Kind] = "explicit"
    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)


class TotalVariationTerm(Term):
    """T² · ½ Σ |q_T - p_T|, mean over tokens."""

    kind: ClassVar[Kind] = "explicit"
    weight: WeightField = _constant(1.0)
    temperature: float = Field(1.0, gt=0)


DivergenceTerm = TlaTerm | ReverseKlTerm | JsdTerm | TotalVariationTerm
DIVERGENCES = ("tla", "reverse_kl", "jsd", "total_variation")


class LhsmTerm(Term):
    """Layer-wise hidden-state matching (67): mean squared difference of LayerNorm(P h_S) and LayerNorm(h_T); or P on the
    teacher's."""

    kind: ClassVar[Kind] = "structured"
    weight: WeightField = _constant(0.8)
    project: Literal["student", "teacher"] = "student"
    """Whose states the learned map is applied to, onto the width of the other's."""


class ApcTerm(Term):
    """Attention pattern at keywords (68): KL(a_T ‖ a_S), mean over keyword rows and heads."""

    kind: ClassVar[Kind] = "implicit"
    weight: WeightField = Weight(start=0.0, end=0.5, begin=0.2)


class AsrTerm(Term):
    """Activation sparsity (71): |a| of the FFN's activations, mean over tokens, units and blocks; or their sum over units; or,
    `relative` (72), what a segment's Hoyer sparsity lacks to the teacher's, mean over segments and layers."""

    kind: ClassVar[Kind] = "implicit"
    weight: WeightField = _constant(1e-3)
    reduction: Literal["mean", "sum"] = "mean"
    relative: bool = False


class FeatureTerm(Term):
    """A term on states of paired layers. Layer i of them, the shallowest first, weighs γ^i / Σγ^j (27)."""

    depth_decay: float = Field(0.7, gt=0, le=1)
    """γ at the start; it goes to 1 linearly, so that deep layers are learned later."""
    max_tokens: int = Field(64, ge=8)
    """Of a segment's sampled tokens, evenly spread."""


class DirectionTerm(FeatureTerm):
    """1 - cos θ + λ · max(0, θ - θ₀)² between P h_S and h_T, in the cache's units of each channel; mean over sampled tokens
    (24)."""

    kind: ClassVar[Kind] = "structured"
    weight: WeightField = _constant(0.2)
    margin_degrees: float = Field(30.0, ge=0, lt=180)
    angle_weight: float = Field(1.0, ge=0)


class ActivationMmdTerm(FeatureTerm):
    """MMD² of FFN pre-activations, as sets of a segment's tokens, under a mixture of Gaussians whose widths and shares ascend (25);
    both sides LayerNormed and projected by frozen orthonormal maps; mean over segments."""

    kind: ClassVar[Kind] = "structured"
    weight: WeightField = _constant(0.1)
    directions: int = Field(128, ge=1)


class InputReconstructionTerm(FeatureTerm):
    """mean |g(h_S) - x_T| / mean |x_T|: a small head g rebuilds the teacher's layer input from the student's layer output, in the
    cache's units of each channel (26); mean over sampled tokens."""

    kind: ClassVar[Kind] = "structured"
    weight: WeightField = _constant(0.1)
    width: int = Field(256, ge=1)
    """Of g's hidden layer."""


class ResidualCkaTerm(FeatureTerm):
    """1 - CKA of the attention's outputs over a segment's tokens, linear, by the debiased estimator (6); mean over segments."""

    kind: ClassVar[Kind] = "structured"
    weight: WeightField = _constant(0.1)


class AttentionStatisticsTerm(Term):
    """|Q_T - Q_S| over the deciles of the heads' entropy, look-back, largest mass and mass on the first token (5); mean over
    segments and layers."""

    kind: ClassVar[Kind] = "implicit"
    weight: WeightField = _constant(0.2)


class SmoothnessTerm(Term):
    """(t / t_ref) · ‖h_t - h_{t-1}‖² over the segment's variance of h, t counted along the tokens of the segment that count (30);
    `relative`: only what exceeds the teacher's; mean over tokens that count."""

    kind: ClassVar[Kind] = "temporal"
    weight: WeightField = _constant(0.05)
    reference_tokens: int = Field(256, ge=1)
    relative: bool = True


class AttentionEvolutionTerm(Term):
    """Σ_n ‖D₍ₙ₎‖_* / (4 √numel), D = teacher's less student's attention at a keyword and the three steps before it, a tensor
    [layer, head, step, key] and D₍ₙ₎ its unfoldings, smoothed at the codec's noise (31); mean over keywords."""

    kind: ClassVar[Kind] = "temporal"
    weight: WeightField = _constant(0.2)


class ReplayTerm(Term):
    """Σ_j ρʲ ‖P Δs_j - Δh_j‖² + |ΔNLL_S - ΔNLL_T|: student and teacher walk up their own losses from the same token, steps and
    rises in units of the teacher's whole path (32); mean over sampled tokens of finished texts and over steps."""

    kind: ClassVar[Kind] = "temporal"
    weight: WeightField = _constant(0.05)
    discount: float = Field(0.9, gt=0, le=1)


class GateTerm(Term):
    """The weights of the temporal terms (smoothness, attention_evolution, replay), token by token, from features of the token,
    learned by itself (35); its loss is Σ w · L / EMA(L) - λ · entropy(w), mean over what they count."""

    kind: ClassVar[Kind] = "temporal"
    weight: WeightField = _constant(1.0)
    floor: float = Field(0.05, gt=0, lt=1 / 3)
    """Least weight of a term."""
    entropy_weight: float = Field(0.1, ge=0)
    """λ, per nat."""
    width: int = Field(32, ge=1)
    """Of the network's hidden layer."""
    largest: float = Field(10.0, gt=0)
    """Most that a token's L / EMA(L) counts for."""


class EvidenceTerm(Term):
    """KL(a_T ‖ a_S), a the share of the answer's attention that each sentence of its question gets (7); mean over segments of
    sources with `task: qa`."""

    kind: ClassVar[Kind] = "task"
    weight: WeightField = _constant(0.1)


class CoverageTerm(Term):
    """|c_T - c_S|, c the probability that the summary says a key word of its text (8); mean over key words of sources with
    `task: summary`."""

    kind: ClassVar[Kind] = "task"
    weight: WeightField = _constant(0.2)


class ParameterAnchorTerm(Section):
    """‖θ - θ₀‖² / ‖θ₀‖², θ₀ the weights that the run began with (L2-SP, 9)."""

    weight: WeightField = _constant(0.01)


class RouterBalanceTerm(Section):
    """experts · Σ_i f_i P_i, the load-balancing loss that the student's own family adds to cross-entropy: f_i the share of tokens
    sent to expert i, P_i the mean probability of its router; mean over the tokens of a forward pass."""

    weight: WeightField | None = None
    """None: the coefficient of the student's config."""


class ImportanceSection(Section):
    """Weights of the divergences' tokens, in [0.2, 3], by the roles of their words and the teacher's confidence (12-19)."""

    rules: LocalPath | None = None
    """YAML on top of the shipped rule base."""
    normalise: Literal["weights", "tokens"] = "weights"
    """What the weighted sum is divided by: the weights' sum, which keeps the meaning of a learning rate, or the number of
    tokens."""
    overhead_budget: float = Field(0.037, gt=0)
    """Share of a forward pass that a step may wait for its batch, before the run says so."""


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
    attention_direction: DirectionTerm | None = None
    normalised_direction: DirectionTerm | None = None
    activation_mmd: ActivationMmdTerm | None = None
    input_reconstruction: InputReconstructionTerm | None = None
    residual_cka: ResidualCkaTerm | None = None
    attention_statistics: AttentionStatisticsTerm | None = None
    smoothness: SmoothnessTerm | None = None
    attention_evolution: AttentionEvolutionTerm | None = None
    replay: ReplayTerm | None = None
    gate: GateTerm | None = None
    evidence: EvidenceTerm | None = None
    coverage: CoverageTerm | None = None
    parameter_anchor: ParameterAnchorTerm | None = None
    router_balance: RouterBalanceTerm | None = None
    """Left out: as the student's config says (`output_router_logits` and its coefficient); null: off."""
    importance: ImportanceSection | None = None

    def empty_kinds(self) -> tuple[Kind, ...]:
        """Kinds of knowledge that no term carries."""
        held = {term.kind for _, term in self if isinstance(term, Term) and not isinstance(term, GateTerm)}
        return tuple(kind for kind in KINDS if kind not in held)

    @property
    def divergences(self) -> dict[str, DivergenceTerm]:
        """Terms that compare with the cached distribution, by name."""
        found = {name: getattr(self, name) for name in DIVERGENCES}
        return {name: term for name, term in found.items() if term is not None}


def _kinds() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for name, field in Losses.model_fields.items():
        term = next((t for t in get_args(field.annotation) if isinstance(t, type) and issubclass(t, Term)), None)
        if term is not None:
            found[name] = term.kind
    return found


KIND_OF = _kinds()
"""By name of every term that there is, the kind of knowledge that it carries."""

PRESETS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"cross_entropy": {}},
    "demo_kl": {"tla": {"temperature": 1.0}},
    "flash_004": {
        "tla": {"temperature": 3.0, "weight": {"start": 1.0, "end": 0.3}},
        "lhsm": {"weight": 0.8},
        "apc": {"weight": {"start": 0.0, "end": 0.5, "begin": 0.2}},
        "asr": {"weight": 1e-3},
    },
    "full_000": {
        "tla": {"temperature": 1.0},
        "importance": {},
        "attention_direction": {},
        "normalised_direction": {},
        "activation_mmd": {},
        "input_reconstruction": {},
        "residual_cka": {},
        "attention_statistics": {},
        "smoothness": {},
        "attention_evolution": {},
        "replay": {},
        "gate": {},
        "evidence": {},
        "coverage": {},
    },
}
"""`flash_004` is the seed's objective and schedule (REQUIREMENTS 66-73), `full_000` the first seed's five kinds of knowledge
(3-36); `demo_kl` is forward KL at temperature 1 alone. A preset whose name begins with `full` must leave no kind empty."""
