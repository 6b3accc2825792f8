"""The shape of a transform: a function of a built student, called once, which gives the student that is trained."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from model_taps.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a student's weights are from: its `checkpoint`, None where they were drawn; the `adapter` that the checkpoint is, if it
    is one; and the `seed` of what is drawn."""

    checkpoint: str | None
    adapter: Adapter | None
    seed: int


Transform = Callable[[PreTrainedModel, Origin], PreTrainedModel]
"""May change the student in place; parameters that shall not learn come back frozen."""
