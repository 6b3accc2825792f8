"""Which terms a student can have whose tokenizer is not its teacher's, and what compares it across the two vocabularies."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from signal_store.cache import Cache
from signal_store.codecs.cached import distribution_codec
from signal_store.errors import MismatchError
from student_train.align.aligned_cache import AlignedCache
from student_train.align.sections import AlignSection
from student_train.data.aligned_rows import AlignedRows
from student_train.data.request import SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.stream import Stream
from student_train.losses import registry
from student_train.losses.across import AcrossDivergence
from student_train.losses.section import Losses
from student_train.losses.term import AcrossTerm, LogitsTerm, StateLoss

MASS_ROWS = 256
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


@torch.no_grad()
def common_mass(cache: AlignedCache) -> float | None:
    """The teacher's mean mass, at T = 1 or the lowest cached temperature, on tokens that the student has too, over the first rows
    of the train split that know the same text; None without a whole distribution."""
    signal = cache.manifest.signals.distribution
    if signal is None or not cache.manifest.calibration.tail_rank:
        return None
    request = SignalRequest.of(DistributionRequest())
    config = StreamSection(sequence_length=cache.view.longest, global_batch_rows=1)
    temperature, outcomes = min(signal.temperatures), cache.vocabularies.common()
    shared_V = torch.from_numpy(outcomes.teacher < outcomes.common)
    for batch in Stream(cache, request, config, packed=False).once("train", request):
        codes, rows = DistributionPart.codes_of(batch), batch.part(AlignedRows)
        if codes is not None and rows is not None and rows.same_text.any():
            known_NV = distribution_codec(cache).logprobs(codes[rows.same_text][:MASS_ROWS], temperature).exp()
            return float(known_NV[:, shared_V].sum(1).mean())
    return None


def alignment_of(divergences: Mapping[str, AcrossDivergence], cache: Cache) -> dict[str, Any]:
    """How the student's rows stand to the teacher's, for people; empty where the tokens are the same."""
    if not isinstance(cache, AlignedCache):
        return {}
    rows = cache.view.rows
    shares = {name: rows[name] / max(1, rows["counted"]) for name in ("one_to_one", "same_text", "within")}
    mass = common_mass(cache)
    masses = {} if mass is None else {"teacher_mass_on_common_tokens": mass, "teacher_mass_on_the_rest": 1 - mass}
    told = {"units": f"{len(cache.view.units)} of {cache.seal.num_units}", "rows": rows["counted"]}
    told |= {name: rows[name] for name in ("untold_segments", "refused_segments") if rows[name]}
    return {**told, **shares, **masses, "of_terms": shares_of(divergences, cache)}


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


def _aligns(term: StateLoss) -> bool:
    """Whether all that it reads is of tokens that end together."""
    return all(request.aligns for request in term.reads.cache)


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
    aligning = (name for name, term in registry.state_terms().items() if term.across)
    refused += sorted({*states} - {name for name in aligning if name in states and _aligns(states[name])})
    refused += [name for name in ("importance", "gate") if getattr(losses, name) is not None]
    if refused:
        raise MismatchError(
            f"{refused[0]} compares token by token, and the student's tokens are others",
            expected="terms that can be had across tokenizers",
            found=", ".join(refused),
            where=f"losses.{refused[0]}",
            remedy=INSTEAD,
        )
