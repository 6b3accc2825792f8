"""The teacher in memory: loaded as the recipe says, and identified."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from model_taps.attention import captured_layers
from model_taps.attention_interface import own_kernel
from model_taps.blocks import num_layers
from model_taps.causality import refuse_look_ahead
from model_taps.head import MAX_HEAD_ERROR, OutputHead, head_error, output_head
from model_taps.loading import config_digest, load_model, weights_digest
from model_taps.neighbours import Composition, probe
from model_taps.packing import Forward
from signal_store.errors import InputError, MismatchError
from signal_store.manifest import TeacherIdentity
from teacher_cache.recipe import TeacherSection


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


def placed(section: TeacherSection, local: int) -> TeacherSection:
    """The section with the GPU of this machine's worker `local`, where the recipe leaves the place open and there are several."""
    if section.device is None and section.device_map is None and torch.cuda.is_available():
        return section.model_copy(update={"device": f"cuda:{local % torch.cuda.device_count()}"})
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
