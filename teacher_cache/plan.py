"""plan: texts to tokens, segments and units. A pure function of recipe and data; the first to commit wins."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_config, load_tokenizer, tokenizer_digest
from signal_store.canonical import digest, sha256
from signal_store.errors import InputError, MismatchError
from signal_store.ledger import PLAN, Document, attempt_folder, commit, find_document, plan_unit_key
from signal_store.manifest import Capacities, SourceIdentity, Split
from signal_store.objects import LocalObjects, Objects
from signal_store.progress import progress_bar
from teacher_cache.corpus.segments import PlannedSegment, cut
from teacher_cache.corpus.sources import documents
from teacher_cache.corpus.tokens import tokenize
from teacher_cache.recipe import CacheRecipe, Source
from teacher_cache.unit_plan import UnitPlan

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class Plan:
    """A committed plan."""

    document: Document

    @property
    def digest(self) -> str:
        """Identity of the plan."""
        return self.document.digest

    @property
    def num_units(self) -> int:
        """How many units there are to fill."""
        return len(self.document.body["units"])

    @property
    def sources(self) -> tuple[SourceIdentity, ...]:
        """What was read."""
        return tuple(SourceIdentity.model_validate(s) for s in self.document.body["sources"])

    @property
    def capacities(self) -> Capacities:
        """Rows each unit has room for."""
        return Capacities.model_validate(self.document.body["capacities"])

    def unit(self, objects: Objects, unit: int) -> UnitPlan:
        """The plan of one unit."""
        content = self.document.body["units"][unit]["digest"]
        key = plan_unit_key(unit, content)
        return UnitPlan.from_bytes(objects.read(key), content, key)

    def split(self, unit: int) -> Split:
        """The side a unit belongs to; a unit holds one only."""
        split: Split = self.document.body["units"][unit]["split"]
        return split


def plan(recipe: CacheRecipe) -> Plan:
    """Make the plan, or take the one that stands; MismatchError if that was made by another recipe."""
    objects = LocalObjects(recipe.cache)
    standing = find_document(objects, PLAN)
    if standing is None:
        standing = _make(recipe, objects)
    refuse_another_recipe("planned", standing.body["recipe"], planned_part(recipe), recipe)
    return Plan(standing)


def planned_part(recipe: CacheRecipe) -> dict[str, Any]:
    """What of the recipe decides the plan, as JSON."""
    keep = {"sources", "context", "overlap", "append_eos"}
    part: dict[str, Any] = recipe.model_dump(mode="json", include=keep)
    hidden, attention = recipe.signals.hidden, recipe.signals.attention
    return {
        **part,
        "unit_tokens": recipe.resolved_unit_tokens,
        "keywords": list(attention.keywords) if attention else [],
        "max_columns": recipe.resolved_max_columns,
        "hidden_every": hidden.every if hidden else 1,
    }


def refuse_another_recipe(done: str, made: dict[str, Any], wanted: dict[str, Any], recipe: CacheRecipe) -> None:
    """MismatchError naming the parts of the recipe that differ from what the cache was `done` (planned, calibrated) by."""
    changed = sorted(key for key in made.keys() | wanted.keys() if made.get(key) != wanted.get(key))
    if changed:
        raise MismatchError(
            f"the cache was {done} by another recipe ({', '.join(changed)} differ)",
            expected={key: made.get(key) for key in changed},
            found={key: wanted.get(key) for key in changed},
            where=recipe.cache,
            remedy="Restore the recipe, or build into another folder.",
        )


@dataclass(slots=True)
class _Tally:
    """What was seen of one source so far."""

    source: Source
    hash: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_empty_documents: int = 0
    num_segments: int = 0
    num_tokens: int = 0

    def identity(self) -> SourceIdentity:
        return SourceIdentity(
            name=self.source.name,
            split=self.source.split,
            fingerprint="sha256:" + self.hash.hexdigest(),
            num_documents=self.num_documents,
            num_empty_documents=self.num_empty_documents,
            num_segments=self.num_segments,
            num_tokens=self.num_tokens,
        )


def _make(recipe: CacheRecipe, objects: Objects) -> Document:
    tokenizer = load_tokenizer(
        recipe.teacher.tokenizer or recipe.teacher.model,
        revision=recipe.teacher.revision,
        trust_remote_code=recipe.teacher.trust_remote_code,
    )
    _check_context(recipe)
    every = recipe.signals.hidden.every if recipe.signals.hidden else 1
    max_columns = recipe.resolved_max_columns
    tallies = [_Tally(source) for source in recipe.sources]
    units: list[dict[str, Any]] = []
    maxima = {"segments": 1, "hidden_rows": 1, "attention_rows": 1, "attention_entries": 1}
    with attempt_folder(objects, "plan") as (attempt, prefix), progress_bar() as progress:
        bar = progress.add_task("plan", total=None, unit="tokens")
        for split in SPLITS:
            for unit_plan in _units(recipe, tokenizer, tallies, split):
                data = unit_plan.to_bytes()
                objects.put(f"{prefix}/{len(units):07d}", data)
                units.append(
                    {"digest": sha256(data), "split": split, "segments": len(unit_plan.length), "tokens": unit_plan.num_tokens}
                )
                lengths = unit_plan.attention_lengths(max_columns)
                rows = {"segments": len(unit_plan.length), "hidden_rows": len(unit_plan.hidden_positions(every))}
                rows |= {"attention_rows": len(lengths), "attention_entries": int(lengths.sum())}
                maxima = {name: max(maxima[name], rows[name]) for name in maxima}
                progress.advance(bar, unit_plan.num_tokens)
        for tally in tallies:
            if not tally.num_tokens:
                raise InputError(
                    "a source has no text",
                    expected="at least one document that is not empty",
                    found=f"{tally.num_documents} documents, {tally.num_empty_documents} empty",
                    where=f"source {tally.source.name}",
                )
        if recipe.signals.attention is not None and maxima["attention_entries"] == 1:
            raise InputError(
                "no keyword was found for the attention signal",
                expected="a source with a lexer, and its keywords in the text",
                found="none",
                remedy="Give sources a lexer, or leave signals.attention out.",
            )
        body = {
            "recipe": planned_part(recipe),
            "tokenizer": {"digest": tokenizer_digest(tokenizer), "vocab_size": len(tokenizer)},
            "sources": [tally.identity().model_dump(mode="json") for tally in tallies],
            "capacities": maxima,
            "units": units,
        }
        for name, data in _tokenizer_files(tokenizer).items():
            objects.put(f"{prefix}/tokenizer/{name}", data)
        _publish(objects, prefix, [unit["digest"] for unit in units])
    document, _ = commit(objects, PLAN, body, attempt)
    objects.delete_tree(prefix)
    if digest(document.body) != digest(body):
        raise MismatchError("another worker planned other text", expected=digest(body), found=document.digest, where=PLAN)
    return document


def _publish(objects: Objects, prefix: str, digests: Sequence[str]) -> None:
    """Move the unit plans to their keys, which name their content: another planner moves the same bytes or other keys."""
    for key in objects.list(f"{prefix}/tokenizer"):
        objects.publish(key, "ledger/tokenizer/" + key.rsplit("/", 1)[1])
    for unit, content in enumerate(digests):
        objects.publish(f"{prefix}/{unit:07d}", plan_unit_key(unit, content))


def _tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _check_context(recipe: CacheRecipe) -> None:
    config = load_config(
        recipe.teacher.model, what="teacher", revision=recipe.teacher.revision, trust_remote_code=recipe.teacher.trust_remote_code
    ).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.context > longest:
        raise InputError(
            "the context is longer than the teacher's",
            expected=f"at most {longest}",
            found=recipe.context,
            where="context",
            remedy="Lower context.",
        )


def _units(recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tallies: list[_Tally], split: Split) -> Iterator[UnitPlan]:
    """Units of one split: whole segments, in order, until the next would not fit."""
    pending: list[PlannedSegment] = []
    room = recipe.resolved_unit_tokens
    for number, tally in enumerate(tallies):
        if tally.source.split != split:
            continue
        for segment in _segments(recipe, tokenizer, tally, number):
            if len(segment) > room:
                yield UnitPlan.of(pending)
                pending, room = [], recipe.resolved_unit_tokens
            pending.append(segment)
            room -= len(segment)
    if pending:
        yield UnitPlan.of(pending)


def _segments(recipe: CacheRecipe, tokenizer: PreTrainedTokenizerFast, tally: _Tally, number: int) -> Iterator[PlannedSegment]:
    keywords = frozenset(recipe.signals.attention.keywords) if recipe.signals.attention else frozenset()

    numbers: list[int] = []

    def read() -> Iterator[Any]:
        for document in documents(tally.source, tokenizer):
            tally.num_documents += 1
            tally.hash.update(len(document.text).to_bytes(8, "little") + document.text.encode())
            if document.text:
                numbers.append(tally.num_documents - 1)
                yield document
            else:
                tally.num_empty_documents += 1

    tokenized = tokenize(read(), tokenizer, append_eos=recipe.append_eos, keywords=keywords)
    for index, document in enumerate(tokenized):
        tally.num_empty_documents += not len(document.input_ids)  # a normaliser may leave nothing
        for segment in cut(document, recipe.context, recipe.overlap, number, numbers[index]):
            tally.num_segments += 1
            tally.num_tokens += len(segment) - segment.context_only
            yield segment
