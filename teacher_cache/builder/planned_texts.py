"""The texts of sources that a plan holds, found again where they lie now; and those that no plan holds yet.

Policy: what was planned is read again and compared by its fingerprint before anything that comes after it is taken.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from signal_store.errors import MismatchError
from signal_store.manifest import SourceIdentity
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.source_stats import SourceStats
from teacher_cache.builder.tokenizer import load_recipe_tokenizer
from teacher_cache.corpus.sources import SourceReader
from teacher_cache.recipe import LOCAL_PLACES, Source, TeacherSection


def places_of(sources: Sequence[Source]) -> dict[str, str]:
    """By source, where it lies on this machine, if it does."""
    places = {source.name: [getattr(source, name) for name in LOCAL_PLACES] for source in sources}
    return {name: _place(next(p for p in found if p is not None)) for name, found in places.items() if any(found)}


def _place(found: Path | Sequence[Path]) -> str:
    return str(found) if isinstance(found, Path) else ", ".join(map(str, found))


def refuse_moved_text(sources: Sequence[Source], planned: Plan, teacher: TeacherSection, where: str) -> None:
    """Read a source again that lies elsewhere than when it was planned; MismatchError if its text is another."""
    then = planned.document.about.get("places", {})
    moved = {name for name, place in places_of(sources).items() if name in then and then[name] != place}
    if moved:
        tokenizer = load_recipe_tokenizer(teacher)
        for source in sources:
            if source.name in moved:
                texts_after(source, planned.at_generation(0).identities_of(source.name), tokenizer, where)


def texts_after(
    source: Source, identities: Sequence[SourceIdentity], tokenizer: PreTrainedTokenizerFast, where: str
) -> SourceReader:
    """A reader of a source that has taken the documents that were planned; MismatchError if those are not what they were."""
    reader = SourceReader(source, tokenizer, known_skips=sum(identity.num_skipped_rows for identity in identities))
    for identity in identities:
        old = SourceStats(source, 0, reader.rows())
        for text in islice(reader.documents(), identity.num_documents):
            old.see(text)
        if old.fingerprint != identity.fingerprint:
            raise MismatchError(
                f"documents of the source {source.name} are not what they were",
                expected=identity.fingerprint,
                found=old.fingerprint,
                where=where,
                remedy="Give new documents a source of their own, or put them at the end.",
            )
    return reader


def new_texts(sources: Sequence[Source], planned: Plan, tokenizer: PreTrainedTokenizerFast, where: str) -> Iterator[SourceStats]:
    """The sources with documents that no plan holds yet; MismatchError where planned ones are not what they were."""
    number = len(planned.sources)
    for source in sources:
        old = planned.identities_of(source.name)
        reader = texts_after(source, old, tokenizer, where)
        stats = SourceStats.of(reader, number, after=old)
        if not stats.is_full and (not old or reader.has_more()):  # of a new source, nothing is read before all is checked
            yield stats
            number += 1


def same_texts(
    sources: Sequence[Source],
    planned: Plan,
    identities: Sequence[SourceIdentity],
    tokenizer: PreTrainedTokenizerFast,
    where: str,
) -> list[SourceStats]:
    """The sources of an extension that follows `planned`, each reading exactly its own documents (`identities`)."""
    by_name = {source.name: source for source in sources}
    all_stats: list[SourceStats] = []
    for identity in identities:
        if identity.name not in by_name:
            raise MismatchError("the recipe lacks a source of the cache", expected=identity.name, found=", ".join(by_name))
        old = planned.identities_of(identity.name)
        reader = texts_after(by_name[identity.name], old, tokenizer, where)
        all_stats.append(SourceStats.of(reader, len(planned.sources) + len(all_stats), after=old, until=identity))
    return all_stats
