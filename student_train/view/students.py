"""Students to look at, by the folder of their run: as they began, and as they ended."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.head import final_hidden, output_head
from signal_store.cache import Cache
from signal_store.errors import CorruptError, MismatchError, NotFoundError
from signal_view import CacheView, SegmentView, open_cache
from student_train.recipe import RunRecipe
from student_train.session.reading import finished_cache
from student_train.student.build import build_student
from student_train.student.sections import StudentSection
from student_train.train.metrics import read_json

ABOUT, RESULT = "run.json", "result.json"


def about_run(run: Path | str) -> dict[str, Any]:
    """What a run says of itself; NotFoundError where there is none."""
    path = Path(run) / ABOUT
    if not path.is_file():
        raise NotFoundError("no run here", expected=ABOUT, where=run)
    return read_json(path)


def recipe_of(run: Path | str) -> RunRecipe:
    """The recipe that a run began with; MismatchError where this version does not know it."""
    content = about_run(run).get("recipe")
    try:
        return RunRecipe.model_validate(content)
    except ValueError as error:
        said = " ".join(str(error).split())[:200]
        raise MismatchError("the run's recipe is another version's", found=said, where=Path(run) / ABOUT) from error


def cache_of(run: Path | str) -> CacheView:
    """The cache that a run learned from, as it was then; MismatchError where another one is in its place."""
    about, recipe = about_run(run), recipe_of(run)
    generation = about.get("generation")
    if not isinstance(generation, int):
        raise CorruptError("a run does not say its generation", expected="a number", found=generation, where=Path(run) / ABOUT)
    cache = open_cache(recipe.cache, generation=generation)
    if cache.manifest.cache_id != about.get("cache_id"):
        raise MismatchError(
            "another cache stands where the run's was",
            expected=about.get("cache_id"),
            found=cache.manifest.cache_id,
            where=cache.uri,
        )
    return cache


def student_before(run: Path | str, cache: Cache) -> PreTrainedModel:
    """The student as the run made it."""
    recipe = recipe_of(run)
    student, _ = build_student(recipe.student, finished_cache(recipe, cache))
    return student


def student_after(run: Path | str, cache: Cache) -> PreTrainedModel:
    """The student as the run exported it; NotFoundError where it has not."""
    recipe = recipe_of(run)
    finished, asked = Path(run) / "student", recipe.student
    if not finished.is_dir():
        raise NotFoundError("the run has not exported its student", expected="a finished run", where=finished)
    section = StudentSection(
        checkpoint=str(finished), attn_implementation=asked.attn_implementation, trust_remote_code=asked.trust_remote_code
    )
    student, _ = build_student(section, finished_cache(recipe, cache))
    return student


def before_and_after(run: Path | str, cache: Cache) -> Mapping[str, PreTrainedModel]:
    """Both: "before" and "after"."""
    return {"before": student_before(run, cache), "after": student_after(run, cache)}


@torch.no_grad()
def student_logprobs(student: PreTrainedModel, segment: SegmentView) -> Tensor:
    """float32 [n, V], nats, T = 1, over the cache's vocabulary: row t predicts token t + 1. The student reads its tokens."""
    student.eval()
    device = next(student.parameters()).device
    ids = torch.from_numpy(segment.input_ids.astype("int64"))[None].to(device)
    logits = output_head(student).logits(final_hidden(student, ids, None)[0])
    found: Tensor = logits[:, : segment.cache.manifest.tokenizer.vocab_size].log_softmax(1).cpu()
    return found
