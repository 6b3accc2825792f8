"""A segment with the cache that it is of: what its tokens spell, and where its rows of each signal are."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.segment import Segment
from signal_view.tokens import token_texts


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class SegmentText(Segment):
    """A segment whose text can be read."""

    cache: Cache

    @property
    def text(self) -> str:
        """Its text, special tokens too."""
        return "".join(self.tokens)

    @property
    def tokens(self) -> list[str]:
        """The text of each token; of tokens that are parts of one character the last has it, the others are empty."""
        return token_texts(self.cache).pieces(self.input_ids.tolist())

    @property
    def next_piece(self) -> str | None:
        """The text of the token that the last row predicts, or None where it is not stored."""
        return None if self.next_token is None else token_texts(self.cache).piece(self.next_token)

    def row_of(self, path: str) -> NDArray[Any]:
        """Its row of an array with one row a segment, such as `stats/ffn/values`."""
        return self.cache.row_of_segment(path, self.index)

    def columns(self, group: str, *names: str) -> dict[str, int]:
        """Its row of columns of `segments/`, or of a signal's own `<signal>/segments/`."""
        return {name: int(self.row_of(f"{group}/{name}")) for name in names}
