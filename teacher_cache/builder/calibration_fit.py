"""What calibration measures: it runs the teacher on a few thousand tokens of all sources and fits what depends on it: the
distribution's codec, PCA bases, attention heads, packed or padded. What it reads is a share of the plan, and no more than the fit
can use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_taps.blocks import layer_at_depth
from model_taps.slices import State
from run_kit.progress import progress_bar
from signal_store.codecs.distribution import DistributionCodec
from signal_store.codecs.hidden import HiddenCodec
from signal_store.errors import InputError
from signal_store.format.manifest import StatsLayout
from signal_store.io.objects import Objects
from signal_store.signals import DistributionSignal, EvidenceSignal, Signals
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.positions import attention_rows
from teacher_cache.builder.tail_basis import TailFit, headless_codec
from teacher_cache.builder.tail_choice import choose_codec
from teacher_cache.builder.unit_staging import SPLITS
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.forward import Listening, Teacher, TeacherBatch, attention_layers, refuse_no_rows, resolve_forward, think
from teacher_cache.teacher.supported import listening_of, refuse_unsupported

FIT_TOKENS_PER_CHANNEL = (8, 16)
"""Tokens that the bases are fitted on, least and most, for each channel of the teacher's width: held-out KL is flat from 16 on."""
FIT_TOKENS = 2048
"""And least in any case: how far a coordinate reaches shows only in many tokens."""
FIT_SHARE, HELD_OUT_SHARE = 1 / 12, 1 / 24
"""Of the plan's tokens, what calibration takes between its least and its most."""
HELD_OUT_TOKENS = (4, 2048, 4096)
"""The codec is measured on: least, for each channel, but no more than the second; most."""
HEADLESS_TOKENS = 2048
CHECKED_TOKENS = 64
MAX_UNITS_READ = 64
MASSIVE = 8.0
"""Under PCA, a channel is divided down to this many times the median channel's spread if it exceeds that."""

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Pick:
    """Segments of a unit to calibrate on, as batches of one segment each."""

    number: int
    unit: UnitPlan
    batches: list[TeacherBatch]


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that calibration reads: of each source, and the share of them that the codec is measured on."""

    by_source: tuple[int, ...]
    held_out_share: float


def budget(asked_per_source: int | None, sizes: Sequence[int], width: int, most: int | None = None) -> Budget:
    """Of sources of these sizes. One budget for all, half of it spread evenly, half by their sizes; or what the recipe asks of
    each."""
    total = sum(sizes)
    few, many = (width * tokens for tokens in FIT_TOKENS_PER_CHANNEL)
    fit = max(FIT_TOKENS, min(many, max(few, round(total * FIT_SHARE))))
    least, step, largest = HELD_OUT_TOKENS
    held = min(largest, max(min(step, least * width), round(total * HELD_OUT_SHARE)))
    if asked_per_source is not None:
        own = [min(size, asked_per_source) for size in sizes]
        return Budget(tuple(own), min(1 / 4, largest / max(1, sum(own))))
    wanted = fit + held if most is None else min(most, fit + held)
    even = [min(size, wanted * (1 / len(sizes) + size / max(1, total)) / 2) for size in sizes]
    room = [size - tokens for size, tokens in zip(sizes, even, strict=True)]
    spare = max(0.0, wanted - sum(even)) / max(1.0, sum(room))  # what a small source cannot give, the others do
    shared = [tokens + min(1.0, spare) * more for tokens, more in zip(even, room, strict=True)]
    return Budget(tuple(round(tokens) for tokens in shared), held / (fit + held))


def picks(planned: Plan, objects: Objects, by_source: Sequence[int]) -> list[Pick]:
    """Segments spread evenly over each source, until its share is reached; every source is met."""
    chosen_units = _spread_units(planned)
    units = [planned.unit(objects, u) for u in chosen_units]
    picked: list[list[int]] = [[] for _ in units]
    for source in range(len(planned.sources)):
        places = [(u, int(s)) for u, unit in enumerate(units) for s in np.flatnonzero(unit.source == source)]
        total = sum(int(units[u].length[s] - units[u].context_only[s]) for u, s in places)
        count = min(len(places), max(1, round(len(places) * by_source[source] / max(1, total))))
        for i in np.linspace(0, len(places) - 1, count).round().astype(int) if places else ():
            u, s = places[i]
            picked[u].append(s)
    return [
        Pick(number, unit, [TeacherBatch(s, s + 1, ((s,),)) for s in sorted(set(segments))])
        for number, unit, segments in zip(chosen_units, units, picked, strict=True)
        if segments
    ]


def _spread_units(planned: Plan) -> list[int]:
    """Units spread evenly over the plan, and one in the middle of each source's own range, so that a small one is not missed."""
    count = planned.num_units
    chosen = set(planned.spread_units(MAX_UNITS_READ))
    ends = np.cumsum([unit["tokens"] for unit in planned.units])
    in_units = {split: sum(u["tokens"] for u in planned.units if u["split"] == split) for split in SPLITS}
    own = {split: sum(s.num_tokens for s in planned.sources if s.split == split) for split in SPLITS}
    with_context = {split: in_units[split] / max(1, own[split]) for split in SPLITS}  # overlap shows tokens twice
    for split in SPLITS:
        start = 0 if split == "train" else in_units["train"]
        for source in planned.sources:
            if source.split == split:
                tokens = round(source.num_tokens * with_context[split])
                chosen.add(min(count - 1, int(np.searchsorted(ends, start + tokens // 2, side="right"))))
                start += tokens
    return sorted(int(unit) for unit in chosen)


def _refuse_too_many(signals: Signals, teacher: Teacher) -> None:
    """InputError where the recipe asks for more of a thing than the teacher has."""
    width, heads = teacher.identity.hidden_size, teacher.identity.num_heads
    asked = {
        "distribution.rank": (signals.distribution.rank if signals.distribution else None, width),
        "attention.heads": (signals.attention.heads if signals.attention else None, heads),
    }
    for name, (wanted, most) in asked.items():
        if isinstance(wanted, int) and most is not None and wanted > most:
            raise InputError("more than the teacher has", expected=f"at most {most}", found=wanted, where=f"signals.{name}")


def measure(recipe: CacheRecipe, planned: Plan, teacher: Teacher, objects: Objects) -> tuple[dict[str, Any], Arrays]:
    """What the calibration record says of the teacher's thoughts, and the matrices."""
    signals = recipe.signals
    states = hidden_states(signals, teacher)
    attention = signals.attention
    _refuse_too_many(signals, teacher)
    row_layers = attention_layers(teacher, attention.layers) if attention else ()
    body: dict[str, Any] = {"tail_rank": 0, "stats": _stats_layers(signals, teacher)}
    body["replay_layers"] = list(_layers(signals.replay.layers, signals.replay.depths, teacher)) if signals.replay else []
    if signals.evidence is not None:
        body["evidence_layers"] = _evidence_layers(signals.evidence, teacher)
    stats = None if body["stats"] is None else StatsLayout.model_validate(body["stats"])
    others = (stats, body["replay_layers"], body.get("evidence_layers", ()), teacher.identity.num_layers)
    refuse_unsupported(signals, listening_of(signals, states, row_layers, *others), teacher, planned.unit(objects, 0))
    composition = resolve_forward(recipe.forward, teacher, recipe.context, recipe.batch_tokens)
    body |= {"forward": composition.forward, "split_length": composition.split_length}
    sizes = [source.num_tokens for source in planned.sources]
    most = HEADLESS_TOKENS if teacher.head is None else None
    shared = budget(recipe.calibration.tokens_per_source, sizes, teacher.identity.hidden_size, most)
    heard = _listen(picks(planned, objects, shared.by_source), teacher, Listening(states, row_layers))
    check = think(teacher, planned.unit(objects, 0), TeacherBatch(0, 1, ((0,),)))
    arrays: Arrays = {"check/hidden": checked_values(check.hidden, check.logits).numpy()}
    body["num_tokens"] = sum(len(h) for h in heard.final)
    if signals.distribution is not None:
        try:
            codec, facts = _distribution(signals.distribution, heard, shared.held_out_share, teacher)
        except InputError as error:
            raise _little_text(body["num_tokens"], teacher.identity.hidden_size, planned) or error from error
        arrays |= codec.to_arrays()
        body |= facts
    body["hidden"] = []
    for tap, layer in states:
        rank = signals.hidden.rank if signals.hidden else None
        hidden_codec, explained = fit_hidden(torch.cat(heard.states[tap, layer]), rank)
        arrays |= hidden_codec.to_arrays(f"hidden/{tap}/{layer}")
        kept = None if hidden_codec.basis is None else hidden_codec.basis.shape[1]
        facts = {"tap": tap, "layer": layer, "width": len(hidden_codec.mean), "rank": kept, "explained_variance": explained}
        body["hidden"].append(facts)
    body["attention"] = [
        {
            "layer": layer,
            "head_ids": _chosen_heads(attention.heads, torch.cat(heard.entropy[layer]), teacher.identity.num_heads),
            "max_columns": recipe.resolved_max_columns,
        }
        for layer in row_layers
        if attention is not None
    ]
    return body, arrays


def held_out(lengths: Sequence[int], share: float) -> list[bool]:
    """Which segments the codec is measured on: spread evenly, about this share of the tokens."""
    found, seen, taken = [], 0, 0
    for length in lengths:
        seen += length
        found.append(taken + length / 2 < share * seen)
        taken += length if found[-1] else 0
    return found


def _distribution(
    signal: DistributionSignal, heard: "_Heard", held_out_share: float, teacher: Teacher
) -> tuple[DistributionCodec, dict[str, Any]]:
    """The distribution's codec, and what the calibration record says of it."""
    if signal.head != "auto":
        signal = signal.model_copy(update={"head": min(signal.head, teacher.vocab_size)})
    if teacher.head is None:
        codec, coverage = headless_codec(torch.cat(heard.logits), signal)
        return codec, {"head": codec.head, "tail_rank": 0, "coverage": list(coverage)}
    held = held_out([len(h) for h in heard.final], held_out_share)
    fit_nD = torch.cat([h for h, out in zip(heard.final, held, strict=True) if not out])
    held_nD = torch.cat([h for h, out in zip(heard.final, held, strict=True) if out] or heard.final)
    choice = choose_codec(TailFit.of(fit_nD, teacher.head, signal), teacher.head, signal, held_nD)
    found: dict[str, Any] = {name: list(values) for name, values in asdict(choice.fidelity).items() if name != "head_mass"}
    found |= {"tokens": choice.tokens, "bytes_per_token": choice.bytes_per_token}
    coverage = choice.fidelity.head_mass
    return choice.codec, {
        "head": choice.codec.head,
        "tail_rank": choice.codec.rank,
        "tail_zigzag": True,
        "coverage": list(coverage),
        "fidelity": found,
    }


def _little_text(tokens: int, width: int, planned: Plan) -> InputError | None:
    """What is the matter where no codec is within the bounds and calibration read this little; None where it read enough."""
    least = FIT_TOKENS_PER_CHANNEL[0] * width
    if tokens >= least:
        return None
    there = sum(source.num_tokens for source in planned.sources)
    return InputError(
        "too little text to fit the distribution's codec on",
        expected=f"{least:,} tokens or more in calibration",
        found=f"{tokens:,}, of {there:,} in all sources",
        remedy="Give the sources more text" + ("" if there < least else ", or raise calibration.tokens_per_source") + ".",
    )


@dataclass(frozen=True, slots=True)
class _Heard:
    """Of all calibration segments, one tensor a segment, on the CPU."""

    final: list[Tensor]
    logits: list[Tensor]
    states: dict[State, list[Tensor]]
    entropy: dict[int, list[Tensor]]


def _listen(chosen: list[Pick], teacher: Teacher, listening: Listening) -> _Heard:
    heard = _Heard([], [], {s: [] for s in listening.states}, {layer: [] for layer in listening.row_layers})
    with progress_bar() as progress:
        bar = progress.add_task("calibrate", total=sum(len(p.batches) for p in chosen), unit="segments")
        for pick in chosen:
            rows = attention_rows(pick.unit, 0, None).position if listening.row_layers else None
            for batch in pick.batches:
                thoughts = think(teacher, pick.unit, batch, listening, rows)
                own = torch.from_numpy(~pick.unit.is_context[thoughts.tokens])  # rows that are context only are never stored
                heard.final.append(thoughts.hidden.float().cpu()[own])
                if thoughts.logits is not None:
                    heard.logits.append(thoughts.logits.cpu()[own])
                for state in listening.states:
                    heard.states[state].append(thoughts.states[state].float().cpu()[own])
                for layer in listening.row_layers:
                    heard.entropy[layer].append(_row_entropy(thoughts.rows[layer], thoughts.row_lengths).cpu())
                progress.advance(bar)
    return heard


def checked_values(hidden: Tensor, logits: Tensor | None) -> Tensor:
    """What every worker recomputes and compares: a few tokens' final states, or logits where there is no head."""
    values = hidden if logits is None else logits[:, :256]
    return values[:CHECKED_TOKENS].float().cpu()


def hidden_states(signals: Signals, teacher: Teacher) -> tuple[State, ...]:
    """Taps and layers of the hidden signal."""
    hidden = signals.hidden
    if hidden is None:
        return ()
    return tuple((tap, layer) for tap in hidden.taps for layer in _layers(hidden.layers, hidden.depths, teacher))


def _layers(numbers: tuple[int, ...] | None, depths: tuple[float, ...], teacher: Teacher) -> tuple[int, ...]:
    count = teacher.identity.num_layers
    if numbers is None:
        return tuple(sorted({layer_at_depth(f, count) for f in depths}))
    if not all(1 <= layer <= count for layer in numbers):
        raise InputError("no such block", expected=f"1 to {count}", found=list(numbers), where="signals, layers")
    return tuple(sorted(set(numbers)))


def _stats_layers(signals: Signals, teacher: Teacher) -> dict[str, Any] | None:
    if signals.stats is None:
        return None
    layers = _layers(signals.stats.layers, signals.stats.depths, teacher)
    if signals.stats.attention:
        refuse_no_rows(teacher, "stats")
    return {
        "layers": list(layers),
        "attention_layers": [layer for layer in layers if layer in teacher.row_layers],
        "num_heads": teacher.identity.num_heads or 0,
    }


def _evidence_layers(signal: EvidenceSignal, teacher: Teacher) -> list[int]:
    refuse_no_rows(teacher, "evidence")
    layers = [layer for layer in _layers(signal.layers, signal.depths, teacher) if layer in teacher.row_layers]
    if not layers:
        raise InputError("no softmax attention at these layers", expected=list(teacher.row_layers), where="signals.evidence")
    return layers


def fit_hidden(states_ND: Tensor, rank: int | None) -> tuple[HiddenCodec, float]:
    """The codec, and the share of variance it keeps (of the channels as it divides them)."""
    mean = states_ND.double().mean(0)
    centred = states_ND.double() - mean
    spread = centred.square().mean(0).sqrt().clamp(min=1e-6)
    if rank is not None and rank > states_ND.shape[1]:
        raise InputError(
            "more directions than the state has", expected=f"at most {states_ND.shape[1]}", found=rank, where="signals.hidden.rank"
        )
    if rank is None or rank == states_ND.shape[1]:
        return HiddenCodec(mean.float(), spread.float(), None), 1.0
    divisor = (spread / (MASSIVE * spread.median())).clamp(min=1)
    centred /= divisor
    energy, directions = torch.linalg.eigh(centred.T @ centred)
    kept = directions[:, energy.argsort(descending=True)[:rank]]
    share = float(energy.sort(descending=True).values[:rank].sum() / energy.sum().clamp(min=1e-30))
    return HiddenCodec(mean.float(), divisor.float(), kept.float()), share


def _row_entropy(rows_RHL: Tensor, lengths_R: Tensor) -> Tensor:
    """[R', H]: entropy of each row over log of its length (0 focused, 1 flat); rows of one key say nothing and are left out."""
    long = lengths_R > 1
    rows = rows_RHL[long].double()
    entropy_RH: Tensor = -torch.special.xlogy(rows, rows).sum(-1) / lengths_R[long].double().log()[:, None]
    return entropy_RH


def _chosen_heads(wanted: int | tuple[int, ...], entropy_RH: Tensor, num_heads: int | None) -> list[int]:
    """The heads of these numbers, or the ones with the lowest mean entropy (REQUIREMENTS 70); ascending."""
    if not isinstance(wanted, int):
        count = num_heads or entropy_RH.shape[1]
        if not all(0 <= head < count for head in wanted):
            raise InputError("no such head", expected=f"0 to {count - 1}", found=list(wanted), where="signals.attention.heads")
        return sorted(set(wanted))
    if not len(entropy_RH):
        raise InputError("no keyword in the calibration text", expected="some, to choose attention heads by", found="none")
    return sorted(entropy_RH.mean(0).argsort(stable=True)[:wanted].tolist())
