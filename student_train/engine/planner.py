"""Which objective suits this cache, this student, these texts, this machine and what the last student kept.

Pure: five records of facts in, one choice for each question out, each with its reason. Nothing is decided in silence, and nothing
is applied: `student-train plan` shows the choices and writes the recipe that they make. What a cache or a student cannot serve is
said in the words of the error that a run would stop with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHARP_SHARE, SMALL_SHARE = 0.5, 0.25
OVERCONFIDENT_NATS, MISCALIBRATED = -0.3, 0.1
LEARNED_SHARE = 0.05
ACTIVATION_BYTES = 34
"""Of a token, channel and block, in half precision with a fused attention (Korthikanti et al. 2022, eq. 2)."""
STATE_BYTES = 16
"""Of a parameter: weight, gradient and two moments in float32."""
FROZEN_BYTES = 4
ROOM = 0.8
"""Share of the memory that is given away."""
FEATURES = ("attention_direction", "normalised_direction", "activation_mmd", "input_reconstruction", "residual_cka")
DIVERGENCES = ("forward_kl", "jsd")
LEVELS = ("smoothness", "attention_evolution", "replay")


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """`temperatures` with the head's mean mass at each; `tail_rank`; `entropy` of the teacher, in nats, mean over a sample;
    `log_vocab`; `has_tags`."""

    temperatures: Mapping[float, float]
    tail_rank: int
    entropy: float
    log_vocab: float
    has_tags: bool


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """`size`: width² · layers over the teacher's; `width`, `layers`, `parameters`, of which `frozen` do not learn; `refused`: by
    term, why it cannot be had."""

    size: float
    width: int
    layers: int
    parameters: int
    frozen: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """`tasks` of the train sources by name, and all `sources`."""

    tasks: frozenset[str]
    sources: int


@dataclass(frozen=True, slots=True)
class HardwareFacts:
    """`device` cpu or cuda, its `memory_bytes`, and whether it computes in `bfloat16`."""

    device: str
    memory_bytes: int
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class EvaluationFacts:
    """What `student-train fidelity` says of the last student, in nats: `kl`, `teacher_entropy`, `entropy_gap` (student's less
    teacher's), and `calibration_error`."""

    kl: float
    teacher_entropy: float
    entropy_gap: float
    calibration_error: float


@dataclass(frozen=True, slots=True)
class Facts:
    """A proposal's ground; `sequence_length`, `global_batch_rows` of the recipe. `evaluation`: None before the first student."""

    cache: CacheFacts
    student: StudentFacts
    data: DataFacts
    hardware: HardwareFacts
    evaluation: EvaluationFacts | None
    sequence_length: int
    global_batch_rows: int
    without: frozenset[str] = frozenset()
    """Terms whose kinds the recipe leaves out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`place` in a run recipe, the `value` it gets (None: off), and `why`."""

    place: str
    value: Any
    why: str


def propose(facts: Facts) -> list[Choice]:
    """One choice for each question, in the order of a recipe."""
    choices = [*_explicit(facts), *_features(facts), *_attention(facts), *_temporal(), *_tasks(facts), *_machine(facts)]
    refused = {**facts.student.refused, **dict.fromkeys(facts.without, "the recipe is without its kind")}
    found = []
    for choice in choices:
        reason = refused.get(choice.place.removeprefix("losses."))
        found.append(Choice(choice.place, None, reason) if reason is not None and choice.value is not None else choice)
    if not any(c.value is not None and c.place.removeprefix("losses.") in DIVERGENCES for c in found):
        why = "there is no divergence whose tokens it could weigh"
        found = [Choice(c.place, None, why) if c.place == "losses.importance" else c for c in found]
    levels = [c for c in found if c.place.removeprefix("losses.") in LEVELS and c.value is not None]
    why = f"{len(levels)} temporal terms are on" + (
        ", the gate weighs them token by token" if len(levels) > 1 else ": nothing to weigh"
    )
    return [*found, Choice("losses.gate", {} if len(levels) > 1 else None, why)]


def _explicit(facts: Facts) -> list[Choice]:
    cache, evaluation = facts.cache, facts.evaluation
    temperature, why = 1.0, "the teacher's own distribution"
    if evaluation is not None and evaluation.entropy_gap < OVERCONFIDENT_NATS:
        temperature, why = 2.0, f"the last student was surer than its teacher by {-evaluation.entropy_gap:.2f} nats: softer targets"
    mass = cache.temperatures.get(temperature)
    if mass is None or (cache.tail_rank == 0 and mass < 0.9):
        held = "is not cached" if mass is None else f"has only {mass:.0%} of its mass in the head, and there is no tail"
        temperature, why = 1.0, f"temperature {temperature:g} {held}; 1 is"
    kind, reason = (
        "forward_kl",
        f"the student has {facts.student.size:.2f} of its teacher's size: forward KL, all of the distribution",
    )
    if facts.student.size < SMALL_SHARE:
        kind = "jsd"
        reason = (
            f"the student has {facts.student.size:.2f} of its teacher's size: it cannot cover every mode, and JSD forgives that"
        )
    choices = [Choice(f"losses.{kind}", {"temperature": temperature}, f"{reason}; temperature {temperature:g}: {why}")]
    unsure = cache.entropy / cache.log_vocab
    if unsure > SHARP_SHARE:
        weight, why = 0.5, f"the teacher's entropy is {unsure:.0%} of the greatest: the text's own labels say more than it does"
    elif evaluation is not None and evaluation.calibration_error > MISCALIBRATED:
        weight, why = 0.2, f"the last student's confidence was off by {evaluation.calibration_error:.2f}: labels pull it back"
    else:
        weight, why = 0.0, f"the teacher's entropy is {unsure:.0%} of the greatest: its distribution says more than the labels"
    choices.append(Choice("losses.cross_entropy", {"weight": weight} if weight else None, why))
    tags = "roles of words are cached: what carries meaning counts up to 3, what does not down to 0.2"
    return [
        *choices,
        Choice("losses.importance", {} if cache.has_tags else None, tags if cache.has_tags else "no source has a tagger"),
    ]


def _features(facts: Facts) -> list[Choice]:
    evaluation = facts.evaluation
    if evaluation is not None and evaluation.kl < LEARNED_SHARE * evaluation.teacher_entropy:
        why = f"the last KL, {evaluation.kl:.3f}, is under {LEARNED_SHARE:.0%} of the teacher's entropy: nothing left to guide"
        return [Choice(f"losses.{name}", None, why) for name in FEATURES]
    why = "the states are cached, at the same depths; small weights, for gains from hidden states are not sure"
    return [Choice(f"losses.{name}", {}, why) for name in FEATURES]


def _attention(facts: Facts) -> list[Choice]:
    apc = Choice("losses.apc", None, "attention_evolution reads the same rows, and the three before them")
    if "attention_evolution" in facts.student.refused:
        weight = {"start": 0.0, "end": 0.5, "begin": 0.2}
        apc = Choice("losses.apc", {"weight": weight}, "keyword rows are cached, without those before them")
    return [Choice("losses.attention_statistics", {}, "compares models of any number of heads"), apc]


def _temporal() -> list[Choice]:
    held = ("the teacher's path is", "keyword rows and the three before them are", "paths of finished texts are")
    reasons = [f"{what} cached; in the demo's ablation the temporal terms did not help" for what in held]
    return [Choice(f"losses.{name}", {}, why) for name, why in zip(LEVELS, reasons, strict=True)]


def _tasks(facts: Facts) -> list[Choice]:
    found = []
    for term, task, why in (("evidence", "qa", "questions"), ("coverage", "summary", "texts to sum up")):
        on = task in facts.data.tasks
        said = f"a source has task: {task}, {why}" if on else f"none of {facts.data.sources} sources has task: {task}"
        found.append(Choice(f"losses.{term}", {} if on else None, said))
    return found


def _machine(facts: Facts) -> list[Choice]:
    hardware, student = facts.hardware, facts.student
    size = 2 if hardware.bfloat16 else 4
    half = "bfloat16" if hardware.bfloat16 else "float32"
    choices = [
        Choice("precision", half, f"the {hardware.device} {'computes' if hardware.bfloat16 else 'does not compute'} in bfloat16")
    ]
    state = STATE_BYTES * (student.parameters - student.frozen) + FROZEN_BYTES * student.frozen
    room = ROOM * hardware.memory_bytes - state
    row = facts.sequence_length * student.width * student.layers * ACTIVATION_BYTES * size // 2
    gigabytes = f"{hardware.memory_bytes / 2**30:.1f} GiB, of which {state / 2**30:.1f} are weights and moments"
    if room < row / student.layers:
        why = f"{gigabytes}: too few for one row; several processes with sharding: {{mode: sharded}} hold a part each"
        return [*choices, Choice("stream.micro_batch_rows", 1, why), Choice("activation_checkpointing", True, why)]
    whole = min(facts.global_batch_rows, int(room // row))
    checkpointing = whole == 0
    fits = whole or min(facts.global_batch_rows, int(room // (row / student.layers)))
    fits = max(n for n in range(1, fits + 1) if facts.global_batch_rows % n == 0)
    why = f"{gigabytes}; a row of {facts.sequence_length} tokens takes about {row / 2**20:,.0f} MiB of activations"
    return [
        *choices,
        Choice(
            "stream.micro_batch_rows",
            None if fits == facts.global_batch_rows else fits,
            why + (": all at once" if fits == facts.global_batch_rows else ""),
        ),
        Choice("activation_checkpointing", checkpointing, why + ("" if checkpointing else ": there is room")),
    ]
