"""One segment of a cache: its tokens, and what the teacher thought of them, decoded when it is asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.errors import MismatchError
from signal_store.manifest import Split

if TYPE_CHECKING:
    from signal_store.cache import Cache


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Segment:
    """One segment: the tokens the teacher saw as one context, and where its rows are.

    `input_ids` uint32 [n], `loss_mask` uint8 [n] (see `layout.token_arrays`), `next_token` the label of the last row or None;
    `token_start` the global index of its first token; `source` its source's name, `document` its number there. The first
    `context_only` tokens are another segment's, and only seen by this one's. Methods that decode need the extra `inspect`; each
    raises MismatchError where the cache does not hold what it is asked for. Row t predicts token t + 1.
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
    cache: "Cache"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def text(self) -> str:
        """Its text, special tokens too."""
        return "".join(self.tokens)

    @property
    def tokens(self) -> list[str]:
        """The text of each token; of tokens that are parts of one character the last has it, the others are empty."""
        from signal_store.look.tokens import token_texts

        return token_texts(self.cache).pieces(self.input_ids.tolist())

    @property
    def next_piece(self) -> str | None:
        """The text of the token that the last row predicts, or None where it is not stored."""
        from signal_store.look.decoded import next_piece

        return next_piece(self)

    def columns(self, group: str, *names: str) -> dict[str, int]:
        """Its row of columns of `segments/`, or of a signal's own `<signal>/segments/`."""
        unit, place = self.cache.place_of(self.index)
        return {name: int(column[place]) for name, column in self.cache.segment_columns(unit, *names, group=group).items()}

    def row_of(self, path: str) -> NDArray[Any]:
        """Its row of an array with one row a segment, such as `stats/ffn/values`."""
        unit, place = self.cache.place_of(self.index)
        axis = (self.cache.array(path).metadata.dimension_names or ("",))[0]  # type: ignore[union-attr]
        if axis != "segment":
            raise MismatchError("an array that has not one row a segment", expected="segment first", found=axis, where=path)
        row = unit * self.cache.capacity_rows[path] + place
        found: NDArray[Any] = self.cache.read(path, row, row + 1)[0]
        return found

    def top(self, n: int = 10, temperature: float = 1.0, tokens: slice = slice(None)) -> Any:
        """pandas DataFrame of each row's n likeliest tokens, indexed by (token, rank): piece, id, probability, nats, is_next;
        `tokens`: of these places only."""
        from signal_store.look.decoded import top

        return top(self, n, temperature, tokens)

    def logprobs(self, temperature: float = 1.0) -> Any:
        """xarray DataArray [token, vocabulary] float32: the teacher's log-probabilities in nats, at a cached temperature."""
        from signal_store.look.decoded import logprobs

        return logprobs(self, temperature)

    def scalars(self) -> Any:
        """xarray Dataset over `token`: entropy, log-probability of the favourite and of the next token (nats, T = 1), head
        masses."""
        from signal_store.look.decoded import scalars

        return scalars(self)

    def hidden(self, tap: str, layer: int) -> Any:
        """xarray DataArray [token, channel] float32 of a cached tap of a layer (1 is the first block), at the sampled places."""
        from signal_store.look.decoded import hidden

        return hidden(self, tap, layer)

    def attention(self, layer: int) -> Any:
        """xarray DataArray [token, head, key] float32: probabilities of keyword rows; NaN where nothing is stored."""
        from signal_store.look.decoded import attention

        return attention(self, layer)

    def evidence(self) -> Any:
        """pandas DataFrame: a question's sentences, and their shares of the answer's attention by layer."""
        from signal_store.look.decoded import evidence

        return evidence(self)

    def coverage(self) -> Any:
        """pandas DataFrame: a text's key words, and the probability that its summary says each."""
        from signal_store.look.decoded import coverage

        return coverage(self)

    def roles(self) -> Any:
        """pandas DataFrame: what part each token's word plays."""
        from signal_store.look.decoded import roles

        return roles(self)

    def to_xarray(self) -> Any:
        """xarray DataTree of what the cache holds of it, decoded; not the dense distribution (`logprobs`), drawn ids, gradients."""
        from signal_store.look.decoded import to_xarray

        return to_xarray(self)

    def __repr__(self) -> str:
        return f"<Segment {self.index} of {self.source!r} ({self.split}), document {self.document}, {len(self):,} tokens>"

    def _repr_html_(self) -> str:
        from signal_store.look.coloured import segment_html

        return segment_html(self)
