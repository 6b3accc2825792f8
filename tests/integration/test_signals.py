"""Every signal that a cache can hold is what a live teacher says: states at all taps, attention steps, statistics, replay, draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model_taps.attention import RowQuery, enable_row_capture, tap_attention_rows
from model_taps.attention_statistics import row_statistics
from model_taps.head import OutputHead, final_norm, output_head
from model_taps.loading import load_model
from model_taps.slices import tap_states
from model_taps.taps import tap_names
from signal_store.cache import Cache, open_cache
from signal_store.codecs.distribution import DistributionCodes
from signal_store.errors import MismatchError
from signal_store.format.grid import id_dtype
from signal_store.io.objects import objects_at
from signal_store.ledger.documents import CALIBRATION, read_document
from signal_store.segment import Segment
from signal_store.signals import HEAD_SIZES, QUALITIES, DistributionSignal
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.attention import AttentionPart
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.signals.hidden import HiddenPart
from student_train.data.stream import Stream
from student_train.losses.objective import resolve
from student_train.losses.section import Losses
from teacher_cache.builder.calibrate import manifest_of
from teacher_cache.builder.planning import settled
from teacher_cache.commands.build import build
from teacher_cache.commands.plan import plan
from teacher_cache.signals.distribution import extract_distribution
from teacher_cache.signals.tail.basis import TailFit
from teacher_cache.signals.tail.choice import choose_codec
from tests.tiny import CONTEXT, HEADS, LAYERS, WIDTH, make_model

RecipeMaker = Callable[..., Any]
EVERYTHING: dict[str, Any] = {
    "distribution": {"rank": 24, "samples": 8},
    "hidden": {"taps": list(tap_names()), "layers": [2, 3], "positions": {"stratified": 0.3}, "values": "float16"},
    "attention": {"layers": [2, 4], "heads": [0, 2], "previous_steps": 3},
    "stats": {"gradient": True, "layers": [1, 4]},
    "replay": {"gradient": True, "layers": [1, 3], "steps": 3, "positions_per_segment": 2},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> Cache:
    return build(recipe_for(tmp_path_factory.mktemp("full") / "cache.zarr", signals=EVERYTHING))


@pytest.fixture(scope="module")
def teacher(full: Cache) -> PreTrainedModel:
    model = load_model(full.manifest.teacher.name, what="teacher", dtype=torch.float32)
    enable_row_capture(model)
    return model


def ids_of(segment: Segment) -> torch.Tensor:
    return torch.from_numpy(segment.input_ids.astype(np.int64))[None]


def rows_of(cache: Cache, segment: Segment, signal: str) -> slice:
    unit = segment.token_start // cache.manifest.plan.unit_tokens
    ranges = cache.segment_columns(unit, "row_start", "rows", group=f"{signal}/segments")
    place = segment.index - cache.first_segment(unit)
    return slice(int(ranges["row_start"][place]), int(ranges["row_start"][place] + ranges["rows"][place]))


@pytest.mark.parametrize("index", [0, 5, -2])
def test_states_at_every_tap(full: Cache, teacher: PreTrainedModel, index: int) -> None:
    segment = full[index]
    states = [(tap, layer) for tap in tap_names() for layer in (2, 3)]
    with torch.no_grad(), tap_states(teacher, states) as live:
        teacher(ids_of(segment), use_cache=False)
    rows = rows_of(full, segment, "hidden")
    places = full.read("hidden/rows/position", rows.start, rows.stop) - segment.token_start
    assert len(places) >= round(0.3 * len(segment))
    assert (np.diff(places) > 0).all()
    for (tap, layer), state in live.items():
        group = f"{tap}/{layer}"
        values = full.read(f"hidden/{group}/values", rows.start, rows.stop).astype(np.float32)
        scale = full.read(f"hidden/{group}/scale", rows.start, rows.stop)
        spread, mean = (full.read(f"calibration/hidden.{tap}.{layer}/{name}") for name in ("spread", "mean"))
        found = values * scale[:, None] * spread + mean
        expected = state.detach().reshape(-1, state.shape[-1])[places].numpy()
        assert np.abs(found - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max()), (tap, layer)


def test_the_steps_before_a_keyword_are_stored_and_only_keywords_train(full: Cache, teacher: PreTrainedModel) -> None:
    segment = next(
        s for s in (full[i] for i in range(len(full))) if rows_of(full, s, "attention").stop > rows_of(full, s, "attention").start
    )
    rows = rows_of(full, segment, "attention")
    position = full.read("attention/rows/position", rows.start, rows.stop) - segment.token_start
    keyword = full.read("attention/rows/keyword", rows.start, rows.stop) == 1
    expected = {int(p) - back for p in position[keyword] for back in range(4)}
    assert set(position.tolist()) == {p for p in expected if p >= 0}
    query = RowQuery(
        torch.zeros(len(position), dtype=torch.long), torch.from_numpy(position), torch.zeros(len(position), dtype=torch.long)
    )
    with torch.no_grad(), tap_attention_rows(dict.fromkeys([2, 4], query)) as live:
        teacher(ids_of(segment), use_cache=False)
    offset = full.read("attention/rows/offset", rows.start, rows.stop)
    for layer in (2, 4):
        for i, t in enumerate(position):
            codes = full.read(f"attention/{layer}/weights", int(offset[i]), int(offset[i]) + int(t) + 1)
            found = (codes.astype(np.float32) / 254) ** 2
            assert np.abs(found - live[layer][i, [0, 2], : t + 1].T.numpy()).max() <= 1 / 254 + 1e-5
    model = make_model("llama", full.manifest.tokenizer.vocab_size, seed=3)
    needs = resolve(Losses.of({"apc": {}}), full, model).needs
    batch = next(
        Stream(full, needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=24), packed=True).micro_batches({}, 0)
    )
    own = 0
    for number in batch.segments:
        mine = rows_of(full, full[number], "attention")
        own += int((full.read("attention/rows/keyword", mine.start, mine.stop) == 1).sum())
    part = batch.part(AttentionPart)
    assert part is not None
    assert len(part.query) == own
    assert len(part.layers[2].weights) == sum((part.query - part.first + 1).tolist())


def test_statistics_are_means_over_each_segments_rows(full: Cache, teacher: PreTrainedModel) -> None:
    segment = max((full[i] for i in range(len(full))), key=len)
    unit = segment.token_start // full.manifest.plan.unit_tokens
    row = unit * full.capacity_rows["segments/length"] + segment.index - full.first_segment(unit)
    places = torch.arange(15, len(segment), 16)
    query = RowQuery(torch.zeros_like(places), places, torch.zeros_like(places))
    with (
        torch.no_grad(),
        tap_attention_rows(dict.fromkeys([1, 4], query)) as live,
        tap_states(teacher, [("ffn_activation", 4)]) as states,
    ):
        teacher(ids_of(segment), use_cache=False)
    for layer in (1, 4):
        expected = row_statistics(live[layer], query.lengths).mean(0).numpy()
        found = full.read(f"stats/attention/{layer}/values", row, row + 1)[0]
        assert found.shape == (HEADS, 4)
        assert np.abs(found - expected).max() <= 2e-3
    a = states["ffn_activation", 4][0]
    near_zero = float((a.abs() < 0.01 * a.square().mean().sqrt()).float().mean())
    width = a.shape[1]
    hoyer = float(((width**0.5 - a.abs().sum(1) / a.norm(dim=1)) / (width**0.5 - 1)).mean())
    assert np.allclose(full.read("stats/ffn/values", row, row + 1)[0, 1], [near_zero, hoyer], atol=2e-3)


def test_replay_climbs_and_gradients_are_autograds(full: Cache, teacher: PreTrainedModel) -> None:
    finished = [full[i] for i in range(len(full)) if rows_of(full, full[i], "replay").stop > rows_of(full, full[i], "replay").start]
    assert finished
    assert all(segment.finished for segment in finished)
    segment = finished[0]
    rows = rows_of(full, segment, "replay")
    places = full.read("replay/rows/position", rows.start, rows.stop) - segment.token_start
    nll = full.read("replay/path/nll", rows.start, rows.stop)
    assert (np.diff(nll, axis=1) > 0).all()
    ids = ids_of(segment)
    teacher.requires_grad_(requires_grad=True)
    with tap_states(teacher, [("block_output", n) for n in (1, 3, LAYERS)]) as states:
        logits = teacher(ids, use_cache=False).logits[0, :, : full.manifest.tokenizer.vocab_size]
    counted = torch.from_numpy(np.flatnonzero(segment.loss_mask == 1))
    labels = torch.from_numpy(np.append(segment.input_ids[1:].astype(np.int64), 0))
    losses = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="none")
    gradients = torch.autograd.grad(losses.sum(), [states["block_output", n] for n in (1, 3)])
    teacher.requires_grad_(requires_grad=False)
    for layer, expected in zip((1, 3), gradients, strict=True):
        values = full.read(f"replay/gradient/{layer}/values", rows.start, rows.stop).astype(np.float32)
        found = values * full.read(f"replay/gradient/{layer}/scale", rows.start, rows.stop)[:, None]
        wanted = expected[0, places].numpy()
        assert np.abs(found - wanted).max() <= np.abs(wanted).max() / 127
    own = dict(zip(counted.tolist(), losses.tolist(), strict=True))
    assert np.allclose(nll[:, 0], [own[int(p)] for p in places], atol=1e-4)
    start = states["block_output", LAYERS][0, places].detach()
    values = full.read("replay/path/values", rows.start, rows.stop).astype(np.float32)
    steps = torch.from_numpy(values * full.read("replay/path/scale", rows.start, rows.stop)[:, None, None])
    head, norm = output_head(teacher), final_norm(teacher)
    for j in range(3):
        again = torch.nn.functional.cross_entropy(head.logits(norm(start + steps[:, j])), labels[places], reduction="none")
        assert np.allclose(again.detach().numpy(), nll[:, j + 1], atol=0.05)
    lengths = steps[:, 0].norm(dim=1) / start.norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, 0.1), rtol=0.05)


def test_draws_are_unbiased(full: Cache, teacher: PreTrainedModel) -> None:
    segment = full[0]
    with torch.no_grad():
        logits = teacher(ids_of(segment), use_cache=False).logits[0, :, : full.manifest.tokenizer.vocab_size]
    for temperature in (1.0, 4.0):
        p = (logits / temperature).softmax(-1)
        drawn = full.read(f"distribution/sampled_ids_{temperature:g}", segment.token_start, segment.token_start + len(segment))
        assert (np.diff(drawn.astype(np.int64), axis=1) >= 0).all()
        counts = torch.zeros_like(p).scatter_add_(1, torch.from_numpy(drawn.astype(np.int64)), torch.ones(drawn.shape))
        score = ((counts / 8 - p) * logits).sum(1)  # mean zero, whatever the logits
        spread = ((p * logits.square()).sum(1) - (p * logits).sum(1).square()).div(8).sqrt()
        assert abs(float(score.sum())) <= 4 * float(spread.square().sum().sqrt())


def test_an_overlay_adds_what_nobody_thought_of(
    tmp_path: Path, cache: Cache, full: Cache, recipe_for: RecipeMaker, teacher_folder: Path
) -> None:
    base = build(recipe_for(tmp_path / "base.zarr", signals={"distribution": {"rank": 8}}))
    maker: dict[str, Any] = {"sources": None, "context": None, "unit_tokens": None}
    recipe = recipe_for(
        tmp_path / "over.zarr", signals={"distribution": None, "hidden": {"layers": [2]}, "attention": {}}, base=base.uri, **maker
    )
    joined = build(recipe)
    alone = open_cache(base.uri)
    assert joined.manifest.signals.distribution == alone.manifest.signals.distribution
    assert joined.manifest.signals.hidden is not None
    assert not any(path.startswith(("tokens", "segments", "distribution")) for path in joined.parts[1].capacity_rows)
    assert np.array_equal(joined.read("hidden/block_output/2/values"), cache.read("hidden/block_output/2/values"))
    assert np.array_equal(joined[3].input_ids, alone[3].input_ids)
    student = make_model("llama", joined.manifest.tokenizer.vocab_size, seed=1)
    objective = resolve(Losses.of({"forward_kl": {}, "lhsm": {}, "apc": {}}), joined, student)
    batch = next(
        Stream(joined, objective.needs, StreamSection(sequence_length=CONTEXT, global_batch_rows=8), packed=True).micro_batches(
            {}, 0
        )
    )
    hidden = batch.part(HiddenPart)
    assert batch.part(DistributionPart) is not None
    assert hidden is not None
    assert len(hidden.flat)
    assert Codecs.of(joined, objective.needs, torch.device("cpu")).hidden
    with pytest.raises(MismatchError, match="exactly one that is no overlay"):
        open_cache(tmp_path / "over.zarr")
    with pytest.raises(MismatchError, match="exactly one"):
        open_cache([base.uri, full.uri])
    other = build(recipe_for(tmp_path / "other.zarr", signals={"distribution": {"rank": 8}}, context=32))
    with pytest.raises(MismatchError, match="plan"):
        open_cache([other.uri, tmp_path / "over.zarr"])


def test_massive_channels_ruin_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recipe_for: RecipeMaker) -> None:
    model = make_model("llama", len(tokenizer), scale=4.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] += 1000 * float(model.model.embed_tokens.weight.std())
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher"), "dtype": "float32", "device": "cpu"}
    cases: dict[str, dict[str, Any]] = {"int8": {}, "float16": {"values": "float16"}, "pca": {"rank": 24}}
    for name, hidden in cases.items():
        signals = {"distribution": None, "hidden": {"layers": [2], **hidden}}
        cache = build(recipe_for(tmp_path / f"{name}.zarr", teacher=teacher, signals=signals))
        segment = cache[0]
        with torch.no_grad(), tap_states(model, [("block_output", 2)]) as live:
            model(ids_of(segment), use_cache=False)
        expected = live["block_output", 2][0].numpy()
        codes = {
            n: cache.read(f"hidden/block_output/2/{n}", segment.token_start, segment.token_start + len(segment))
            for n in ("values", "scale")
        }
        constants = {
            n: cache.read(f"calibration/hidden.block_output.2/{n}")
            for n in ("mean", "spread", *(("basis",) if name == "pca" else ()))
        }
        coordinates = codes["values"].astype(np.float32) * codes["scale"][:, None]
        coordinates = coordinates @ constants["basis"].T if name == "pca" else coordinates
        found = coordinates * constants["spread"] + constants["mean"]
        others = [c for c in range(WIDTH) if c != 7]
        error = np.abs(found - expected)[:, others].mean() / np.abs(expected - expected.mean(0))[:, others].mean()
        explained = cache.manifest.calibration.hidden[0].explained_variance
        assert error <= (0.45 if name == "pca" else 0.02), (name, error)
        assert (explained < 1) == (name == "pca")


def test_a_teacher_without_a_usable_head_gives_its_log_probabilities(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def squashed(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = 5 * torch.sin(out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", squashed)
    with pytest.raises(MismatchError, match="rank: 0"):
        build(recipe_for(tmp_path / "refused.zarr", signals={"distribution": {}}))
    cache = build(recipe_for(tmp_path / "c.zarr", signals={"distribution": {"rank": 0, "head": 32, "samples": 4}}))
    segment = cache[0]
    model = load_model(cache.manifest.teacher.name, what="teacher", dtype=torch.float32)
    with torch.no_grad():
        logp = model(ids_of(segment), use_cache=False).logits[0, :, : cache.manifest.tokenizer.vocab_size].log_softmax(-1)
    ids = cache.read("distribution/head_ids", segment.token_start, segment.token_start + len(segment)).astype(np.int64)
    assert np.array_equal(ids, logp.topk(32).indices.sort(-1).values.numpy())
    assert len(cache.manifest.calibration.coverage) == 4
    assert cache.manifest.calibration.coverage[0] > cache.manifest.calibration.coverage[-1]


def test_large_vocabularies_and_softcapped_untied_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150_000, WIDTH, generator=generator)
    bias = torch.randn(150_000, generator=generator)
    head = OutputHead(weight, bias, 1.0, 5.0)
    hidden = torch.randn(600, WIDTH, generator=generator)
    signal = DistributionSignal(rank=WIDTH, tail_bits=16, samples=4)
    choice = choose_codec(TailFit.of(hidden, head, signal), head, signal, hidden[:64])
    assert max(choice.fidelity.scaled_kl_nats) <= 1e-3
    rows = extract_distribution(
        choice.codec, lambda r: head.logits(hidden[:64][r]), hidden[:64], torch.zeros(64, dtype=torch.long), 4, (0, 0)
    ).rows
    assert (id_dtype(65_535), id_dtype(65_536), id_dtype(150_000)) == ("uint16", "uint32", "uint32")
    for path in ("distribution/head_ids", "distribution/sampled_ids_4"):
        assert rows[path].dtype == np.uint32
        assert rows[path].max() > 131_072
    assert np.array_equal(rows["distribution/head_ids"], head.logits(hidden[:64]).topk(16).indices.sort(1).values.numpy())


def test_a_quality_settles_the_head_and_a_calibration_of_before_keeps_its_codes(tmp_path: Path, recipe_for: RecipeMaker) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr", signals={"distribution": {"quality": "standard"}})
    cache = build(recipe)
    assert build(recipe).manifest.cache_id == cache.manifest.cache_id  # what was asked for and what was settled are one recipe
    signal = cache.manifest.signals.distribution
    assert signal is not None
    assert signal.head in HEAD_SIZES
    assert signal.bounds == QUALITIES["standard"]
    stored = cache.read("distribution/tail_codes")
    assert stored.dtype == np.uint8
    body = read_document(objects_at(str(tmp_path / "cache.zarr")), CALIBRATION).body
    assert max(body["fidelity"]["scaled_kl_nats"]) <= signal.max_scaled_kl_nats
    segment, codecs = cache[0], Codecs.of(cache, SignalRequest.of(DistributionRequest()), torch.device("cpu"))
    model = load_model(cache.manifest.teacher.name, what="teacher", dtype=torch.float32)
    with torch.no_grad():
        logp = model(ids_of(segment), use_cache=False).logits[0, :, : cache.manifest.tokenizer.vocab_size].log_softmax(-1)
    rows = slice(segment.token_start, segment.token_start + len(segment))
    parts = [torch.from_numpy(cache.read(f"distribution/{n}")[rows]) for n in ("head_ids", "head_codes", "tail_codes", "scalars")]
    codes = DistributionCodes(parts[0].to(torch.int32), *parts[1:])
    assert codecs.distribution is not None
    kl = (logp.exp() * (logp - codecs.distribution.logprobs(codes, 1.0))).sum(1).mean()
    assert float(kl) <= 2 * signal.max_scaled_kl_nats
    planned = plan(recipe)
    before = {name: value for name, value in body.items() if name != "tail_zigzag"}
    dtypes = {spec.path: (spec.dtype, spec.shuffle) for spec in manifest_of(settled(recipe), planned, before).specs}
    assert dtypes["distribution/tail_codes"] == ("int8", "noshuffle")
