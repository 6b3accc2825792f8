"""The tokenizer of a recipe, whether it is the planned one, and its files as the cache keeps them."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer, tokenizer_digest
from signal_store.errors import MismatchError
from signal_store.io.objects import Objects
from signal_store.ledger.documents import tokenizer_key
from teacher_cache.recipe import TeacherSection


def load_recipe_tokenizer(teacher: TeacherSection) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, or the teacher's own."""
    return load_tokenizer(
        teacher.tokenizer or teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
    )


def load_plan_tokenizer(teacher: TeacherSection, expected: str, where: str) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; MismatchError where it is not the one that the cache at `where` was planned with."""
    tokenizer = load_recipe_tokenizer(teacher)
    found = tokenizer_digest(tokenizer)
    if found != expected:
        raise MismatchError(
            "the cache was planned with another tokenizer",
            expected=expected,
            found=f"{found} ({teacher.tokenizer or teacher.model})",
            where=where,
            remedy="Restore the tokenizer, or build into another folder.",
        )
    return tokenizer


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """What `save_pretrained` writes, by name. Whether this machine was offline is among what it remembers, no part of a plan."""
    if "local_files_only" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["local_files_only"] = False
    with tempfile.TemporaryDirectory() as folder:
        several = isinstance(tokenizer.chat_template, dict)  # as files of their own they would lie in a folder
        tokenizer.save_pretrained(folder, save_jinja_files=not several)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def kept_tokenizer_files(objects: Objects, tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """The tokenizer's files as the cache keeps them: who comes first writes them, whoever's plan is taken names those."""
    kept = {}
    for name, data in tokenizer_files(tokenizer).items():
        objects.create(tokenizer_key(name), data)
        kept[name] = objects.read(tokenizer_key(name))
    return kept
