"""Which dtype the teacher runs in: settled once for a cache, before the teacher is loaded.

Policy: `auto` is what the cache was calibrated in, an overlay's what its base was made in; where nothing stands yet, what the
checkpoint was trained in if this device computes in it natively, else float32 (`model_taps.native_dtype`). The manifest says
what was taken, the about blocks of calibration and manifest say why.
"""

import contextlib

from model_taps.loading import load_config
from model_taps.native_dtype import ASKED, AUTO, DTYPES, choose_dtype, emulation_warning, trained_dtype
from run_kit.progress import tell
from signal_store.cache import open_cache
from signal_store.errors import CorruptError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import CALIBRATION, MANIFEST, find_document
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.forward import device_of, placed
from teacher_cache.worker import ALONE, Worker


def with_dtype(recipe: CacheRecipe, objects: Objects, worker: Worker = ALONE) -> tuple[CacheRecipe, str]:
    """The recipe with a dtype in the place of `auto`, and why that one."""
    section = recipe.teacher
    if section.dtype != AUTO:
        return recipe, ASKED
    if (standing := _standing(objects)) is not None:
        name, reason = standing, "the cache was calibrated in it"
    elif recipe.base is not None:
        name, reason = open_cache(recipe.base).manifest.teacher.dtype, "the base was made in it"
    else:
        config = load_config(section.model, what="teacher", revision=section.revision, trust_remote_code=section.trust_remote_code)
        chosen = choose_dtype(AUTO, trained_dtype(config), device_of(placed(section, worker)))
        name, reason = chosen.name, chosen.reason
    return recipe.model_copy(update={"teacher": section.model_copy(update={"dtype": name})}), reason


def _standing(objects: Objects) -> str | None:
    """What the cache was calibrated in, None where it was not yet; a damaged document is for others to find."""
    for key in (CALIBRATION, MANIFEST):
        with contextlib.suppress(CorruptError):
            if (document := find_document(objects, key)) is not None:
                return str(document.body["teacher"]["dtype"])
    return None


def tell_of_emulation(recipe: CacheRecipe, reason: str, worker: Worker = ALONE) -> None:
    """A line on standard error where the settled dtype is emulated here. `reason` is why it was taken."""
    device = device_of(placed(recipe.teacher, worker))
    advice = "`auto` takes what is native" if reason == ASKED else f"taken because {reason}"
    if warning := emulation_warning(DTYPES[recipe.teacher.dtype], device, "teacher.dtype", advice):
        tell(warning)
