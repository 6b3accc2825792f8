"""What a recipe asks of its teacher, against what the teacher's config alone says: refused before a text is read, or a weight.

Whether a device or a kernel is there is a machine's own matter: a plan may be made where the teacher will never run. A worker that
goes on to calibrate looks for its device first.
"""

import torch

from model_taps.attention_interface import refuse_unknown_kernel
from model_taps.blocks import refuse_no_blocks
from model_taps.loading import load_config
from signal_store.errors import InputError
from teacher_cache.recipe import CacheRecipe, TeacherSection
from teacher_cache.signals.registry import extractors_of

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
    for extractor in extractors_of(recipe.signals, recipe.context):
        extractor.refuse_beyond(text)


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
