"""How the rows of a student with another tokenizer stand to its teacher's, row by row of a batch."""

from dataclasses import dataclass, fields
from typing import Self

from torch import Tensor

from student_train.data.part import Part


@dataclass(frozen=True, slots=True)
class AlignedRows(Part):
    """Of N rows, each beside the teacher's last row that knows no more text.

    `same_text` bool [N]: both know the same; `one_to_one` bool [N]: and their next tokens spell the same; `within` bool [N]: the
    student's next token ends no later than the teacher's. `spoken` int64 [N]: symbols of the teacher's next token that the
    student's row knows already; `first`, `last` int64 [N]: where the teacher's tokens that begin with these lie among all, sorted
    by what they spell. `text_bytes` int64 [N]: of the text, that the row predicts; none of a special token.
    """

    same_text: Tensor
    one_to_one: Tensor
    within: Tensor
    spoken: Tensor
    first: Tensor
    last: Tensor
    text_bytes: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))
