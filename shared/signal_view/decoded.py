"""A segment's signals, decoded: xarray arrays with names and units, and the teacher's favourites as a pandas frame.

Row t predicts token t + 1, here too: `next_piece` at t is the text of token t + 1.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError
from signal_store.format.roles import LEVELS
from signal_store.signals.distribution import SCALARS
from signal_store.signals.stats import ATTENTION_STATISTICS, FFN_STATISTICS
from signal_view.extras import pandas, xarray
from signal_view.meaning import meaning
from signal_view.remembered import once_per_cache
from signal_view.segment_text import SegmentText
from signal_view.tokens import token_texts

if TYPE_CHECKING:
    from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
    from signal_store.codecs.hidden import HiddenCodec


@once_per_cache
def codec_of(cache: Cache) -> "DistributionCodec":
    """The distribution's, on the CPU, read once."""
    from signal_store.codecs.cached import distribution_codec

    return distribution_codec(cache)


@once_per_cache
def hidden_codecs(cache: Cache) -> "dict[str, HiddenCodec]":
    """By group, those of the hidden states, on the CPU, read once."""
    from signal_store.codecs.cached import hidden_codec

    return {layout.group: hidden_codec(cache, layout) for layout in cache.manifest.calibration.hidden}


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


def labels_of(segment: SegmentText) -> NDArray[np.int64]:
    """int64 [n]: the token that each row predicts, -1 for the last one where none is stored."""
    after = -1 if segment.next_token is None else segment.next_token
    return np.append(segment.input_ids[1:].astype(np.int64), after)


def own_places(segment: SegmentText) -> slice:
    """Places of the segment whose rows are its own; those before are context, and stored elsewhere."""
    return slice(segment.context_only, len(segment))


def row_coordinates(segment: SegmentText, places: NDArray[np.int64]) -> dict[str, Any]:
    """Coordinates of rows: place in the segment, piece of the token, piece that follows."""
    pieces = np.asarray([*segment.tokens, segment.next_piece or ""], dtype=object)
    return {"piece": ("token", pieces[places]), "next_piece": ("token", pieces[places + 1])}


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
    codes = _codes(segment.cache, segment.token_start + own.start, segment.token_start + own.stop)
    places = np.arange(own.start, own.stop)
    return xarray().DataArray(
        codec.logprobs(codes, temperature).numpy(),
        dims=("token", "vocabulary"),
        coords={"token": places, **row_coordinates(segment, places)},
        name="log_probability",
        attrs={"units": "nat", "long_name": "teacher's log-probability of the next token", "temperature": temperature},
    )


def place_among(segment: SegmentText, place: int) -> int:
    """The place, if the segment has a row of its own there; InputError if not."""
    if not segment.context_only <= place < len(segment):
        expected, where = f"{segment.context_only} to {len(segment) - 1}", f"segment {segment.index}"
        raise InputError("no such token", expected=expected, found=place, where=where)
    return place


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
    signal = segment.cache.manifest.signals.distribution
    if signal is None:
        raise MismatchError("the cache holds no distribution", expected="signals.distribution", where=segment.cache.uri)
    own = own_places(segment)
    found = segment.cache.read("distribution/scalars", segment.token_start + own.start, segment.token_start + own.stop)
    places = np.arange(own.start, own.stop)
    columns = scalar_columns(found, signal.temperatures)
    variables = {name: ("token", values, attributes) for name, (values, attributes) in columns.items()}
    return xarray().Dataset(variables, coords={"token": places, **row_coordinates(segment, places)})


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


def _sampled_rows(segment: SegmentText, signal: str) -> slice:
    columns = segment.columns(f"{signal}/segments", "row_start", "rows")
    return slice(columns["row_start"], columns["row_start"] + columns["rows"])


def _places(segment: SegmentText, signal: str, rows: slice) -> NDArray[np.int64]:
    found: NDArray[np.int64] = segment.cache.read(f"{signal}/rows/position", rows.start, rows.stop) - segment.token_start
    return found


def hidden(segment: SegmentText, tap: str, layer: int) -> Any:
    """DataArray [token, channel] float32 of a tap of a layer, at the places that were sampled."""
    import torch

    cache = segment.cache
    layouts = {(h.tap, h.layer): h for h in cache.manifest.calibration.hidden}
    if (tap, layer) not in layouts:
        held = ", ".join(f"{t} of {n}" for t, n in layouts) or "no hidden states"
        raise MismatchError("the cache does not hold this state", expected=held, found=f"{tap} of {layer}", where=cache.uri)
    layout = layouts[tap, layer]  # type: ignore[index]
    if "hidden/rows/position" in cache.capacity_rows:
        rows = _sampled_rows(segment, "hidden")
        places = _places(segment, "hidden", rows)
    else:
        places = np.arange(own_places(segment).start, len(segment))
        rows = slice(segment.token_start + own_places(segment).start, segment.token_start + len(segment))
    values, scale = (torch.from_numpy(cache.read(f"{layout.group}/{name}", rows.start, rows.stop)) for name in ("values", "scale"))
    attributes = {
        "units": "activation",
        "long_name": f"{tap} of block {layer}",
        "explained_variance": layout.explained_variance,
        "rank": layout.rank or layout.width,
    }
    return xarray().DataArray(
        hidden_codecs(cache)[layout.group].decode(values, scale).numpy(),
        dims=("token", "channel"),
        coords={"token": places, **row_coordinates(segment, places)},
        name=f"{tap}_{layer}",
        attrs=attributes,
    )


def attention(segment: SegmentText, layer: int) -> Any:
    """DataArray [token, head, key] float32: probabilities of the stored rows over the segment's keys, NaN where nothing is stored
    (keys after the row's own token, and those left out of a row that keeps its heaviest only, whose sum is in `residual`)."""
    import torch

    from signal_store.codecs.attention import decode_attention

    cache = segment.cache
    layouts = {a.layer: a for a in cache.manifest.calibration.attention}
    if layer not in layouts:
        held = ", ".join(map(str, layouts)) or "no attention"
        raise MismatchError("the cache does not hold this layer's attention", expected=held, found=layer, where=cache.uri)
    layout = layouts[layer]
    rows = _sampled_rows(segment, "attention")
    places = _places(segment, "attention", rows)
    offset, length, keyword = (
        cache.read(f"attention/rows/{name}", rows.start, rows.stop).astype(np.int64) for name in ("offset", "length", "keyword")
    )
    found = np.full((len(places), len(layout.head_ids), len(segment)), np.nan, np.float32)
    for row, (first, count) in enumerate(zip(offset.tolist(), length.tolist(), strict=True)):
        codes = decode_attention(torch.from_numpy(cache.read(f"{layout.group}/weights", first, first + count))).numpy()
        if layout.max_columns is None:
            found[row, :, :count] = codes.T
        else:
            columns = cache.read(f"{layout.group}/columns", first, first + count).astype(np.int64)
            found[row, np.arange(len(layout.head_ids))[None], columns] = codes
    coordinates: dict[str, Any] = {
        "token": places,
        "head": list(layout.head_ids),
        "key": np.arange(len(segment)),
        "key_piece": ("key", np.asarray(segment.tokens, dtype=object)),
        "keyword": ("token", keyword == 1),
        **row_coordinates(segment, places),
    }
    if layout.max_columns is not None:
        residual = cache.read(f"{layout.group}/residual", rows.start, rows.stop).astype(np.float32)
        coordinates["residual"] = (("token", "head"), residual, {"units": "probability"})
    return xarray().DataArray(
        found,
        dims=("token", "head", "key"),
        coords=coordinates,
        name=f"attention_{layer}",
        attrs={"units": "probability", "long_name": f"attention of block {layer}"},
    )


def _about(path: str) -> dict[str, str]:
    what, unit = meaning(path)
    return {"units": unit, "long_name": what}


def statistics(segment: SegmentText) -> dict[str, Any]:
    """By name, DataArrays of the segment's statistics: attention by layer, FFN and gradient by layer."""
    cache, layout, xr = segment.cache, segment.cache.manifest.calibration.stats, xarray()
    found: dict[str, Any] = {}
    if layout is None:
        return found
    for layer in layout.attention_layers:
        path = f"stats/attention/{layer}/values"
        if path in cache.capacity_rows:
            values = segment.row_of(path).astype(np.float32)
            coords = {"head": np.arange(layout.num_heads), "statistic": list(ATTENTION_STATISTICS)}
            found[f"attention_statistics_{layer}"] = xr.DataArray(
                values, dims=("head", "statistic"), coords=coords, attrs=_about(path)
            )
    if "stats/ffn/values" in cache.capacity_rows:
        coords = {"layer": list(layout.layers), "statistic": list(FFN_STATISTICS)}
        values = segment.row_of("stats/ffn/values").astype(np.float32)
        found["ffn_statistics"] = xr.DataArray(values, dims=("layer", "statistic"), coords=coords, attrs=_about("stats/ffn/values"))
    if "stats/gradient/log10_variance" in cache.capacity_rows:
        values = segment.row_of("stats/gradient/log10_variance").astype(np.float32)
        attributes = {"units": "log10", "long_name": "log10 of the variance of the loss's gradient"}
        found["gradient_log10_variance"] = xr.DataArray(
            values, dims=("layer",), coords={"layer": list(layout.layers)}, attrs=attributes
        )
    return found


def evidence(segment: SegmentText) -> Any:
    """DataFrame of a question's sentences: `start` and `length` in tokens, `text`, and by layer the `share` of the answer's
    attention, which adds up to 1."""
    cache = segment.cache
    rows = _sampled_rows(segment, "evidence")
    start, length = _places(segment, "evidence", rows), cache.read("evidence/rows/length", rows.start, rows.stop).astype(np.int64)
    pieces = segment.tokens
    found: dict[str, Any] = {
        "start": start,
        "length": length,
        "text": ["".join(pieces[a : a + n]) for a, n in zip(start, length, strict=True)],
    }
    for layer in cache.manifest.calibration.evidence_layers:
        found[f"share_{layer}"] = cache.read(f"evidence/{layer}/share", rows.start, rows.stop).astype(np.float32)
    return pandas().DataFrame(found)


def coverage(segment: SegmentText) -> Any:
    """DataFrame of a text's key words: `place` where it first stands, `piece` of its first token, `probability` that the summary
    says it."""
    cache, texts = segment.cache, token_texts(segment.cache)
    rows = _sampled_rows(segment, "coverage")
    tokens = cache.read("coverage/rows/token", rows.start, rows.stop)
    found = {
        "place": _places(segment, "coverage", rows),
        "piece": [texts.piece(int(token)) for token in tokens],
        "probability": cache.read("coverage/words/probability", rows.start, rows.stop).astype(np.float32),
    }
    return pandas().DataFrame(found)


def replay(segment: SegmentText) -> Any:
    """Dataset of the replayed paths: `moved` [token, step, channel] from the final hidden state up its loss's gradient, `nll`
    [token, state] the loss along it, in nats."""
    cache = segment.cache
    rows = _sampled_rows(segment, "replay")
    places = _places(segment, "replay", rows)
    values, scale, nll = (cache.read(f"replay/path/{name}", rows.start, rows.stop) for name in ("values", "scale", "nll"))
    moved = values.astype(np.float32) * scale[:, None, None]
    return xarray().Dataset(
        {
            "moved": (("token", "step", "channel"), moved, {"units": "activation", "long_name": "from the path's beginning"}),
            "nll": (("token", "state"), nll.astype(np.float32), _about("replay/path/nll")),
        },
        coords={"token": places, **row_coordinates(segment, places)},
    )


def roles(segment: SegmentText) -> Any:
    """DataFrame, one row a token: what part its word plays at each level."""
    found = segment.cache.read("tags/roles", segment.token_start, segment.token_start + len(segment))
    columns = {level: [names[value] for value in found[:, n]] for n, (level, names) in enumerate(LEVELS.items())}
    return pandas().DataFrame({"piece": segment.tokens, **columns}, index=pandas().RangeIndex(len(segment), name="token"))


def to_xarray(segment: SegmentText) -> Any:
    """DataTree of what the cache holds of a segment, decoded: tokens, the distribution's scalars, hidden states, attention,
    statistics, replayed paths, evidence, coverage, tags. Not in it: the dense distribution (`logprobs`, `top`), drawn ids,
    gradients."""
    cache, xr = segment.cache, xarray()
    signals: Mapping[str, Any] = dict(cache.manifest.signals)
    tokens = xr.Dataset(
        {
            "input_ids": ("token", segment.input_ids, {"units": "id", "long_name": "token id"}),
            "loss_mask": ("token", segment.loss_mask, {"units": "flag", "long_name": "0 nowhere, 1 counts, 2 distribution only"}),
            "piece": ("token", np.asarray(segment.tokens, dtype=object), {"units": "text", "long_name": "text of the token"}),
        },
        coords={"token": np.arange(len(segment))},
        attrs={"source": segment.source, "split": segment.split, "document": segment.document, "segment": segment.index},
    )
    parts: dict[str, Any] = {"/": xr.Dataset(attrs=tokens.attrs), "/tokens": tokens}
    if signals["distribution"] is not None:
        parts["/distribution"] = scalars(segment)
    for layout in cache.manifest.calibration.hidden:
        parts[f"/hidden/{layout.tap}/{layout.layer}"] = hidden(segment, layout.tap, layout.layer).to_dataset(name="state")
    for held in cache.manifest.calibration.attention:
        parts[f"/attention/{held.layer}"] = attention(segment, held.layer).to_dataset(name="probability")
    for name, array in statistics(segment).items():
        parts[f"/stats/{name}"] = array.to_dataset(name="value")
    if signals["replay"] is not None:
        parts["/replay"] = replay(segment)
    for name, frame_of in (("evidence", evidence), ("coverage", coverage)):
        if signals[name] is not None:
            frame = frame_of(segment)
            parts[f"/{name}"] = xr.Dataset.from_dataframe(frame.rename_axis("row"))
            for column in frame.columns:
                parts[f"/{name}"][column].attrs |= {"units": _frame_unit(column), "long_name": f"{name}: {column}"}
    if "tags/roles" in cache.capacity_rows:
        parts["/tags"] = xr.Dataset.from_dataframe(roles(segment))
        for level in parts["/tags"].data_vars:
            parts["/tags"][level].attrs |= {"units": "text", "long_name": f"role of the word: {level}"}
    return xr.DataTree.from_dict(parts, name=f"segment {segment.index}")


def _frame_unit(column: str) -> str:
    if column.startswith("share"):
        return "share"
    return {"probability": "probability", "start": "token", "length": "token", "place": "token"}.get(column, "text")
