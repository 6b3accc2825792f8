"""What a recipe asks of its teacher, against what the teacher's config alone says: refused before a text is read, or a weight.

Whether a device or a kernel is there is a machine's own matter: a plan may be made where the teacher will never run. A worker that
goes on to calibrate looks for its device first.
"""

from collections.abc import Iterator

import torch
from transformers import PretrainedConfig

from model_taps.attention_interface import refuse_unknown_kernel
from model_taps.blocks import refuse_no_blocks
from model_taps.loading import load_config
from signal_store.errors import InputError
from signal_store.signals import Signals
from teacher_cache.recipe import CacheRecipe, TeacherSection

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""What `device_map` may be besides a device."""


def refuse_beyond_teacher(recipe: CacheRecipe) -> None:
    """InputError naming what of a settled recipe no teacher of this config has, or no machine."""
    teacher = recipe.teacher
    refuse_no_device(teacher)
    if teacher.attn_implementation is not None and not teacher.trust_remote_code:  # whose code may bring its own
        refuse_unknown_kernel(teacher.attn_implementation, "teacher.attn_implementation")
    config = load_config(teacher.model, what="teacher", revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    refuse_no_blocks(config)
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and recipe.context > longest:
        raise InputError(
            "the context is longer than the teacher's",
            expected=f"at most {longest}",
            found=recipe.context,
            where="context",
            remedy="Lower context.",
        )
    _refuse_blocks(recipe.signals, text)
    _refuse_too_many(recipe.signals, text)


def refuse_no_device(section: TeacherSection) -> None:
    """InputError for a place that is none on any machine."""
    for where, wanted in (("teacher.device", section.device), ("teacher.device_map", section.device_map)):
        if wanted is None or (where == "teacher.device_map" and wanted in SPREAD):
            continue
        others = f", {', '.join(SPREAD)}" if where == "teacher.device_map" else ""
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise InputError("no such device", expected=f"cpu, or cuda{others}", found=wanted, where=where) from error
        if device.type == "meta":
            raise InputError("a device without memory", expected=f"cpu, or cuda{others}", found=wanted, where=where)


def _refuse_blocks(signals: Signals, config: PretrainedConfig) -> None:
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return  # that family is refused by name when it is loaded
    for name, layers in _numbered(signals):
        if not all(1 <= layer <= count for layer in layers):
            raise InputError("no such block", expected=f"1 to {count}", found=list(layers), where=f"signals.{name}.layers")


def _numbered(signals: Signals) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the signals that name blocks by number, those."""
    for name, signal in signals:
        layers = getattr(signal, "layers", None)
        if isinstance(layers, tuple):
            yield name, layers


def _refuse_too_many(signals: Signals, config: PretrainedConfig) -> None:
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    wanted = signals.attention.heads if signals.attention else None
    asked = {
        "distribution.rank": (signals.distribution.rank if signals.distribution else None, width),
        "attention.heads": (wanted, heads),
    }
    for name, (number, most) in asked.items():
        if isinstance(number, int) and most is not None and number > most:
            raise InputError("more than the teacher has", expected=f"at most {most}", found=number, where=f"signals.{name}")
    if isinstance(wanted, tuple) and heads is not None and not all(0 <= head < heads for head in wanted):
        raise InputError("no such head", expected=f"0 to {heads - 1}", found=list(wanted), where="signals.attention.heads")
