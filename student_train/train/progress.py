"""How far a run has come, and when it is over."""

from dataclasses import dataclass, replace

from student_train.data.stream import Cursor
from student_train.evaluate.sections import ValidationSection
from student_train.losses.attention_rows import HeadPairs


@dataclass(frozen=True, slots=True)
class Progress:
    """Everything of a run that is not a tensor. `step` optimizer steps are done; `cursor` is where the stream goes on."""

    cache_id: str
    recipe_digest: str
    step: int
    cursor: Cursor
    best_loss: float | None
    best_step: int | None
    validations_without_gain: int
    head_pairs: HeadPairs
    tokens: int
    train_seconds: float
    stream_start: int = 0
    """The step at which the stream of this cache began: 0, unless a run went on with another cache."""

    @classmethod
    def begin(cls, cache_id: str, recipe_digest: str) -> "Progress":
        """Of a run that has not begun."""
        return cls(cache_id, recipe_digest, 0, {}, None, None, 0, {}, 0, 0.0)

    def stepped(self, cursors: list[Cursor], tokens: int, seconds: float) -> "Progress":
        """After one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            cursor=later(self.cursor, *cursors),
            tokens=self.tokens + tokens,
            train_seconds=self.train_seconds + seconds,
        )

    def validated(self, loss: float, min_gain: float) -> "Progress":
        """After a validation; `best_step` is this step where it was the best so far."""
        if self.best_loss is None or loss < self.best_loss - min_gain:
            return replace(self, best_loss=loss, best_step=self.step, validations_without_gain=0)
        return replace(self, validations_without_gain=self.validations_without_gain + 1)

    def is_over(self, steps: int, validation: ValidationSection | None) -> bool:
        """Whether all steps are done, or validations have not gained for too long."""
        patience = None if validation is None else validation.patience
        return self.step >= steps or (patience is not None and self.validations_without_gain >= patience)


def later(*cursors: Cursor) -> Cursor:
    """By lane, the place that is farthest on."""
    found: Cursor = {}
    for cursor in cursors:
        for lane, at in cursor.items():
            if lane not in found or at.rows > found[lane].rows:
                found[lane] = at
    return dict(sorted(found.items()))
