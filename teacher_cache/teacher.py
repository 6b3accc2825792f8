"""The teacher in memory: loaded as the recipe says, identified, and run over one composed batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.attention import RowQuery, enable_row_capture, softmax_attention_layers, tap_attention_rows
from model_taps.blocks import num_layers, tap_block_outputs
from model_taps.head import OutputHead, final_hidden, head_error, output_head
from model_taps.loading import config_digest, load_model, weights_digest
from model_taps.packing import Forward, best_fit, position_ids, probe
from signal_store.errors import InputError, MismatchError
from signal_store.manifest import TeacherIdentity
from teacher_cache.recipe import TeacherSection
from teacher_cache.unit_plan import UnitPlan

MAX_HEAD_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model, the device its inputs go to, and its head restricted to the tokenizer's vocabulary (padded rows dropped)."""

    model: PreTrainedModel
    device: torch.device
    head: OutputHead
    identity: TeacherIdentity

    @property
    def vocab_size(self) -> int:
        """Rows of the distribution."""
        return len(self.head.weight)


def load_teacher(section: TeacherSection, vocab_size: int, *, capture_rows: bool) -> Teacher:
    """Load and identify the teacher; refuse one whose own logits are not those of its output head."""
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype), "revision": section.revision}
    options |= {"trust_remote_code": section.trust_remote_code, "attn_implementation": section.attn_implementation}
    device = torch.device(section.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if section.device_map is not None:
        options["device_map"] = section.device_map
    model = load_model(section.model, what="teacher", **options)
    if section.device_map is None:
        model.to(device)  # type: ignore[arg-type]
    else:
        device = next(model.parameters()).device
    model.requires_grad_(False)
    attn_implementation = model.config._attn_implementation  # noqa: SLF001
    head = output_head(model)
    if len(head.weight) < vocab_size:
        raise MismatchError("the tokenizer has more tokens than the teacher", expected=len(head.weight), found=vocab_size)
    error = head_error(model, torch.arange(min(vocab_size, 16), device=device)[None])
    if error > MAX_HEAD_ERROR[model.dtype]:
        raise MismatchError(
            "the teacher's logits are not those of its output head",
            expected=f"relative difference below {MAX_HEAD_ERROR[model.dtype]}",
            found=f"{error:.2g}",
            where=section.model,
            remedy="This family scales its logits in a way that is not known here.",
        )
    if capture_rows:
        enable_row_capture(model)
    config = model.config.get_text_config()
    identity = TeacherIdentity(
        name=section.model,
        revision=section.revision,
        model_type=config.model_type,
        config_digest=config_digest(model.config),
        weights_digest=weights_digest(model),
        dtype=section.dtype,
        attn_implementation=attn_implementation,
        hidden_size=config.hidden_size,
        num_layers=num_layers(model),
        num_heads=config.num_attention_heads,
        max_positions=getattr(config, "max_position_embeddings", None),
        logit_softcap=head.softcap,
    )
    bias = None if head.bias is None else head.bias[:vocab_size]
    return Teacher(model, device, replace(head, weight=head.weight[:vocab_size], bias=bias).float().to(device), identity)


def resolve_forward(wanted: str, teacher: Teacher) -> Forward:
    """`auto` by the probe; `packed` is refused where the probe finds a leak."""
    if wanted == "padded":
        return "padded"
    found = probe(teacher.model, teacher.vocab_size)
    if wanted == "packed" and found != "packed":
        raise InputError("this teacher lets packed segments see each other", expected="forward: padded", found="forward: packed")
    return found


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Consecutive segments [first, last) of a unit, laid out in rows: `rows[b]` are segment numbers, end to end."""

    first: int
    last: int
    rows: tuple[tuple[int, ...], ...]


def compose(lengths: NDArray[np.int64], forward: Forward, context: int, batch_tokens: int) -> list[TeacherBatch]:
    """The batches of a unit, a pure function of the plan: as many consecutive segments as fit.

    Packed: into at most batch_tokens // context rows of `context`, best fit. Padded: one a row, rows as long as the longest.
    """
    batches = []
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and _fits(lengths[first : last + 1], forward, context, batch_tokens):
            last += 1
        rows = best_fit(lengths[first:last].tolist(), context) if forward == "packed" else [[i] for i in range(last - first)]
        batches.append(TeacherBatch(first, last, tuple(tuple(first + i for i in row) for row in rows)))
        first = last
    return batches


def _fits(lengths: NDArray[np.int64], forward: Forward, context: int, batch_tokens: int) -> bool:
    if forward == "padded":
        return int(lengths.max()) * len(lengths) <= batch_tokens
    max_rows = batch_tokens // context
    return int(lengths.sum()) <= max_rows * context and len(best_fit(lengths.tolist(), context)) <= max_rows


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What the teacher gave for the tokens of a batch, in the unit's token order.

    `hidden` [n, D] what the output head reads; `blocks` layer -> [n, D]; `rows` layer -> [R, H, L] attention of the keyword
    tokens, and `row_lengths` [R].
    """

    hidden: Tensor
    blocks: dict[int, Tensor]
    rows: dict[int, Tensor]
    row_lengths: Tensor


@torch.inference_mode()
def think(teacher: Teacher, unit: UnitPlan, batch: TeacherBatch, layers: Sequence[int], row_layers: Sequence[int]) -> Thoughts:
    """One forward pass over a batch. Running out of memory is an error, never a smaller batch."""
    width = max(int(unit.length[list(row)].sum()) for row in batch.rows)
    input_ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
    positions = torch.zeros(len(batch.rows), width, dtype=torch.long)
    tokens_from = int(unit.token_start[batch.first])
    tokens_to = int(unit.token_start[batch.last - 1] + unit.length[batch.last - 1])
    flat = np.zeros(tokens_to - tokens_from, dtype=np.int64)
    segment_first = np.zeros(len(flat), dtype=np.int64)
    for b, row in enumerate(batch.rows):
        column = 0
        for segment in row:
            start, length = int(unit.token_start[segment]), int(unit.length[segment])
            input_ids[b, column : column + length] = torch.from_numpy(unit.input_ids[start : start + length].astype(np.int64))
            flat[start - tokens_from : start - tokens_from + length] = b * width + column + np.arange(length)
            segment_first[start - tokens_from : start - tokens_from + length] = column
            column += length
        positions[b] = position_ids([int(unit.length[s]) for s in row], width)
    keyword = unit.keyword[(unit.keyword >= tokens_from) & (unit.keyword < tokens_to)] - tokens_from
    query = RowQuery(
        *(
            torch.from_numpy(part).to(teacher.device)
            for part in (flat[keyword] // width, flat[keyword] % width, segment_first[keyword])
        )
    )
    with tap_block_outputs(teacher.model, layers) as blocks, tap_attention_rows(query, row_layers) as rows:
        packed = any(len(row) > 1 for row in batch.rows)
        hidden_BSD = final_hidden(teacher.model, input_ids.to(teacher.device), positions.to(teacher.device) if packed else None)
    flat_n = torch.from_numpy(flat)

    def in_order(states_BSD: Tensor) -> Tensor:
        return states_BSD.flatten(0, 1)[flat_n.to(states_BSD.device)].to(teacher.device)

    return Thoughts(
        in_order(hidden_BSD),
        {layer: in_order(h) for layer, h in blocks.items()},
        {layer: r.to(teacher.device) for layer, r in rows.items()},
        query.lengths,
    )


def attention_layers(teacher: Teacher, wanted: Sequence[int] | str) -> tuple[int, ...]:
    """The wanted blocks, checked: `last` is the last that has softmax attention."""
    able = softmax_attention_layers(teacher.model)
    if wanted == "last":
        return (able[-1],)
    unable = [layer for layer in wanted if layer not in able]
    if unable:
        raise InputError("a block has no softmax attention", expected=f"of {able}", found=unable, where="signals.attention.layers")
    return tuple(int(layer) for layer in wanted)
