"""The teacher in memory: loaded as the recipe says, identified, and run over one composed batch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.attention import RowQuery, captured_layers, refuse_silent_rows, tap_attention_rows
from model_taps.attention_interface import own_kernel
from model_taps.blocks import num_layers, unsupported
from model_taps.causality import refuse_look_ahead
from model_taps.head import MAX_HEAD_ERROR, OutputHead, final_hidden, head_error, output_head, own_logits
from model_taps.loading import config_digest, load_model, weights_digest
from model_taps.neighbours import Composition, probe
from model_taps.packing import Forward, best_fit, position_ids
from model_taps.slices import State, refuse_silent_taps, tap_states
from signal_store.errors import InputError, MismatchError, SignalStoreError, memory_error
from signal_store.manifest import TeacherIdentity
from teacher_cache.builder.unit_plan import UnitPlan
from teacher_cache.builder.workers import Worker
from teacher_cache.recipe import TeacherSection

LOSS_ROWS = 512


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model, the device its inputs go to, and its head restricted to the tokenizer's vocabulary (padded rows dropped); None
    where only the model's own logits are to be had."""

    model: PreTrainedModel
    device: torch.device
    head: OutputHead | None
    identity: TeacherIdentity
    vocab_size: int
    """Rows of the distribution."""
    row_layers: tuple[int, ...] = ()
    """Blocks (from 1) whose attention rows can be had, where any are wanted."""


def load_teacher(section: TeacherSection, vocab_size: int, *, capture_rows: bool, needs_head: bool) -> Teacher:
    """Load and identify the teacher, in a dtype that is settled; refuse one whose own logits are not those of its output head, if a
    head is needed."""
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype), "revision": section.revision}
    options |= {"trust_remote_code": section.trust_remote_code, "attn_implementation": section.attn_implementation}
    device = device_of(section)
    if section.device_map is not None:
        if find_spec("accelerate") is None:
            raise InputError(
                "accelerate, which spreads a teacher over devices, is not installed",
                expected='pip install "teacher-cache[all]"',
                where="teacher.device_map",
            )
        options["device_map"] = section.device_map
    model = load_model(section.model, what="teacher", **options)
    if section.device_map is None:
        model.to(device)  # type: ignore[arg-type]
    else:
        device = next(model.parameters()).device
    model.requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    refuse_look_ahead(model, min(vocab_size, int(config.vocab_size)), "teacher")
    head, why = _usable_head(model, vocab_size, device)
    if head is None and needs_head:
        raise MismatchError(
            "the teacher has no output head that can be used",
            expected="logits that are its linear head's",
            found=why,
            where=section.model,
            remedy="Set signals.distribution.rank: 0 to cache its log-probabilities alone; hidden states need no head.",
        )
    row_layers = captured_layers(model, min(vocab_size, int(config.vocab_size))) if capture_rows else ()
    identity = TeacherIdentity(
        name=section.model,
        revision=section.revision,
        model_type=config.model_type,
        config_digest=config_digest(model.config),
        weights_digest=weights_digest(model),
        dtype=section.dtype,
        attn_implementation=own_kernel(model),
        hidden_size=config.hidden_size,
        num_layers=num_layers(model),
        num_heads=getattr(config, "num_attention_heads", None),
        max_positions=getattr(config, "max_position_embeddings", None),
        logit_softcap=None if head is None else head.softcap,
    )
    return Teacher(model, device, None if head is None else head.float().to(device), identity, vocab_size, row_layers)


def placed(section: TeacherSection, worker: Worker) -> TeacherSection:
    """The section with this worker's GPU, where the recipe leaves the place open and there are several."""
    if section.device is None and section.device_map is None and torch.cuda.is_available():
        return section.model_copy(update={"device": f"cuda:{worker.local % torch.cuda.device_count()}"})
    return section


def device_of(section: TeacherSection) -> torch.device:
    """Where the teacher's inputs go, of one that is spread where its first blocks will be; InputError if it is not there."""
    wanted = section.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            "no such device here", expected="cpu, or cuda", found=f"{wanted}: {reason}", where="teacher.device"
        ) from error
    if device.type == "meta":
        raise InputError("a device without memory", expected="cpu, or cuda", found=wanted, where="teacher.device")
    return device


def _usable_head(model: PreTrainedModel, vocab_size: int, device: torch.device) -> tuple[OutputHead | None, str]:
    """The head cut to the tokenizer's vocabulary; or None, and why. MismatchError where the tokenizer has more tokens."""
    try:
        head = output_head(model)
    except ValueError as error:
        return None, str(error)
    if len(head.weight) < vocab_size:
        raise MismatchError("the tokenizer has more tokens than the teacher", expected=len(head.weight), found=vocab_size)
    difference = head_error(model, torch.arange(min(vocab_size, 16), device=device)[None])
    if difference > MAX_HEAD_ERROR[model.dtype]:
        return None, f"a relative difference of {difference:.2g} between the two, where {MAX_HEAD_ERROR[model.dtype]} is the most"
    bias = None if head.bias is None else head.bias[:vocab_size]
    return replace(head, weight=head.weight[:vocab_size], bias=bias), ""


def resolve_forward(wanted: Literal["auto"] | Forward, teacher: Teacher, context: int, batch_tokens: int) -> Composition:
    """How segments share the teacher's forward passes: `auto` takes the first way that the probe finds right, another is refused
    where it finds it wrong."""
    allowed: tuple[Forward, ...] = ("packed", "padded", "alone") if wanted == "auto" else (wanted,)
    return probe(teacher.model, teacher.vocab_size, context, what="teacher", most_tokens=batch_tokens, allowed=allowed)


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Consecutive segments [first, last) of a unit, laid out in rows: `rows[b]` are segment numbers, end to end."""

    first: int
    last: int
    rows: tuple[tuple[int, ...], ...]


def compose(lengths: NDArray[np.int64], composition: Composition, context: int, batch_tokens: int) -> list[TeacherBatch]:
    """The batches of a unit, a pure function of the plan: as many consecutive segments as fit and as may share a pass.

    Packed: into at most batch_tokens // context rows of `context`, best fit. Padded: one a row, rows as long as the longest. Alone:
    one.
    """
    batches = []
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and _fits(lengths[first : last + 1], composition, context, batch_tokens):
            last += 1
        packed = composition.forward == "packed"
        rows = best_fit(lengths[first:last].tolist(), context) if packed else [[i] for i in range(last - first)]
        batches.append(TeacherBatch(first, last, tuple(tuple(first + i for i in row) for row in rows)))
        first = last
    return batches


def _fits(lengths: NDArray[np.int64], composition: Composition, context: int, batch_tokens: int) -> bool:
    if composition.forward == "alone":
        return len(lengths) == 1
    if composition.split_length is not None and len(set(lengths > composition.split_length)) > 1:
        return False
    if composition.forward == "padded":
        return int(lengths.max()) * len(lengths) <= batch_tokens
    max_rows = batch_tokens // context
    return int(lengths.sum()) <= max_rows * context and len(best_fit(lengths.tolist(), context)) <= max_rows


@dataclass(frozen=True, slots=True)
class Listening:
    """What is read out of the teacher while it runs: states at taps, attention rows of these layers, gradients of the loss with
    respect to the outputs of these blocks."""

    states: tuple[State, ...] = ()
    row_layers: tuple[int, ...] = ()
    gradient_layers: tuple[int, ...] = ()


NOTHING_MORE = Listening()


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What the teacher gave for the tokens of a batch, in the unit's token order; `tokens` are their places in the unit.

    `hidden` [n, D] what the output head reads; `logits` [n, V] float32 of a teacher without a usable head, else None; `states`
    (tap, layer) -> [n, d]; `rows` layer -> [R, H, L] attention of the tokens at `row_places` [R]; `gradients` layer -> [n, D].
    """

    tokens: slice
    hidden: Tensor
    logits: Tensor | None
    states: dict[State, Tensor]
    rows: dict[int, Tensor]
    row_places: NDArray[np.int64]
    row_lengths: Tensor
    gradients: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class _Laid:
    """A batch laid out in rows: ids and positions [B, S]; where each of the unit's tokens went (`flat`, b * S + s), and where its
    segment begins in its row."""

    input_ids: Tensor
    positions: Tensor | None
    tokens: slice
    flat: NDArray[np.int64]
    segment_first: NDArray[np.int64]


def _lay_out(unit: UnitPlan, batch: TeacherBatch) -> _Laid:
    width = max(int(unit.length[list(row)].sum()) for row in batch.rows)
    input_ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
    positions = torch.zeros(len(batch.rows), width, dtype=torch.long)
    tokens = slice(int(unit.token_start[batch.first]), int(unit.token_start[batch.last - 1] + unit.length[batch.last - 1]))
    flat = np.zeros(tokens.stop - tokens.start, dtype=np.int64)
    segment_first = np.zeros(len(flat), dtype=np.int64)
    for b, row in enumerate(batch.rows):
        column = 0
        for segment in row:
            start, length = int(unit.token_start[segment]), int(unit.length[segment])
            places = slice(start - tokens.start, start - tokens.start + length)
            input_ids[b, column : column + length] = torch.from_numpy(unit.input_ids[start : start + length].astype(np.int64))
            flat[places] = b * width + column + np.arange(length)
            segment_first[places] = column
            column += length
        positions[b] = position_ids([int(unit.length[s]) for s in row], width)
    packed = any(len(row) > 1 for row in batch.rows)
    return _Laid(input_ids, positions if packed else None, tokens, flat, segment_first)


def think(
    teacher: Teacher,
    unit: UnitPlan,
    batch: TeacherBatch,
    listening: Listening = NOTHING_MORE,
    row_places: NDArray[np.int64] | None = None,
) -> Thoughts:
    """One forward pass over a batch, and a backward one where gradients are wanted. `row_places`: whose attention rows, ascending
    places in the unit. Running out of memory is an error, never a smaller batch."""
    laid = _lay_out(unit, batch)
    width = laid.input_ids.shape[1]
    wanted = np.zeros(0, np.int64) if row_places is None else row_places
    wanted = wanted[(wanted >= laid.tokens.start) & (wanted < laid.tokens.stop)]
    local = wanted - laid.tokens.start
    query_columns = (laid.flat[local] // width, laid.flat[local] % width, laid.segment_first[local])
    query = RowQuery(*(torch.from_numpy(part).to(teacher.device) for part in query_columns))
    ids = laid.input_ids.to(teacher.device)
    positions = None if laid.positions is None else laid.positions.to(teacher.device)
    flat_n = torch.from_numpy(laid.flat)

    def in_order(states: Tensor) -> Tensor:
        return states.detach().flatten(0, -2)[flat_n.to(states.device)].to(teacher.device)

    gradient_states: list[State] = [("block_output", layer) for layer in listening.gradient_layers]
    every_state: list[State] = list(dict.fromkeys([*listening.states, *gradient_states]))
    grad_mode = _gradients_of_activations(teacher.model) if gradient_states else torch.inference_mode()
    wanted_rows = dict.fromkeys(listening.row_layers, query)
    with (
        grad_mode,
        tap_states(teacher.model, every_state) as states,
        tap_attention_rows(wanted_rows) as rows,
    ):
        logits = None
        if teacher.head is None:
            logits = own_logits(teacher.model, ids, positions)
            hidden = logits.new_zeros(*ids.shape, 0)
        else:
            hidden = final_hidden(teacher.model, ids, positions)
        refuse_silent_taps(teacher.model, states, every_state, ids.shape)
        refuse_silent_rows(teacher.model, rows, listening.row_layers)
        gradients = {}
        if gradient_states:
            labels_n = torch.from_numpy(unit.labels()[laid.tokens])
            counted_n = torch.from_numpy(unit.loss_mask[laid.tokens] == 1)
            inputs = [states[state] for state in gradient_states]
            upstream = _loss_gradient(teacher, hidden.detach().flatten(0, 1), flat_n, labels_n, counted_n).view_as(hidden)
            try:
                found = torch.autograd.grad(hidden, inputs, upstream.to(hidden.dtype))
            except RuntimeError as error:
                if memory_error(error) is not None:
                    raise
                raise unsupported(teacher.model, "no gradient reaches its blocks", str(error).splitlines()[0]) from error
            gradients = dict(zip(listening.gradient_layers, found, strict=True))
    tapped = {f"{tap} {layer}": state for (tap, layer), state in states.items()}
    _refuse_not_finite({"final hidden state": hidden, **tapped}, unit, batch)
    return Thoughts(
        laid.tokens,
        in_order(hidden),
        None if logits is None else in_order(logits)[:, : teacher.vocab_size],
        {state: in_order(states[state]) for state in listening.states},
        {layer: r.detach().to(teacher.device) for layer, r in rows.items()},
        wanted,
        query.lengths,
        {layer: in_order(g) for layer, g in gradients.items()},
    )


def _refuse_not_finite(states: Mapping[str, Tensor], unit: UnitPlan, batch: TeacherBatch) -> None:
    """SignalStoreError naming the state and the documents, rather than codes of a number that is none."""
    for name, state in states.items():
        if not bool(state.sum(dtype=torch.float32).isfinite()):
            documents = sorted({int(d) for d in unit.document[batch.first : batch.last]})
            raise SignalStoreError(
                f"the teacher's {name} is not finite",
                expected="numbers",
                found="infinity or NaN",
                where=f"documents {documents[:10]} of source {int(unit.source[batch.first])}",
                remedy="Run the teacher in bfloat16 or float32, or leave these documents out.",
            )


@contextlib.contextmanager
def _gradients_of_activations(model: PreTrainedModel) -> Iterator[None]:
    """The frozen model builds a graph from its embeddings on; its weights take no part."""

    def begin_graph(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_().clone()  # of which a family may do with in place what it likes

    handle = model.get_input_embeddings().register_forward_hook(begin_graph)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


@torch.no_grad()
def _loss_gradient(teacher: Teacher, hidden_ND: Tensor, flat_n: Tensor, labels_n: Tensor, counted_n: Tensor) -> Tensor:
    """[N, D] float32: gradient of each counted token's own loss with respect to what the head reads; zero elsewhere."""
    assert teacher.head is not None
    gradient_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
    rows_n = flat_n[counted_n].to(hidden_ND.device)
    labels = labels_n[counted_n].to(hidden_ND.device)
    for part in range(0, len(rows_n), LOSS_ROWS):
        rows = rows_n[part : part + LOSS_ROWS]
        with torch.enable_grad():
            leaf = hidden_ND[rows].float().requires_grad_()
            loss = torch.nn.functional.cross_entropy(teacher.head.logits(leaf), labels[part : part + LOSS_ROWS], reduction="sum")
            (gradient_ND[rows],) = torch.autograd.grad(loss, leaf)
    return gradient_ND


def attention_layers(teacher: Teacher, wanted: Sequence[int] | str) -> tuple[int, ...]:
    """The wanted blocks, checked: `last` is the last whose attention rows can be had."""
    refuse_no_rows(teacher, "attention")
    if wanted == "last":
        return (teacher.row_layers[-1],)
    unable = [layer for layer in wanted if layer not in teacher.row_layers]
    if unable:
        raise InputError(
            "a block has no attention rows", expected=f"of {teacher.row_layers}", found=unable, where="signals.attention.layers"
        )
    return tuple(int(layer) for layer in wanted)


def refuse_no_rows(teacher: Teacher, signal: str) -> None:
    """InputError where no block's attention rows can be had."""
    if not teacher.row_layers:
        raise InputError(
            "no attention rows of this family can be had",
            expected="softmax attention that goes through transformers' attention interface",
            found=teacher.identity.model_type,
            where=f"signals.{signal}",
            remedy=f"Leave signals.{signal} out" + ("; stats can do without, attention: false." if signal == "stats" else "."),
        )
