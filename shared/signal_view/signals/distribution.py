"""The next-token distribution: the teacher's favourites as a frame, log-probabilities and scalars as arrays."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from signal_store.signals.distribution import SCALARS
from signal_view.extras import pandas, xarray
from signal_view.remembered import once_per_cache
from signal_view.segment_rows import labels_of, own_places, own_rows, row_coordinates
from signal_view.segment_text import SegmentText
from signal_view.signals.base import Lazy, SignalView
from signal_view.tokens import token_texts

if TYPE_CHECKING:
    from signal_store.codecs.distribution import DistributionCodec, DistributionCodes


class DistributionView(SignalView):
    """Scalars, and the head at T = 1; the dense distribution of a segment is `logprobs`."""

    def parts(self, segment: SegmentText) -> dict[str, Any]:
        """See the base."""
        return {"/distribution": scalars(segment)}

    def lazy(self, cache: Cache, path: str, shape: tuple[int, ...]) -> dict[str, Lazy]:
        """See the base."""
        float32 = np.dtype(np.float32)
        if path == "distribution/scalars":
            columns = scalar_columns(np.zeros((0, shape[1]), np.float16), _temperatures(cache))
            return {n: Lazy(("token",), shape[:1], float32, partial(_scalar, cache, n), about) for n, (_, about) in columns.items()}
        if path == "distribution/head_codes":
            about = {"units": "nat", "long_name": "log-probability of each id of the head, T = 1"}
            return {"head_logprob": Lazy(("token", "rank"), shape, float32, partial(_head, cache), about)}
        return {}


@once_per_cache
def codec_of(cache: Cache) -> "DistributionCodec":
    """The distribution's, on the CPU, read once."""
    from signal_store.codecs.cached import distribution_codec

    return distribution_codec(cache)


def _codes(cache: Cache, start: int, stop: int) -> "DistributionCodes":
    import torch

    from signal_store.codecs.distribution import DistributionCodes

    scalars = cache.read("distribution/scalars", start, stop)

    def part(name: str) -> Any:
        path = f"distribution/{name}"
        if path not in cache.capacity_rows:
            return torch.zeros(len(scalars), 0, dtype=torch.int32)
        array = cache.read(path, start, stop)
        return torch.from_numpy(array if array.dtype.kind != "u" or name == "tail_codes" else array.astype(np.int32))

    return DistributionCodes(part("head_ids"), part("head_codes"), part("tail_codes"), torch.from_numpy(scalars))


def logprobs(segment: SegmentText, temperature: float) -> Any:
    """DataArray [token, vocabulary] float32, log-probabilities in nats at a cached temperature."""
    codec = codec_of(segment.cache)
    if not codec.rank:
        raise MismatchError(
            "a cache without a tail knows single tokens only",
            expected="signals.distribution with rank above 0",
            found="rank 0",
            where=segment.cache.uri,
            remedy="segment.top(n) shows the head.",
        )
    codec.mass_column(temperature)
    own = own_places(segment)
    rows = own_rows(segment)
    codes = _codes(segment.cache, rows.start, rows.stop)
    places = np.arange(own.start, own.stop)
    return xarray().DataArray(
        codec.logprobs(codes, temperature).numpy(),
        dims=("token", "vocabulary"),
        coords={"token": places, **row_coordinates(segment, places)},
        name="log_probability",
        attrs={"units": "nat", "long_name": "teacher's log-probability of the next token", "temperature": temperature},
    )


def top(segment: SegmentText, n: int, temperature: float, tokens: slice) -> Any:
    """DataFrame of each row's n likeliest tokens, the likeliest first, indexed by (token, rank): `piece`, `id`, `probability`,
    `nats` (−log p), and `is_next`, whether it is the token that follows. Of a cache without a tail, at most its head's n.
    `tokens`: places of the segment; of these, those that are its own."""
    import torch

    codec = codec_of(segment.cache)
    if not 1 <= n <= (codec.vocab_size if codec.rank else codec.head):
        most = f"1 to {codec.vocab_size}" if codec.rank else f"1 to {codec.head}: there is no tail"
        raise MismatchError("so many tokens are not known", expected=most, found=n, where=segment.cache.uri)
    codec.mass_column(temperature)
    begin, end, step = tokens.indices(len(segment))
    if step != 1:
        raise InputError("rows follow each other", expected="a slice without a step", found=tokens, where="tokens")
    own = slice(max(begin, segment.context_only), end)
    codes = _codes(segment.cache, segment.token_start + own.start, segment.token_start + own.stop)
    if n <= codec.head:
        known = codec.known(codes, temperature)
        values, place = known.log_head.topk(n, 1)
        ids = known.ids.gather(1, place)
    else:
        values, ids = codec.logprobs(codes, temperature).topk(n, 1)
    nats, numbers = -values.numpy().astype(np.float64).ravel(), ids.numpy().ravel()
    labels = np.repeat(labels_of(segment)[own], n)
    texts = token_texts(segment.cache)
    rows = np.repeat(np.arange(own.start, own.stop), n)
    index = pandas().MultiIndex.from_arrays([rows, np.tile(np.arange(1, n + 1), len(codes))], names=["token", "rank"])
    return pandas().DataFrame(
        {
            "piece": [texts.piece(int(i)) for i in numbers],
            "id": numbers,
            "probability": torch.from_numpy(-nats).exp().numpy(),
            "nats": nats,
            "is_next": numbers == labels,
        },
        index=index,
    )


def scalars(segment: SegmentText) -> Any:
    """Dataset over `token`: max_logprob, label_logprob, entropy, and the head's mass at each cached temperature."""
    temperatures = _temperatures(segment.cache)
    own, rows = own_places(segment), own_rows(segment)
    places = np.arange(own.start, own.stop)
    columns = scalar_columns(segment.cache.read("distribution/scalars", rows.start, rows.stop), temperatures)
    variables = {name: ("token", values, attributes) for name, (values, attributes) in columns.items()}
    return xarray().Dataset(variables, coords={"token": places, **row_coordinates(segment, places)})


def _temperatures(cache: Cache) -> tuple[float, ...]:
    signal = cache.manifest.signals.distribution
    if signal is None:
        raise MismatchError("the cache holds no distribution", expected="signals.distribution", where=cache.uri)
    return signal.temperatures


def scalar_columns(rows: NDArray[Any], temperatures: tuple[float, ...]) -> dict[str, tuple[NDArray[np.float32], dict[str, str]]]:
    """By name, values [n] and attributes of the columns of `distribution/scalars`."""
    says = ("largest log-probability", "log-probability of the token that follows", "entropy")
    found = {}
    for column, (name, what) in enumerate(zip(SCALARS, says, strict=True)):
        found[name] = rows[:, column].astype(np.float32), {"units": "nat", "long_name": f"teacher's {what}, T = 1"}
    for column, temperature in enumerate(temperatures, start=len(SCALARS)):
        with np.errstate(over="ignore"):
            mass = 1 / (1 + np.exp(-rows[:, column].astype(np.float32)))
        name = f"head_mass@{temperature:g}"
        found[name] = mass.astype(np.float32), {"units": "probability", "long_name": f"mass of the head, T = {temperature:g}"}
    return found


def _scalar(cache: Cache, name: str, start: int, stop: int) -> NDArray[Any]:
    return scalar_columns(cache.read("distribution/scalars", start, stop), _temperatures(cache))[name][0]


def _head(cache: Cache, start: int, stop: int) -> NDArray[Any]:
    import torch

    from signal_store.codecs.distribution import DistributionCodes

    ids, codes, scalars = (cache.read(f"distribution/{name}", start, stop) for name in ("head_ids", "head_codes", "scalars"))
    nothing = torch.zeros(len(ids), 0, dtype=torch.int8)
    found = DistributionCodes(
        torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(codes.astype(np.int32)), nothing, torch.from_numpy(scalars)
    )
    values: NDArray[Any] = codec_of(cache).known(found, 1.0).log_head.numpy()
    return np.where(np.isnan(scalars[:, :1].astype(np.float32)), np.nan, values)
