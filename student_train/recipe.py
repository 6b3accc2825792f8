"""The recipe of a run: which cache, which student, which objective, how trained. One frozen model a section."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from run_kit.recipe_file import LocalPath, ModelName
from signal_store.format.section import Section, Seed
from student_train.data.sections import StreamSection as StreamSection
from student_train.losses.aliases import by_own_names
from student_train.losses.kinds import Kind
from student_train.losses.presets import find_preset

if TYPE_CHECKING:
    from student_train.losses.section import Losses


class LoraSection(Section):
    """Train low-rank adapters only (peft, extra `lora`); the result is the adapter's folder."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class StudentSection(Section):
    """A checkpoint to start from, or a config (a mapping with `model_type`, or a folder) whose weights are drawn from `seed`."""

    checkpoint: ModelName | None = None
    config: dict[str, Any] | ModelName | None = None
    seed: Seed = 0
    """Of drawn weights; the run's own `seed` where it is left out."""
    tokenizer: ModelName | None = None
    """Checked against the cache's; None takes the checkpoint's own, or the cache's for a config."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give exactly one of checkpoint and config")
        if self.lora is not None and self.checkpoint is None:
            raise ValueError("lora needs a checkpoint: the adapters' folder would not hold the drawn weights they belong to")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay, counted in optimizer steps (REQUIREMENTS 97)."""

    learning_rate: float = Field(2e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """More than the run has are taken, and said: a trial of a few steps warms up as the run that it tries."""
    min_factor: float = Field(0.0, ge=0, le=1)
    """Of the learning rate, at the end of the cosine."""
    clip_norm: float | None = Field(1.0, gt=0)


class ValidationSection(Section):
    """Loss on the cache's validation split, every n steps and at the end."""

    every: int = Field(500, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    fidelity: bool = True
    """Also compare with the cached teacher, where the cache holds the distribution."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations in a row without a better one."""
    min_gain: float = Field(0.0, ge=0)


class CheckpointSection(Section):
    """State to resume from, every n steps; the last `keep` stay."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    accept_other_cache: bool = False
    """Go on from a checkpoint of another cache or recipe, at the beginning of this one's stream."""


class SharingSection(Section):
    """How several processes (started by torchrun or accelerate launch) share the student: each holds all of it, or a shard
    (FSDP2)."""

    mode: Literal["replicated", "sharded"] = "replicated"
    """`sharded` is for two processes or more: one alone is refused."""
    cpu_offload: bool = False
    """Keep the shards in host memory between uses (sharded only)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cpu_offload and self.mode != "sharded":
            raise ValueError("cpu_offload needs mode: sharded")
        return self


def flat(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of nested mappings; an empty one is a value."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from flat(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, content


def _inside(error: ValidationError, place: str) -> ValidationError:
    """The same mistakes, as those of a part of a recipe."""
    details = [
        InitErrorDetails(type=e["type"], loc=(place, *e["loc"]), input=e["input"], ctx=e.get("ctx", {})) for e in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, details)


class RunRecipe(Section):
    """Everything `student-train run` needs."""

    cache: str | tuple[str, ...]
    """Where the cache is; a list opens a cache with its overlays."""
    out: LocalPath
    student: StudentSection
    preset: str | None = None
    losses: dict[str, Any] = Field(default_factory=dict)
    """Terms on top of the preset's; `name: null` switches one off."""
    without: tuple[Kind, ...] = ()
    """Kinds of knowledge whose terms are switched off, whatever preset and losses say."""
    tail_rank: int | None = Field(None, ge=0)
    """Use only so many of the cached tail's directions, the heaviest; 0 makes the tail one bucket. None: all."""
    steps: int = Field(ge=1)
    seed: Seed = 0
    """Of everything that is drawn: of `student` and `stream` too, where they give none of their own."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: autocast over float32 weights; auto: that where the device computes in bfloat16 natively, else float32."""
    activation_checkpointing: bool = False
    compile: bool = False
    """Run the losses of the output head through torch.compile (needs a C++ compiler on a CPU)."""
    sharing: SharingSection = SharingSection.model_validate({})
    tensorboard: bool = False
    gradient_shares_every: int | None = Field(None, ge=1)
    """Measure each term's share of the gradient every so many steps, at the cost of a step for each term (76)."""
    optimizer: OptimizerSection = OptimizerSection()
    stream: StreamSection = StreamSection()
    validation: ValidationSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    export: Literal["best", "last"] = "last"
    """Which weights become the result; `best` needs validation."""

    @model_validator(mode="before")
    @classmethod
    def _seeded(cls, content: Any) -> Any:
        """One seed for all, where sections do not give their own."""
        if not isinstance(content, dict) or "seed" not in content:
            return content
        sections = {name: content.get(name, {}) for name in ("student", "stream")}
        seeded = {name: {"seed": content["seed"], **part} for name, part in sections.items() if isinstance(part, dict)}
        return {**content, **seeded}

    @field_validator("losses", mode="before")
    @classmethod
    def _by_own_names(cls, losses: Any) -> Any:
        return by_own_names(losses) if isinstance(losses, dict) else losses

    @model_validator(mode="after")
    def _check(self) -> Self:
        find_preset(self.preset)
        self._check_objective()
        if self.export == "best" and self.validation is None:
            raise ValueError("export: best needs validation")
        return self

    def _check_objective(self) -> None:
        try:
            objective = self.objective
        except ValidationError as error:
            raise _inside(error, "losses") from error
        terms, preset = objective.knowledge.values(), find_preset(self.preset)
        if not terms:
            raise ValueError("no loss: give a preset or losses")
        if all(term.weight.start == term.weight.end == 0 for term in terms):
            raise ValueError("no loss: every term's weight is 0")
        if preset is not None and preset.every_kind:
            for kind in set(objective.empty_kinds()) - set(self.without):
                raise ValueError(
                    f"preset {self.preset}: nothing carries {kind} knowledge ({kind.about}); say so with without: [{kind}]"
                )

    @property
    def objective(self) -> "Losses":
        """The preset with the recipe's own terms on top. The registry of terms, and torch with it, is imported here and not before:
        `--help` needs neither."""
        from student_train.losses.section import Losses

        preset = find_preset(self.preset)
        merged: dict[str, Any] = {} if preset is None else {name: dict(options) for name, options in preset.losses.items()}
        for name, options in self.losses.items():
            if isinstance(options, dict):
                merged[name] = {**(merged.get(name) or {}), **options}
            else:
                merged[name] = options
        return Losses.of(merged).without(self.without)

    @classmethod
    def more_keys(cls) -> dict[str, type[Section]]:
        """For hints: `losses` is merged with a preset before it is checked."""
        from student_train.losses.section import Losses

        return {"losses": Losses.with_every_term()}
