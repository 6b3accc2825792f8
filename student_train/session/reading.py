"""The cache as a recipe's student reads it: as it is, or through a view in the student's own tokens, made if it is not there."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from run_kit.progress import tell
from signal_store.cache import Cache
from signal_store.errors import IncompleteError
from signal_store.io.objects import objects_at
from student_train.align.aligned_cache import AlignedCache
from student_train.align.tokenizers import cached_tokenizer
from student_train.align.view import UNITS, VIEW, View
from student_train.align.view_maker import make_view
from student_train.recipe import RunRecipe
from student_train.student.build import own_tokenizer

FOLDER = "view"
"""Of a run, where no other place is given."""
POLL_SECONDS, PATIENCE_SECONDS = 1.0, 600.0
"""A waiter that has seen nothing come for so long gives up."""
SAMPLED_UNITS = 4


def reading_cache(recipe: RunRecipe, cache: Cache) -> Cache:
    """For a run: the view is made by its first process; the others wait. `student-train align` makes it in several."""
    tokenizer = _another_tokenizer(recipe, cache)
    if tokenizer is None:
        return cache
    uri = view_uri(recipe)
    if int(os.environ.get("RANK", "0")) > 0:
        _wait(uri)
    elif not objects_at(uri).exists(VIEW):
        tell(f"the student's tokenizer is another than the teacher's: the texts are told again in its tokens, in {uri}")
        make_view(cache, tokenizer, uri)
    return AlignedCache(cache.parts, View.open(uri).of_tokenizer(tokenizer))


def finished_cache(recipe: RunRecipe, cache: Cache) -> Cache:
    """For what a run has done: NotFoundError where it read through a view that is not there any more."""
    tokenizer = _another_tokenizer(recipe, cache)
    return cache if tokenizer is None else AlignedCache(cache.parts, View.open(view_uri(recipe)).of_tokenizer(tokenizer))


@contextlib.contextmanager
def looked_at_cache(recipe: RunRecipe, cache: Cache) -> Iterator[Cache]:
    """For looking at a recipe: where the view is not there, one of the first units stands in its place, and nothing is kept."""
    tokenizer = _another_tokenizer(recipe, cache)
    if tokenizer is None or objects_at(view_uri(recipe)).exists(VIEW):
        yield finished_cache(recipe, cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        view = make_view(cache, tokenizer, folder, first_units=SAMPLED_UNITS)
        yield AlignedCache(cache.parts, view.of_tokenizer(tokenizer))


def view_uri(recipe: RunRecipe) -> str:
    """Where the view of a run is."""
    return str(Path(recipe.out) / FOLDER) if recipe.align is None or recipe.align.view is None else recipe.align.view


def _another_tokenizer(recipe: RunRecipe, cache: Cache) -> PreTrainedTokenizerFast | None:
    """The student's, where the cache must be read in its tokens."""
    own = own_tokenizer(recipe.student)
    tokenizer = cached_tokenizer(cache) if own is None else load_tokenizer(own)
    same = tokenizer_digest(tokenizer) == cache.manifest.tokenizer.digest
    return None if same and recipe.align is None else tokenizer


def _wait(uri: str) -> None:
    objects, waited, units = objects_at(uri), 0.0, 0
    while not objects.exists(VIEW):
        if waited >= PATIENCE_SECONDS:
            raise IncompleteError("another process has not finished the view", where=uri, remedy="Run student-train align.")
        time.sleep(POLL_SECONDS)
        there = len(objects.list(UNITS))
        waited, units = (0.0, there) if there > units else (waited + POLL_SECONDS, units)
