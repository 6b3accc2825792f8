"""What a plan has seen of each source: what is counted, what is skipped, and whether anything can be learned from it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from signal_store.errors import InputError
from signal_store.manifest import ChatCounts, SourceIdentity, TaggerIdentity
from teacher_cache.corpus.document import Document as Text
from teacher_cache.corpus.roles import Tagger, no_words
from teacher_cache.corpus.rows import Row
from teacher_cache.corpus.segments import COUNTS, COUNTS_NOT, PlannedSegment
from teacher_cache.corpus.sources import Skips, SourceReader
from teacher_cache.recipe import Source


@dataclass(slots=True)
class SourceStats:
    """What was seen of one source so far. `rows` are those to be read, at most `limit` documents of them; after these, rows to skip
    until there were `known_skips`."""

    source: Source
    number: int
    rows: Iterator[Row]
    limit: int | None = None
    known_skips: int = 0
    skips: Skips = field(default_factory=Skips)
    first_document: int = 0
    hash: Any = field(default_factory=hashlib.sha256)
    num_documents: int = 0
    num_empty_documents: int = 0
    num_segments: int = 0
    num_tokens: int = 0
    num_unfit_documents: int = 0
    num_labels: int = 0
    counts: bool = False
    """Whether any of its rows counts in a loss."""
    tagger: TaggerIdentity | None = None
    words: Tagger = no_words
    chats: ChatCounts | None = None
    special_tokens_as_text: int = 0

    @classmethod
    def of(
        cls, reader: SourceReader, number: int, *, after: Sequence[SourceIdentity] = (), until: SourceIdentity | None = None
    ) -> "SourceStats":
        """Of what a reader has left `after` the documents of earlier plans, all or as many as it was once (`until`)."""
        before = sum(identity.num_documents for identity in after)
        most = reader.source.max_documents
        limits = [] if most is None else [max(0, most - before)]
        limits += [] if until is None else [until.num_documents]
        return cls(
            source=reader.source,
            number=number,
            rows=reader.rows(),
            limit=min(limits, default=None),
            known_skips=0 if until is None else until.num_skipped_rows,
            skips=reader.skips,
            first_document=before,
        )

    @property
    def has_its_documents(self) -> bool:
        """Whether no more documents are wanted."""
        return self.limit is not None and self.num_documents >= self.limit

    @property
    def is_full(self) -> bool:
        """Whether nothing more is wanted."""
        return self.has_its_documents and self.skips.count >= self.known_skips

    def see(self, text: Text) -> None:
        """Count one text."""
        self.num_documents += 1
        self.special_tokens_as_text += len(text.spelled)
        if text.chat is not None:
            self.chats = text.chat.counted(self.chats or ChatCounts())
        self.hash.update(len(text.text).to_bytes(8, "little") + text.text.encode())

    def see_segment(self, segment: PlannedSegment) -> None:
        """Count one segment."""
        self.num_segments += 1
        self.num_tokens += len(segment) - segment.context_only
        self.num_labels += int((segment.loss_mask == COUNTS).sum())
        self.counts = self.counts or bool((segment.loss_mask != COUNTS_NOT).any())

    @property
    def fingerprint(self) -> str:
        """Of all texts."""
        return "sha256:" + str(self.hash.hexdigest())

    def identity(self) -> SourceIdentity:
        """What the manifest says of it."""
        return SourceIdentity(
            name=self.source.name,
            split=self.source.split,
            fingerprint=self.fingerprint,
            num_documents=self.num_documents,
            num_empty_documents=self.num_empty_documents,
            num_segments=self.num_segments,
            num_tokens=self.num_tokens,
            tagger=self.tagger,
            task=self.source.task,
            chats=self.chats,
            special_tokens_as_text=self.special_tokens_as_text,
            num_unfit_documents=self.num_unfit_documents,
            num_skipped_rows=self.skips.count,
            skipped_rows=tuple(self.skips.listed),
        )


def tell_skips(stats: SourceStats, console: Console) -> None:
    """On the terminal, the rows that were left out of a source."""
    skips, count = stats.skips, stats.skips.count + stats.num_unfit_documents
    if count:
        shown = f", the first {len(skips.lines)} of them" if count > len(skips.lines) else ""
        said = [f"{skips.count:,} rows skipped"] if skips.count else []
        said += [f"{stats.num_unfit_documents:,} texts left out that do not fit"] if stats.num_unfit_documents else []
        lines = [f"source {stats.source.name}: {', '.join(said)}{shown}:", *(f"  {line}" for line in skips.lines)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def refuse_useless(all_stats: Sequence[SourceStats]) -> None:
    """InputError for a source that nothing can be learned from, or validated on."""
    for stats in all_stats:
        where = f"source {stats.source.name}"
        if not stats.num_tokens:
            skipped = f", {stats.skips.count} rows skipped ({stats.skips.lines[0]})" if stats.skips.count else ""
            raise InputError(
                "a source has no text",
                expected="at least one document that is not empty",
                found=f"{stats.num_documents} documents, {stats.num_empty_documents} empty{skipped}",
                where=where,
            )
        if not (stats.num_labels if stats.source.split == "validation" else stats.counts):
            raise InputError(
                "a source has no token to predict",
                expected="texts of two tokens or more, some of which count",
                found=f"{stats.num_tokens} tokens in {stats.num_segments} segments, none with a next token that counts",
                where=where,
            )
