"""Each term teaches what it is for: trained with it, a student comes nearer to its teacher on held-out text than without it, and than
with signals of other segments.

Student and teacher are tiny and of random weights; what is planted is the teacher's own states, which the student's labels say
nothing about. Random teachers attend to nothing in particular, so the attention is planted: every token draws it by a strength of its
own. Nearness is the term itself on the validation split.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from signal_store.cache import Cache
from signal_store.codecs.attention import encode_attention
from student_train.data.batch import CodedBatch
from student_train.data.codecs import Codecs
from student_train.data.part import Part
from student_train.data.sections import StreamSection
from student_train.data.signals.attention import AttentionCodes, AttentionPart
from student_train.data.signals.coverage import CoveragePart
from student_train.data.signals.evidence import EvidencePart
from student_train.data.signals.hidden import HiddenCodes, HiddenPart
from student_train.data.signals.replay import ReplayPart
from student_train.data.signals.stats import StatsPart
from student_train.data.stream import Stream
from student_train.losses.objective import Objective, resolve
from student_train.losses.section import Losses
from student_train.model.distiller import Distiller
from tests.tiny import CONTEXT, make_model

STEPS = 40
TERMS = {
    "lhsm": 0.8,
    "apc": 0.8,
    "attention_direction": 0.8,
    "normalised_direction": 0.8,
    "activation_mmd": 0.8,
    "input_reconstruction": 0.9,
    "residual_cka": 0.9,
    "attention_statistics": 0.8,
    "smoothness": 0.8,
    "attention_evolution": 0.9,
    "replay": 0.95,
    "evidence": 0.9,
    "coverage": 0.9,
}
"""By term, how much of the untaught student's distance may be left."""


def shuffled(batch: CodedBatch) -> CodedBatch:
    """The teacher's signals of other segments: everything moved along by half the batch."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.roll(len(tensor) // 2, 0)

    def parts() -> Iterator[Part]:
        for part in batch.signals.values():
            match part:
                case HiddenPart(states=states):
                    yield replace(part, states={at: HiddenCodes(moved(c.values), moved(c.scale)) for at, c in states.items()})
                case AttentionPart(layers=layers):
                    yield replace(part, layers={n: AttentionCodes(moved(c.weights), None, None) for n, c in layers.items()})
                case StatsPart(attention=attention):
                    yield replace(part, attention={n: moved(values) for n, values in attention.items()})
                case ReplayPart():
                    yield replace(part, values=moved(part.values), scale=moved(part.scale), nll=moved(part.nll))
                case EvidencePart(shares=shares):
                    yield replace(part, shares={n: moved(values) for n, values in shares.items()})
                case CoveragePart():
                    yield replace(part, probability=moved(part.probability))

    return batch.with_parts(*parts())


STRENGTH = 3 * torch.rand(10_000, generator=torch.Generator().manual_seed(5))


def drawn(batch: CodedBatch) -> CodedBatch:
    """What a teacher would give to whom each token, by its id, is so and so strong: attention goes to the strong ones, and a summary
    says them."""
    batch = drawn_attention(batch)
    evidence, coverage = batch.part(EvidencePart), batch.part(CoveragePart)
    if evidence is not None and len(evidence.segment):
        starts = [int(((batch.position_ids == 0) & batch.real).flatten().nonzero()[s]) for s in evidence.segment.tolist()]
        ids = batch.input_ids.flatten()
        pairs = zip(starts, evidence.ranges.tolist(), strict=True)
        mass = torch.stack([STRENGTH[ids[at + first : at + last]].exp().sum() for at, (first, last) in pairs])
        whole = torch.zeros(len(batch.segments)).index_add(0, evidence.segment, mass)
        shares = (mass / whole[evidence.segment]).half()
        batch = batch.with_parts(replace(evidence, shares=dict.fromkeys(evidence.shares, shares)))
    if coverage is not None:
        batch = batch.with_parts(replace(coverage, probability=(STRENGTH[coverage.token] / 3).half()))
    return batch


def drawn_attention(batch: CodedBatch) -> CodedBatch:
    """Rows of attention that go to each token by its own strength, the same for all text."""
    part = batch.part(AttentionPart)
    if part is None or not len(part.batch):
        return batch
    places = zip(part.batch, part.first, part.query, strict=True)
    rows = [STRENGTH[batch.input_ids[b, first : query + 1]].softmax(0) for b, first, query in places]
    weights = encode_attention(torch.cat(rows))[:, None]
    layers = {
        layer: AttentionCodes(weights.expand(-1, codes.weights.shape[1]).contiguous(), None, None)
        for layer, codes in part.layers.items()
    }
    return batch.with_parts(replace(part, layers=layers))


def prepared(cache: Cache, name: str) -> tuple[Distiller, Objective, Stream]:
    torch.manual_seed(0)
    student = make_model("qwen3", cache.manifest.tokenizer.vocab_size, seed=11)
    objective = resolve(Losses.of({name: {}}), cache, student)
    distiller = Distiller(student, objective)
    distiller.codecs = Codecs.of(cache, objective.needs, torch.device("cpu"))
    return (
        distiller,
        objective,
        Stream(cache, objective.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=16), packed=True),
    )


@torch.no_grad()
def distance(distiller: Distiller, objective: Objective, held_out: list[CodedBatch], name: str) -> float:
    """The term's mean on the validation split."""
    total = count = 0.0
    for batch in held_out:
        with torch.enable_grad():  # replay walks up a gradient
            _, sums = distiller(batch, {name: 1.0}, 1.0)
        distiller.close_taps()
        total, count = total + float(sums[name]), count + objective.counts(batch)[name]
    return total / count


def taught(cache: Cache, name: str, how: str) -> float:
    """The distance after training, with the term (`taught`), with others' signals (`shuffled`), or only what the term itself owns
    (`untaught`): its projection learns, the student does not."""
    distiller, objective, stream = prepared(cache, name)
    held_out = [drawn(batch) for batch in stream.once("validation", objective.needs)]
    parameters: list[nn.Parameter] = list(distiller.terms.parameters())
    if how != "untaught":
        parameters += list(distiller.student.parameters())
    batches = stream.micro_batches({}, 0)
    optimizer = torch.optim.AdamW(parameters, lr=5e-3) if parameters else None
    for _ in range(STEPS):
        batch = drawn(next(batches))
        if objective.matched_layers and not distiller.head_pairs:
            distiller.choose_heads(batch)
        if how == "shuffled":
            batch = shuffled(batch)
        total, _ = distiller(batch, {name: 1 / max(1.0, objective.counts(batch)[name])}, 1.0)
        distiller.zero_grad()
        total.backward()
        distiller.close_taps()
        if optimizer is not None:
            optimizer.step()
    return distance(distiller, objective, held_out, name)


@pytest.mark.parametrize("name", list(TERMS))
def test_a_term_teaches_what_was_planted_and_shuffled_signals_do_not(knowing_cache: Cache, name: str) -> None:
    found = {how: taught(knowing_cache, name, how) for how in ("untaught", "taught", "shuffled")}
    assert found["taught"] < TERMS[name] * found["untaught"], found
    assert found["taught"] < found["shuffled"], found
