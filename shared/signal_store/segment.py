"""One segment of a cache: its tokens, and where its rows are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signal_store.manifest import Split


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Segment:
    """One segment: the tokens the teacher saw as one context, and where its rows are.

    `input_ids` uint32 [n], `loss_mask` uint8 [n] (see `format.text.token_arrays`), `next_token` the label of the last row or None;
    `token_start` the global index of its first token; `source` its source's name, `document` its number there. The first
    `context_only` tokens are another segment's, and only seen by this one's. Row t predicts token t + 1.
    """

    index: int
    source: str
    split: Split
    document: int
    token_start: int
    context_only: int
    finished: bool
    input_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    next_token: int | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"<Segment {self.index} of {self.source!r} ({self.split}), document {self.document}, {len(self):,} tokens>"
