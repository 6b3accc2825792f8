"""Which terms a student can have whose tokenizer is not its teacher's, and what compares it across the two vocabularies."""

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.align.aligned_cache import AlignedCache
from student_train.align.sections import AlignSection
from student_train.losses import registry
from student_train.losses.across import AcrossDivergence
from student_train.losses.section import Losses
from student_train.losses.term import AcrossTerm, LogitsTerm, StateLoss

INSTEAD = "Take a term for another tokenizer: strict, prefix, likelihood, uld."


def across_of(
    losses: Losses, states: Mapping[str, StateLoss], cache: Cache, student: PreTrainedModel, tail_rank: int | None
) -> dict[str, AcrossDivergence]:
    """By name, what compares; MismatchError naming a term that cannot be had, see `check_tokens`."""
    check_tokens(losses, states, cache, tail_rank)
    if not isinstance(cache, AlignedCache):
        return {}
    vocabularies = replace(cache.vocabularies, rows=len(student.get_output_embeddings().weight))
    known = registry.terms()
    wanted = {name: (term, getattr(losses, name)) for name, term in known.items() if isinstance(term, AcrossTerm)}
    return {name: term.divergence(section, vocabularies) for name, (term, section) in wanted.items() if section is not None}


def shares_of(divergences: Mapping[str, AcrossDivergence], cache: Cache) -> dict[str, float]:
    """By name, of which share of the student's rows it says something."""
    if not isinstance(cache, AlignedCache):
        return {}
    rows = cache.view.rows
    return {name: rows[divergence.of_rows] / max(1, rows["counted"]) for name, divergence in divergences.items()}


def refuse_few_rows(divergences: Mapping[str, AcrossDivergence], cache: Cache, align: AlignSection | None) -> None:
    """MismatchError where a term says something of fewer rows than the recipe wants."""
    least = (align or AlignSection()).least_share
    for name, share in shares_of(divergences, cache).items():
        if share < least:
            raise MismatchError(
                f"{name} says something of too few of the student's rows",
                expected=f"at least {least:.0%}",
                found=f"{share:.1%}",
                where=f"losses.{name}",
                remedy="Lower align.least_share, or take prefix, which knows most rows.",
            )


def check_tokens(losses: Losses, states: Mapping[str, StateLoss], cache: Cache, tail_rank: int | None) -> None:
    """MismatchError for a term that compares token by token where the tokens are others, and for one that is for other tokens where
    they are the same, or without the teacher's whole distribution."""
    known = registry.terms()
    for name in losses.divergences:
        across, aligned = isinstance(known[name], AcrossTerm), isinstance(cache, AlignedCache)
        if across and not aligned:
            raise MismatchError(
                f"{name} is for a student with another tokenizer",
                expected="a view of the cache",
                found="the teacher's tokenizer",
                where=f"losses.{name}",
                remedy="Take forward_kl or another divergence; or give align, to compare across all the same.",
            )
        if across and 0 in (cache.manifest.calibration.tail_rank, tail_rank):
            raise MismatchError(
                f"{name} sums over the teacher's whole distribution",
                expected="a cache with a tail",
                found="a head alone",
                where=cache.uri,
                remedy="Build a cache with a tail, or leave tail_rank out.",
            )
    if not isinstance(cache, AlignedCache):
        return
    refused = [name for name in losses.divergences if isinstance(known[name], LogitsTerm)]
    refused += [name for name, term in states.items() if not all(request.aligns for request in term.reads.cache)]
    refused += [name for name in ("importance", "gate") if getattr(losses, name) is not None]
    if refused:
        raise MismatchError(
            f"{refused[0]} compares token by token, and the student's tokens are others",
            expected="terms that can be had across tokenizers",
            found=", ".join(refused),
            where=f"losses.{refused[0]}",
            remedy=INSTEAD,
        )
