"""What a recipe tells the training loop, section by section."""

from dataclasses import dataclass
from pathlib import Path

from student_train.data.sections import StreamSection
from student_train.evaluate.sections import ValidationSection
from student_train.model.sections import ParallelSection
from student_train.student.sections import StudentSection
from student_train.train.sections import CheckpointSection, OptimizerSection


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """`out`: the run's folder. `student`: what the run began with, which a parameter anchor holds on to. `tail_rank`: of the cached
    tail, the directions that are used, None for all. `gradient_shares_every`: steps, None for never. `keeps_best`: keep the weights
    of the best validation too."""

    out: Path
    student: StudentSection
    optimizer: OptimizerSection
    stream: StreamSection
    validation: ValidationSection | None
    checkpoint: CheckpointSection
    parallel: ParallelSection
    steps: int
    seed: int
    tail_rank: int | None
    activation_checkpointing: bool
    gradient_shares_every: int | None
    tensorboard: bool
    keeps_best: bool
