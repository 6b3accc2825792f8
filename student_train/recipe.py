"""The recipe of a run: which cache, which student, which objective, how trained. A section lies beside the code that reads it."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from run_kit.recipe_file import LocalPath
from signal_store.format.section import Section, Seed
from student_train.align.sections import AlignSection
from student_train.data.sections import StreamSection
from student_train.evaluate.sections import ValidationSection
from student_train.losses.aliases import by_own_names
from student_train.losses.kinds import Kind
from student_train.losses.presets import find_preset
from student_train.model.sections import ParallelSection
from student_train.student.sections import StudentSection
from student_train.train.sections import CheckpointSection, OptimizerSection
from student_train.train.settings import TrainSettings

if TYPE_CHECKING:
    from student_train.losses.section import Losses


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

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({"sharing": "parallel"})

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
    parallel: ParallelSection = ParallelSection.model_validate({})
    tensorboard: bool = False
    gradient_shares_every: int | None = Field(None, ge=1)
    """Measure each term's share of the gradient every so many steps, at the cost of a step for each term."""
    optimizer: OptimizerSection = OptimizerSection()
    stream: StreamSection = StreamSection()
    align: AlignSection | None = None
    """For a student with another tokenizer."""
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

    @property
    def training(self) -> TrainSettings:
        """What the training loop is told."""
        return TrainSettings(
            out=self.out,
            student=self.student,
            optimizer=self.optimizer,
            stream=self.stream,
            validation=self.validation,
            checkpoint=self.checkpoint,
            parallel=self.parallel,
            steps=self.steps,
            seed=self.seed,
            tail_rank=self.tail_rank,
            activation_checkpointing=self.activation_checkpointing,
            gradient_shares_every=self.gradient_shares_every,
            tensorboard=self.tensorboard,
            keeps_best=self.export == "best",
        )
