"""What the cache says is what the teacher said: signals against a live teacher, losses of teacher = student, packed = padded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model_taps.head import OutputHead, final_hidden, output_head
from model_taps.loading import load_model
from model_taps.slices import tap_states
from signal_store.cache import Cache
from signal_store.codecs.attention import MAX_ERROR, decode_attention
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.data.stream import Stream
from student_train.losses import registry
from student_train.losses.dense import dense_divergence
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.objective import resolve
from student_train.losses.output_head import output_loss
from student_train.losses.section import Losses
from student_train.losses.term import LogitsTerm
from student_train.model.distiller import Distiller
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe
from tests.tiny import CONTEXT, FAMILIES, HEADS, WIDTH, make_model

RecipeMaker = Callable[..., CacheRecipe]

FULL = {"cross_entropy": {}, "forward_kl": {"temperature": 2.0}, "lhsm": {}, "apc": {"weight": 0.5}, "asr": {}}


def live(cache: Cache) -> PreTrainedModel:
    return load_model(cache.manifest.teacher.name, what="teacher", dtype=torch.float32)


@pytest.mark.parametrize("index", [0, 7, -1])
def test_stored_signals_are_the_teachers(exact_cache: Cache, index: int) -> None:
    segment = exact_cache[index]
    model = live(exact_cache)
    ids = torch.from_numpy(segment.input_ids.astype(np.int64))[None]
    model.set_attn_implementation("eager")
    with torch.no_grad(), tap_states(model, [("block_output", n) for n in (1, 2, 3)]) as blocks:
        out = model(ids, output_attentions=True, use_cache=False)
    logp = out.logits[0].log_softmax(-1)
    rows = slice(segment.token_start, segment.token_start + len(segment))
    scalars = exact_cache.read("distribution/scalars", rows.start, rows.stop).astype(np.float32)
    torch.testing.assert_close(torch.from_numpy(scalars[:, 0]), logp.amax(-1), rtol=2e-3, atol=2e-3)
    labels = [*segment.input_ids[1:].tolist(), segment.next_token]
    for t, label in enumerate(labels):
        if label is not None:
            assert abs(scalars[t, 1] - float(logp[t, label])) < 1e-2
    head = torch.from_numpy(exact_cache.read("distribution/head_ids", rows.start, rows.stop).astype(np.int64))
    assert torch.equal(head, logp.topk(8).indices.sort(-1).values)
    for (_, layer), states in blocks.items():
        values = exact_cache.read(f"hidden/block_output/{layer}/values", rows.start, rows.stop)
        scale = exact_cache.read(f"hidden/block_output/{layer}/scale", rows.start, rows.stop)
        spread = exact_cache.read(f"calibration/hidden.block_output.{layer}/spread")
        mean = exact_cache.read(f"calibration/hidden.block_output.{layer}/mean")
        error = np.abs(values * scale[:, None] * spread + mean - states[0].numpy())
        assert (error <= scale[:, None] * spread * 0.51 + 1e-5).all()
    positions = exact_cache.read("attention/rows/position")
    for i in np.flatnonzero((positions >= rows.start) & (positions < rows.stop)):
        t = int(positions[i] - rows.start)
        offset, length = (int(exact_cache.read(f"attention/rows/{n}", int(i), int(i) + 1)[0]) for n in ("offset", "length"))
        assert length == t + 1
        codes = torch.from_numpy(exact_cache.read("attention/4/weights", offset, offset + length))
        found, expected = decode_attention(codes).T, out.attentions[3][0, :, t, : t + 1]
        assert (found - expected).abs().max() <= MAX_ERROR + 1e-5


@pytest.fixture(scope="module")
def whole_head_cache(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> Cache:
    """A sealed cache whose head is the whole vocabulary."""
    signals = {"distribution": {"head": 10_000, "head_bits": 16, "rank": 0}}
    return build(recipe_for(tmp_path_factory.mktemp("head") / "cache.zarr", signals=signals))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("whole_head", [False, True])
def test_full_rank_or_full_head_equals_a_live_teacher(
    exact_cache: Cache, whole_head_cache: Cache, temperature: float, kind: str, whole_head: bool
) -> None:
    cache = whole_head_cache if whole_head else exact_cache
    model = live(cache)
    request = SignalRequest.of(DistributionRequest())
    config = StreamSection(sequence_length=CONTEXT, global_batch_rows=16)
    batch = next(Stream(cache, request, config, packed=True).micro_batches({}, 0))
    student = make_model("llama", len(output_head(model).weight), seed=5)
    codec = Codecs.of(cache, request, torch.device("cpu")).distribution
    with torch.no_grad():
        hidden_T, hidden_S = (
            final_hidden(m, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.flat] for m in (model, student)
        )
        logp = (output_head(model).logits(hidden_T) / temperature).log_softmax(-1)
    weight = output_head(student).weight.detach().clone().requires_grad_()
    part = batch.part(DistributionPart)
    assert part is not None
    targets = OutputTargets(batch.labels, part.codes, codec)
    spec = registry.terms()[kind]
    assert isinstance(spec, LogitsTerm)
    assert spec.divergence is not None
    divergence = spec.divergence(spec.section())
    scale = 1 / len(batch.flat)
    total, _ = output_loss(hidden_S, OutputHead(weight, None, 1.0, None), targets, [OutputTerm(divergence, scale, temperature)])
    total.backward()
    dense = weight.detach().clone().requires_grad_()
    expected = dense_divergence(divergence, logp, hidden_S @ dense.T, temperature).sum() * scale
    expected.backward()
    assert abs(float(total.detach() - expected.detach())) <= 1e-4 * max(1.0, float(expected.detach()))
    assert weight.grad is not None
    assert dense.grad is not None
    cosine = torch.nn.functional.cosine_similarity(weight.grad.flatten().double(), dense.grad.flatten().double(), 0)
    degrees = 0.5 if kind == "total_variation" else 0.1  # its gradient jumps where p = q
    assert float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))) <= degrees


def test_teacher_as_student_has_no_loss_but_the_codecs(exact_cache: Cache) -> None:
    model = live(exact_cache)
    losses = Losses.of(FULL)
    objective = resolve(losses, exact_cache, model)
    distiller = Distiller(model, objective)
    distiller.codecs = Codecs.of(exact_cache, objective.needs, torch.device("cpu"))
    stream = Stream(exact_cache, objective.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=16), packed=True)
    batch = next(stream.micro_batches({}, 0))
    assert distiller.choose_heads(batch)
    assert distiller.head_pairs == {4: [(h, h) for h in range(HEADS)]}
    total, sums = distiller(batch, {name: 1 / max(1, objective.counts(batch)[name]) for name in FULL})
    assert total.requires_grad
    distiller.close_taps()
    means = {name: float(value) / max(1, objective.counts(batch)[name]) for name, value in sums.items()}
    assert 0 <= means["forward_kl"] + 1e-6 <= 1e-4
    assert means["lhsm"] <= 1e-4
    assert means["apc"] <= 2e-3
    assert means["cross_entropy"] > 0.1
    assert means["asr"] > 0


@pytest.mark.parametrize("forward", ["packed", "padded", "one"])
def test_packed_padded_and_alone_give_the_same_signals(
    exact_cache: Cache, recipe_for: object, tmp_path: Path, forward: str
) -> None:
    signals = exact_cache.manifest.signals.model_dump()
    changes = {"forward": "padded", "batch_tokens": CONTEXT} if forward == "one" else {"forward": forward}
    other = build(recipe_for(tmp_path / "other.zarr", signals=signals, **changes))  # type: ignore[operator]
    for spec in exact_cache.manifest.specs:
        a, b = exact_cache.read(spec.path).astype(np.float64), other.read(spec.path).astype(np.float64)
        if spec.path.startswith(("tokens/", "segments/")) or spec.path.endswith(("position", "offset", "length")):
            assert np.array_equal(a, b), spec.path
        else:  # codes may fall on either side of a step
            assert np.nanmax(np.abs(a - b)) <= (
                1 if spec.dtype[0] in "iu" and "ids" not in spec.path else 2e-2 if spec.dtype == "float16" else 1e-3
            ), spec.path


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma", "gemma2", "opt"])
def test_families_build_and_teach(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recipe_for: object) -> None:
    folder = tmp_path / "teacher"
    vocab = len(tokenizer) + 7  # padded rows are no part of the vocabulary
    make_model(family, vocab, scale=4.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teacher = {"model": str(folder), "dtype": "float32", "device": "cpu"}
    signals = {
        "distribution": {"rank": WIDTH, "tail_bits": 16},
        "hidden": {"rank": 8, "positions": {"every": 3}},
        "attention": {"max_columns": 8},
    }
    cache = build(recipe_for(tmp_path / "cache.zarr", teacher=teacher, signals=signals))  # type: ignore[operator]
    assert cache.manifest.plan.forward == ("padded" if family == "opt" else "packed")
    assert cache.manifest.tokenizer.vocab_size == len(tokenizer)
    model = live(cache)
    objective = resolve(Losses.of(FULL), cache, model)
    distiller = Distiller(model, objective)
    distiller.codecs = Codecs.of(cache, objective.needs, torch.device("cpu"))
    packed = family != "opt"
    batch = next(
        Stream(cache, objective.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=16), packed=packed).micro_batches(
            {}, 0
        )
    )
    assert distiller.choose_heads(batch)
    total, sums = distiller(batch, {name: 1 / max(1, objective.counts(batch)[name]) for name in FULL})
    total.backward()
    distiller.close_taps()
    assert (
        float(sums["forward_kl"]) / objective.counts(batch)["forward_kl"] <= 0.1
    )  # 4 log(327/320): the padded rows' mass, which the teacher never gave
    assert all(p.grad is not None for p in distiller.terms.parameters())
    assert FAMILIES[family]


def test_overlap_rows_hold_no_signal(recipe_for: object, tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path / "o.zarr", context=24, overlap=8, signals={"distribution": {"rank": 8}, "hidden": {"positions": {"every": 3}}}
    )  # type: ignore[operator]
    assert isinstance(recipe, CacheRecipe)
    cache = build(recipe)
    later = next(s for s in (cache[i] for i in range(len(cache))) if s.context_only)
    scalars = cache.read("distribution/scalars", later.token_start, later.token_start + len(later))
    assert np.isnan(scalars[: later.context_only]).all()
    assert not np.isnan(scalars[later.context_only :, 0]).any()
    assert (later.loss_mask[: later.context_only] == 0).all()
    request = SignalRequest.of(DistributionRequest(), HiddenRequest((("block_output", 1),)))
    batch = next(Stream(cache, request, StreamSection(sequence_length=32, global_batch_rows=64), packed=True).micro_batches({}, 0))
    distribution, hidden = batch.part(DistributionPart), batch.part(HiddenPart)
    assert distribution is not None
    assert hidden is not None
    assert not torch.isnan(distribution.codes.scalars[:, 0]).any()
    assert (hidden.states["block_output", 1].scale > 0).all()
