"""Looking at a cache: what is shown is what is stored, decoded, named, bounded and escaped."""

import html as html_module
import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from typer.testing import CliRunner

from model_taps.native_dtype import native_dtypes
from run_kit.environment import checks
from signal_store.errors import CorruptError, InputError, MismatchError, NotFoundError
from signal_store.signals.distribution import SCALARS
from signal_view import CacheView, open_cache, plots
from signal_view.coloured import surprise_and_entropy
from signal_view.extras import pyplot
from signal_view.lazy import to_xarray
from signal_view.meaning import meaning
from signal_view.signals import view_of, views_of
from signal_view.signals.base import SignalView
from signal_view.summary import html_of, printable, signal_bytes, summarise, text_of
from signal_view.tokens import TokenTexts, token_texts
from student_train.align.tokenizers import cached_tokenizer
from student_train.cli import app as student_app
from student_train.commands.doctor import spikes
from student_train.commands.run import run
from student_train.importance.rules import load_rules
from student_train.importance.show import plot_weights, token_weights, weights_html
from student_train.recipe import RunRecipe
from student_train.train.metrics import METRICS, read_metrics
from student_train.view.plots import layerwise_cka, plot_against_teacher, plot_cka
from student_train.view.report import report
from student_train.view.spikes import segments_of, spike_steps
from student_train.view.students import before_and_after
from teacher_cache.builder import fill as fill_module
from teacher_cache.cli import app
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from teacher_cache.commands.inspect.page import inspect_page
from teacher_cache.commands.plan import plan
from teacher_cache.commands.status import status
from teacher_cache.commands.verify import verify
from tests.browser import opened
from tests.conftest import RecipeMaker
from tests.tiny import COMMON, write_jsonl

mpl.use("agg")

HOSTILE = (
    "<script>alert('from a text')</script> if x: return <img src=http://example.invalid/x.png onerror=alert(1)>",
    "if مرحبا بالعالم: return 'שלום עולם' # $\\alpha$ & \"quotes\" '</bdi></pre>'",
    "今天天气很好,\u200b我们一起去公园散步吧。for token in 老师: pass",
)


@pytest.fixture(scope="module")
def hostile_cache(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> CacheView:
    """Sampled states, rows that keep their heaviest columns, drawn tokens; texts that would run if they were not escaped."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"{text} {number}" for number in range(4) for text in HOSTILE]
    source = {"name": "<b>hostile</b>", "jsonl": write_jsonl(folder / "texts.jsonl", texts), "lexer": "python"}
    signals = {
        "distribution": {"rank": 8, "head": 6, "samples": 3},
        "hidden": {"positions": {"every": 3}, "rank": 5, "layers": [2]},
        "attention": {"heads": 2, "max_columns": 4},
    }
    return CacheView.of(build(recipe_for(folder / "cache.zarr", sources=[source], signals=signals)))


def test_pieces_are_the_text(hostile_cache: CacheView) -> None:
    tokenizer = cached_tokenizer(hostile_cache)
    for segment in hostile_cache:
        assert segment.text == tokenizer.decode(segment.input_ids.tolist())
        assert len(segment.tokens) == len(segment)


BYTES = [f"<0x{number:02X}>" for number in range(256)]


@given(st.lists(st.sampled_from(["今天", "é", "a b", "  ", "🙂", "ab", "\n", "天"]), min_size=1, max_size=8))
def test_pieces_of_a_tokenizer_that_falls_back_to_bytes(words: list[str]) -> None:
    """As SentencePiece's models have it: spaces are ▁, what is unknown is bytes, and a run of bytes is decoded together."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", *BYTES, "▁", "a", "b", "天", "▁a", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = tokenizer.encode("".join(words)).ids
    texts = TokenTexts(tokenizer)
    pieces = texts.pieces(ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "".join(words)
    assert len(pieces) == len(ids)
    for first, stop, text in texts.groups(ids):
        assert pieces[stop - 1] == text
        assert pieces[first : stop - 1] == [""] * (stop - 1 - first)
    assert texts.piece(vocabulary["▁a"]) == " a"


def test_the_favourites_are_the_favourites(hostile_cache: CacheView, exact_cache: CacheView) -> None:
    for looked in (hostile_cache[1], exact_cache.sample(3)):
        for temperature in (1.0, 3.0):
            dense = looked.logprobs(temperature)
            assert dense.attrs["units"] == "nat"
            torch.testing.assert_close(torch.from_numpy(dense.values).exp().sum(1), torch.ones(len(looked)), rtol=1e-5, atol=0)
            frame = looked.top(6, temperature)
            rows, ids = frame.index.get_level_values("token"), frame.id.to_numpy()
            np.testing.assert_allclose(dense.values[rows, ids], -frame.nats, rtol=1e-5, atol=1e-6)
            assert (frame.nats.groupby("token").diff().dropna() >= 0).all()
            assert np.bincount(rows).tolist() == [6] * len(looked)
        labels = np.append(looked.input_ids[1:].astype(np.int64), -1 if looked.next_token is None else looked.next_token)
        deep = looked.top(30)
        assert (deep.id[deep.is_next].to_numpy() == labels[deep.index[deep.is_next].get_level_values("token")]).all()
        values = torch.from_numpy(looked.logprobs(1.0).values).topk(30, 1).values
        np.testing.assert_allclose(deep.nats.to_numpy().reshape(-1, 30), -values.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(MismatchError, match="so many tokens"):
        exact_cache[0].top(0)
    with pytest.raises(MismatchError, match="temperature"):
        exact_cache[0].top(3, 1.7)


def test_a_pure_head_says_what_it_knows(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    made = CacheView.of(build(recipe_for(tmp_path / "cache.zarr", signals={"distribution": {"rank": 0, "head": 4}})))
    assert made[0].top(4).probability.groupby("token").sum().max() <= 1
    with pytest.raises(MismatchError, match="single tokens"):
        made[0].logprobs()
    with pytest.raises(MismatchError, match="there is no tail"):
        made[0].top(5)
    with pytest.raises(MismatchError, match="no attention"):
        made[0].attention(1)
    with pytest.raises(MismatchError, match="no hidden states"):
        made[0].hidden("block_output", 1)
    assert "/hidden" not in made[0].to_xarray().groups


def test_scalars_are_of_the_row_that_predicts(exact_cache: CacheView) -> None:
    segment = exact_cache[2]
    rows = exact_cache.read("distribution/scalars", segment.token_start, segment.token_start + len(segment)).astype(np.float32)
    surprise, entropy = surprise_and_entropy(segment)
    assert np.isnan(surprise[0])
    np.testing.assert_array_equal(surprise[1:], -rows[:-1, SCALARS.index("label_logprob")])
    np.testing.assert_array_equal(entropy[1:], rows[:-1, SCALARS.index("entropy")])
    dense = segment.logprobs(1.0).values
    stored = segment.scalars().label_logprob.values[:-1]
    np.testing.assert_allclose(dense[np.arange(len(segment) - 1), segment.input_ids[1:].astype(int)], stored, atol=0.02)
    np.testing.assert_allclose(segment.scalars()["head_mass@2"].values, 1 / (1 + np.exp(-rows[:, len(SCALARS) + 1])), rtol=1e-6)


def test_attention_rows_are_what_is_stored(hostile_cache: CacheView, cache: CacheView) -> None:
    for looked in (hostile_cache, cache):
        layer = looked.manifest.calibration.attention[0].layer
        rows = 0
        for segment in looked:
            found = segment.attention(layer)
            rows += len(found.token)
            assert found.dims == ("token", "head", "key")
            for row, place in enumerate(found.token.values):
                assert np.isnan(found.values[row, :, place + 1 :]).all()
                total = np.nansum(found.values[row], 1)
                if "residual" in found.coords:
                    total = total + found.residual.values[row]
                    assert (np.isfinite(found.values[row]).sum(1) == min(4, place + 1)).all()
                np.testing.assert_allclose(total, 1, atol=0.03)
                assert found.key_piece.values[place] == found.piece.values[row]
        assert rows


def test_every_decoded_array_has_a_name_and_a_unit(knowing_cache: CacheView, hostile_cache: CacheView) -> None:
    for looked in (knowing_cache, hostile_cache):
        segment = next(s for s in looked if s.source.startswith("qa")) if looked is knowing_cache else looked[0]
        for tree in (segment.to_xarray(), looked.to_xarray()):
            assert len(tree.groups) > 4
            for node in tree.subtree:
                for name, variable in node.dataset.data_vars.items():
                    assert variable.attrs.get("units", "unknown") != "unknown", (node.path, name)
                    assert variable.attrs["long_name"], (node.path, name)


def test_a_signal_without_a_file_is_shown_as_it_is_stored(knowing_cache: CacheView, hostile_cache: CacheView) -> None:
    assert type(view_of("hidden")) is not SignalView
    assert type(view_of("of_another_version")) is SignalView
    for looked in (knowing_cache, hostile_cache):
        segment = looked[3]
        held = {view.name for view in views_of(looked)}
        assert held == {*dict(looked.manifest.signals.cached()), "tags"} & {path.partition("/")[0] for path in looked.capacity_rows}
        shown = {place: part for name in held for place, part in SignalView(name).parts(segment).items()}
        unshown = {path.rpartition("/")[0] for path in looked.capacity_rows} - {place[1:] for place in shown}
        assert unshown == {"tokens", "segments"} | {group for group in unshown if group.endswith("/segments")}
        for place, part in shown.items():
            for name, array in part.data_vars.items():
                assert array.attrs["units"] != "unknown", (place, name)
                assert array.attrs["long_name"]
        ids = looked.read("distribution/head_ids", segment.token_start, segment.token_start + len(segment))
        np.testing.assert_array_equal(shown["/distribution"].head_ids.values, ids[segment.context_only :])
        assert shown["/distribution"].scalar.values[:3].tolist() == list(SCALARS)
        layer = looked.manifest.calibration.attention[0].layer
        rows = segment.columns("attention/segments", "row_start", "rows")
        each = range(rows["row_start"], rows["row_start"] + rows["rows"])
        offset, length = (looked.read(f"attention/rows/{name}", each.start, each.stop) for name in ("offset", "length"))
        entries = [
            looked.read(f"attention/{layer}/weights", n, n + count) for n, count in zip(offset, length.tolist(), strict=True)
        ]
        if entries:
            np.testing.assert_array_equal(shown[f"/attention/{layer}"].weights.values, np.concatenate(entries))
        positions = looked.read("attention/rows/position", each.start, each.stop)
        np.testing.assert_array_equal(shown["/attention/rows"].place.values, positions - segment.token_start)
    values = knowing_cache[3].row_of("stats/ffn/values")
    np.testing.assert_array_equal(SignalView("stats").parts(knowing_cache[3])["/stats/ffn"]["values"].values, values)


@settings(max_examples=15)
@given(st.data())
def test_a_lazy_array_is_the_stored_one(hostile_cache: CacheView, data: st.DataObject) -> None:
    tree = hostile_cache.to_xarray()
    path = data.draw(
        st.sampled_from(["distribution/scalars", "tokens/input_ids", "distribution/head_ids", "attention/rows/position"])
    )
    if path == "distribution/scalars":
        whole = hostile_cache.read(path)[:, SCALARS.index("entropy")].astype(np.float32)
        lazy = tree["distribution/entropy"]
    else:
        whole, lazy = hostile_cache.read(path), tree[path]
    rows = data.draw(
        st.one_of(
            st.integers(-len(whole), len(whole) - 1),
            st.slices(len(whole)).filter(lambda s: (s.step or 1) > 0),  # xarray 2026.9 fails on empty backward ones
            st.lists(st.integers(0, len(whole) - 1), max_size=5).map(lambda some: np.asarray(some, np.int64)),
        )
    )
    np.testing.assert_array_equal(lazy[rows].values, whole[rows])
    if whole.ndim == 2:
        column = data.draw(
            st.one_of(st.integers(0, whole.shape[1] - 1), st.slices(whole.shape[1]).filter(lambda s: (s.step or 1) > 0))
        )
        np.testing.assert_array_equal(lazy[rows, column].values, whole[rows][..., column])


def test_rows_in_use_are_told_from_room(cache: CacheView, hostile_cache: CacheView) -> None:
    for looked in (cache, hostile_cache):
        tree = looked.to_xarray()
        assert int(tree["tokens/in_use"].sum()) == looked.num_tokens
        assert int(tree["segments/in_use"].sum()) == len(looked)
        assert int(tree["segments/length"].values[tree["segments/in_use"].values].sum()) == looked.num_tokens
        assert np.isfinite(tree["distribution/entropy"].values[tree["distribution/in_use"].values]).all()


def test_a_lazy_tree_that_was_pickled_has_the_segment_s_values(hostile_cache: CacheView) -> None:
    tree, layer = pickle.loads(pickle.dumps(hostile_cache.to_xarray())), hostile_cache.manifest.calibration.attention[0].layer
    segment = next(s for s in hostile_cache if len(s.attention(layer).token))
    one = segment.hidden("block_output", 2)
    row = segment.columns("hidden/segments", "row_start", "rows")
    own = tree["hidden/block_output/2/state"][row["row_start"] : row["row_start"] + row["rows"]]
    np.testing.assert_array_equal(own.values, one.values)
    head = tree["distribution/head_logprob"][segment.token_start].values
    np.testing.assert_allclose(np.sort(-head), segment.top(6).loc[0].nats, rtol=1e-5, atol=1e-6)
    place = segment.columns("attention/segments", "row_start", "rows")["row_start"]
    first, count = (int(tree[f"attention/rows/{name}"][place].values) for name in ("offset", "length"))
    entries = tree[f"attention/{layer}/probability"][first : first + count].values
    np.testing.assert_allclose(np.sort(entries, 0), np.sort(segment.attention(layer).values[0].T, 0)[:count], rtol=1e-6)


def test_nothing_is_read_before_it_is_asked_for(hostile_cache: CacheView, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = open_cache(hostile_cache.uri)
    monkeypatch.setattr(CacheView, "read", lambda *_: pytest.fail("data was read"))
    monkeypatch.setattr(CacheView, "read_unit", lambda *_: pytest.fail("data was read"))
    assert "input_ids" in repr(to_xarray(fresh))
    assert len(repr(fresh)) < 400
    assert len(fresh._repr_html_()) < 100_000
    assert text_of(summarise(fresh))


def test_text_and_html_have_the_same_sections(hostile_cache: CacheView, cache: CacheView) -> None:
    for looked in (hostile_cache, cache):
        summary = summarise(looked)
        text, page = text_of(summary), html_of(summary)
        for section in summary.sections:
            assert f"\n{section.title}\n" in text
            assert html_module.escape(section.title) in page
            for row in section.rows:
                assert all(cell in text and html_module.escape(cell) in page for cell in row)
        assert "<b>hostile" not in page
        assert all(meaning(path)[1] != "unknown" for path in looked.capacity_rows)
    sizes = signal_bytes(cache)
    assert sum(sizes.values()) == sum(
        path.stat().st_size
        for top in sizes
        for path in (Path(cache.uri) / top).rglob("*")
        if "c" in path.relative_to(cache.uri).parts and path.is_file()
    )
    for segment in hostile_cache:
        assert said_by(segment._repr_html_()).endswith(segment.text)
    assert repr(cache[0]).startswith("<Segment 0 of 'train'")


def test_search_and_sample(cache: CacheView, hostile_cache: CacheView) -> None:
    found, texts = list(cache.search(r"def \w+")), token_texts(cache)
    assert len(found) > 8
    for match in found:
        assert match.segment.text[match.start : match.stop] == match.text
        assert match.text in "".join(match.segment.tokens[match.first : match.last + 1])
        assert match.text in texts.decode(match.segment.input_ids[match.first : match.last + 1].tolist())
    for match in cache.search("散步"):
        assert match.text == texts.decode(match.segment.input_ids[match.first : match.last + 1].tolist())
        assert match.last > match.first
    assert [m.text for m in cache.search("散步", limit=2)] == ["散步"] * 2
    assert {m.segment.split for m in cache.search("held out", split="validation")} == {"validation"}
    assert [m.start for m in cache.search("x*", limit=3)] == [m.start for m in cache.search("x+", limit=3)]
    assert cache.sample(5).index == cache.sample(5).index
    assert len({cache.sample(seed).index for seed in range(20)}) > 5
    assert cache.sample(1, split="validation").split == "validation"
    with pytest.raises(InputError, match="no such split"):
        list(cache.search("x", split="valid"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="regular expression"):
        cache.search("(")
    with pytest.raises(MismatchError, match="no validation split"):
        hostile_cache.sample(split="validation")


def test_plots_are_axes(knowing_cache: CacheView, hostile_cache: CacheView) -> None:
    for looked in (knowing_cache, hostile_cache):
        segment = next(s for s in looked if s.attention(looked.manifest.calibration.attention[0].layer).keyword.values.any())
        axes = plots.plot_top(segment, 4, 2.0, tokens=6)
        pieces = [text.get_text() for text in axes.texts]
        assert len(pieces) == 4 * min(6, len(segment))
        boxes = [patch for patch in axes.patches if patch.get_edgecolor()[:3] != (0, 0, 0)]
        assert len(boxes) == int(segment.top(4, 2.0).loc[0:5].is_next.sum())
        drawn = [
            plots.plot_attention(segment),
            plots.plot_tail_spectrum(looked),
            plots.plot_explained_variance(looked),
            plots.plot_surprise(segment),
        ]
        for one in (axes, *drawn):
            one.figure.canvas.draw()
            pyplot().close(one.figure)
    with pytest.raises(InputError, match="no such token"):
        plots.plot_top(hostile_cache[0], first=10_000)
    with pytest.raises(InputError, match="no such token"):
        plots.plot_surprise(hostile_cache[0], first=-5)
    keywordless = next(
        (s for s in knowing_cache if not len(s.attention(knowing_cache.manifest.calibration.attention[0].layer).token)), None
    )
    if keywordless is not None:
        with pytest.raises(MismatchError, match="no keyword"):
            plots.plot_attention(keywordless)


@given(st.text(max_size=40))
def test_any_text_can_be_a_label(text: str) -> None:
    shown = plots.shown(text)
    assert "\n" not in shown
    assert "$" not in shown.replace(r"\$", "")
    _, has = plots.fonts()
    assert all(has(character) for character in shown)


def test_evidence_coverage_and_roles_are_frames(knowing_cache: CacheView) -> None:
    question = next(s for s in knowing_cache if s.source.startswith("qa"))
    frame = question.evidence()
    assert frame.filter(like="share_").sum().to_numpy() == pytest.approx(1, abs=5e-3)
    assert all(text in question.text for text in frame.text)
    summary = next(s for s in knowing_cache if s.source.startswith("summary") and len(s.coverage()))
    assert summary.coverage().probability.between(0, 1).all()
    assert (question.roles().code != "none").any()
    weights = token_weights(knowing_cache, question.index, load_rules(None))
    assert "weight" in weights_html(weights)
    assert len(plot_weights(weights).patches) == min(40, len(weights))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, cache: CacheView) -> Path:
    out = tmp_path_factory.mktemp("run") / "first"
    run(small_run(cache, out, 30, 4, optimizer={"learning_rate": 1e-2}, validation={"every": 10}, gradient_shares_every=10))
    return out


def small_run(cache: CacheView, out: Path, steps: int, rows: int, **more: Any) -> RunRecipe:
    content = {
        "cache": cache.uri,
        "out": out,
        "student": {"config": {"model_type": "llama", **COMMON, "num_hidden_layers": 2}},
        "preset": "cross_entropy",
        "steps": steps,
        "stream": {"sequence_length": 48, "global_batch_rows": rows, "workers": 0},
        **more,
    }
    return RunRecipe.model_validate(content)


def test_students_beside_their_teacher(cache: CacheView, finished_run: Path) -> None:
    students = before_and_after(finished_run, cache)
    segment = cache.sample(1, split="validation")
    axes = plot_against_teacher(segment, students, tokens=12)
    assert [line.get_label().split(",")[0] for line in axes.lines] == ["before", "after"]
    means = [float(line.get_label().rsplit(" ", 1)[1]) for line in axes.lines]
    assert means[1] < means[0]
    layers, matrix = layerwise_cka(students["after"], cache, "block_output", 4)
    assert matrix.shape == (len(layers), 2)
    assert (np.abs(matrix) <= 1 + 1e-6).all()
    assert plot_cka(students["after"], cache, segments=2).get_title() == "CKA of block_output"
    with pytest.raises(MismatchError, match="holds no ffn_gate"):
        plot_cka(students["after"], cache, "ffn_gate")


def test_the_teacher_itself_has_a_diagonal(knowing_cache: CacheView) -> None:
    from model_taps.loading import load_model

    teacher = load_model(knowing_cache.manifest.teacher.name, what="teacher", dtype=torch.float32)
    layers, matrix = layerwise_cka(teacher, knowing_cache, "block_output", 4)
    for row, layer in enumerate(layers):
        assert matrix[row, layer - 1] == pytest.approx(1, abs=1e-3)
        assert matrix[row].argmax() == layer - 1


def test_a_report_compares_runs(cache: CacheView, finished_run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "second <i>"
    unfinished.mkdir()
    about = json.loads((finished_run / "run.json").read_text())
    about["recipe"]["optimizer"]["learning_rate"] = 0.123
    (unfinished / "run.json").write_text(json.dumps(about))
    lines = (finished_run / METRICS).read_text().splitlines(keepends=True)[:12]
    (unfinished / METRICS).write_text("".join(lines))
    page = report([finished_run, unfinished])
    assert "0.123" in page
    assert "not finished" in page
    assert "<i>" not in page
    target = tmp_path / "report.html"
    called = CliRunner().invoke(student_app, ["report", str(finished_run), str(unfinished), "--students", "--html", str(target)])
    assert called.exit_code == 0, called.output
    with opened(target) as (browser_page, said):
        assert not said
        assert browser_page.locator("img").count() >= 7
        assert browser_page.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
        assert browser_page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    with pytest.raises(NotFoundError, match="no run here"):
        report([tmp_path / "nothing"])


def test_spikes_name_the_samples_of_their_step(cache: CacheView, finished_run: Path, tmp_path: Path) -> None:
    assert spikes(finished_run) == []
    records = read_metrics(finished_run / METRICS)
    told = tmp_path / "spiky"
    told.mkdir()
    (told / "run.json").write_text((finished_run / "run.json").read_text())
    for record in records:
        if record.get("step") == 20 and "loss" in record:
            record["loss"] *= 50
            tokens = record["tokens"]
    (told / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    (spike,) = spikes(told, suspects=99)
    assert spike.step == 20
    assert spike.loss > 3 * spike.usual
    assert sum(suspect.tokens for suspect in spike.suspects) == tokens
    surprises = [suspect.surprise or 0.0 for suspect in spike.suspects]
    assert surprises == sorted(surprises, reverse=True)
    assert all(suspect.text.isascii() for suspect in spike.suspects)
    recipe = RunRecipe.model_validate(json.loads((told / "run.json").read_text())["recipe"])
    assert sorted(s.segment for s in spike.suspects) == segments_of(recipe, cache, {20})[20]
    shown = CliRunner().invoke(student_app, ["doctor", "spikes", str(told)]).output
    assert "step 20" in shown


def test_a_step_that_holds_a_segment_twice_has_its_spike_named(hostile_cache: CacheView, tmp_path: Path) -> None:
    """A step longer than the cache: the stream goes on with the next epoch inside it."""
    recipe = small_run(hostile_cache, tmp_path, 10, 64)
    run(recipe)
    records = read_metrics(tmp_path / METRICS)
    records[-1]["loss"] *= 50
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    repeated = segments_of(recipe, hostile_cache, {10})[10]
    assert len(set(repeated)) < len(repeated)
    (spike,) = spikes(tmp_path, suspects=99)
    assert sorted(suspect.segment for suspect in spike.suspects) == sorted(set(repeated))


def test_spikes_cut_rows_as_the_record_says(
    finished_run: Path, cache: CacheView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the student would do here; only a record that does not say asks it."""
    about = json.loads((finished_run / "run.json").read_text())
    records = read_metrics(finished_run / METRICS)
    step = 20
    next(record for record in records if record["step"] == step and "loss" in record)["loss"] = 1e3
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr("student_train.view.spikes.packs_rows", lambda *_: not about["packed"])
    (tmp_path / "run.json").write_text(json.dumps(about))
    (spike,) = spikes(tmp_path, suspects=99)
    seen = segments_of(RunRecipe.model_validate(about["recipe"]), cache, {step}, about["packed"])[step]
    assert (spike.step, sorted(suspect.segment for suspect in spike.suspects)) == (step, seen)
    (tmp_path / "run.json").write_text(json.dumps({name: value for name, value in about.items() if name != "packed"}))
    with pytest.raises(MismatchError, match="the record does not say"):
        spikes(tmp_path)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_a_quiet_run_has_no_spikes_and_a_jump_is_one(losses: list[float]) -> None:
    quiet = [(n, 3 - 0.01 * n) for n in range(40)]
    assert list(spike_steps(quiet)) == []
    assert [step for step, *_ in spike_steps([*quiet, (40, 30.0)])] == [40]
    assert [step for step, *_ in spike_steps([*quiet, (40, float("nan"))])] == [40]
    assert all(loss > usual for _, loss, usual in spike_steps(list(enumerate(losses))))


class Words(HTMLParser):
    """What of a page is text, and which elements it has."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags = "", Counter[str]()
        self.feed(source)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not [name for name, _ in attrs if name.startswith("on")]
        assert all((value or "").startswith(("data:", "#")) for name, value in attrs if name in {"src", "href"})


def said_by(source: str) -> str:
    return Words(source).text.replace("↵", "").replace("⇥", "")


def test_a_page_shows_texts_and_runs_none(hostile_cache: CacheView, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    called = CliRunner().invoke(app, ["inspect", hostile_cache.uri, "--html", str(target)])
    assert called.exit_code == 0, called.output
    words = Words(target.read_text())
    assert words.tags["script"] == 1
    assert words.tags["img"] >= 6
    assert all(segment.text in words.text for segment in hostile_cache)
    with opened(target) as (page, said):
        assert page.locator("#samples > details").count() == len(hostile_cache)
        page.locator("#samples > details > summary").first.click()
        shown = page.locator("#samples pre").first.inner_text()
        assert "<script>alert('from a text')</script>" in shown.replace("\n", "")
        assert page.locator("#samples script, #samples img").count() == 0
        page.fill("input[type=search]", "مرحبا")
        assert page.locator("#samples > details:visible").count() == 4
        assert page.locator("#samples-count").inner_text() == f"4 of {len(hostile_cache)}"
        page.fill("input[type=search]", "no such words")
        assert page.locator("#samples > details:visible").count() == 0
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert not said


def test_status_before_while_and_after(recipe_for: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr")
    with pytest.raises(NotFoundError, match="no plan of a cache"):
        status(recipe.cache)
    plan(recipe)
    assert (status(recipe.cache).stage, status(recipe.cache).done_units) == ("planned", 0)
    real = fill_module.compute_unit

    def failing(calibrated: Any, objects: Any, unit: int, *rest: Any) -> Any:
        if unit == 2:
            raise RuntimeError("the node lost\nits GPU")
        assert status(recipe.cache).workers[0].unit == unit
        return real(calibrated, objects, unit, *rest)

    monkeypatch.setattr(fill_module, "compute_unit", failing)
    with pytest.raises(RuntimeError, match="lost"):
        build(recipe)
    monkeypatch.undo()
    found = status(recipe.cache)
    assert (found.stage, found.done_units, found.done[:3]) == ("filling", 2, (True, True, False))
    assert found.done_tokens == sum(found.unit_tokens[:2])
    assert found.last_error is not None
    assert found.last_error.error == "RuntimeError: the node lost its GPU"
    assert found.seconds_left is None
    called = CliRunner().invoke(app, ["status", recipe.cache, "--json"])
    assert json.loads(called.output)["last_error"] == "RuntimeError: the node lost its GPU"
    target = tmp_path / "progress.html"
    assert CliRunner().invoke(app, ["inspect", recipe.cache, "--html", str(target)]).exit_code == 0
    with opened(target) as (page, said):
        assert page.locator("progress").get_attribute("value") == f"{found.done_tokens:g}"
        assert page.locator("pre").inner_text().startswith("■■□")
        assert "(as of " in page.inner_text("body")
        assert "the node lost its GPU" in page.inner_text("body")
        assert not said
    build(recipe)
    found = status(recipe.cache)
    assert (found.stage, found.generation, found.done_tokens) == ("sealed", 0, sum(found.unit_tokens))
    assert found.workers == ()  # notes go with the seal
    assert "sealed" in CliRunner().invoke(app, ["status", recipe.cache, "--watch", "1"]).output
    assert not verify(recipe.cache).damages


def test_inspect_shows_segments_and_tokens(cache: CacheView) -> None:
    def said(*arguments: Any) -> str:
        called = CliRunner().invoke(app, ["inspect", cache.uri, *map(str, arguments)])
        assert called.exit_code == 0, called.output
        return called.output

    facts = json.loads(said("--segment", 3, "--json"))
    assert facts["text"] == cache[3].text
    assert len(facts["surprise"]) == len(facts["tokens"]) == len(cache[3])
    token = json.loads(said("--segment", 3, "--token", 4, "--json"))
    assert len(token["top"]["2"]) == 10
    assert token["next_piece"] == cache[3].tokens[5]
    assert "T = 3" in said("--segment", 3, "--token", 4)
    assert cache[3].text.split()[0] in said("--segment", 3)
    assert "coverage by temperature" in said()
    assert json.loads(said("--json"))["segments"] == len(cache)
    for wrong in (["--token", "1"], ["--segment", "100000"], ["--segment", "0", "--token", "999"]):
        assert isinstance(CliRunner().invoke(app, ["inspect", cache.uri, *wrong]).exception, InputError)


def test_doctor_looks_at_the_machine(tmp_path: Path, teacher_folder: Path) -> None:
    found = {check.name: check for check in checks(tmp_path, str(teacher_folder))}
    assert found["Python"].state == found["commit"].state == found["model"].state == "ok"
    assert "torch" in found["versions"].found
    products = found["processor's products"]
    assert all(f"{dtype} " in products.found for dtype in ("float32", "bfloat16", "float16"))
    assert ("bfloat16" in products.advice) == (torch.bfloat16 in native_dtypes("cpu"))
    called = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--json"])
    assert {check["name"] for check in json.loads(called.output)} >= {
        "GPU" if not torch.cuda.is_available() else "GPU 0",
        "disk",
        "attention",
    }
    missing = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "none"), "--json"])
    assert missing.exit_code == 1
    assert "no such model folder" in missing.output


CORNERS: dict[str, dict[str, Any]] = {
    "no distribution": {"signals": {"distribution": None, "hidden": {"layers": [2]}}},
    "a pure head": {"signals": {"distribution": {"rank": 0, "head": 4}}},
    "states in float16": {
        "signals": {"distribution": {"rank": 8}, "hidden": {"rank": 4, "values": "float16", "positions": {"every": 5}}}
    },
    "states at keywords": {
        "signals": {"distribution": {"rank": 8}, "hidden": {"rank": 4, "positions": "keywords"}, "attention": {}}
    },
    "overlapping contexts": {"overlap": 16, "signals": {"distribution": {"rank": 8}, "hidden": {}, "attention": {}}},
}


@pytest.mark.parametrize("corner", CORNERS)
def test_every_legal_cache_can_be_looked_at(corner: str, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    made = CacheView.of(build(recipe_for(tmp_path / "cache.zarr", **CORNERS[corner])))
    assert Words(inspect_page([made.uri])).tags["script"] == 1
    assert len(Words(made._repr_html_()).text) > 500
    lengths = {len(segment) for segment in made}
    for segment in (made[0], min(made, key=len), made[len(made) // 2], max(made, key=lambda s: s.context_only)):
        assert "/tokens" in segment.to_xarray().groups
        assert said_by(segment._repr_html_()).endswith(segment.text)
        last = str(len(segment) - 1)
        for extra in ([], ["--token", last]):
            for form in ([], ["--json"]):
                called = CliRunner().invoke(app, ["inspect", made.uri, "--segment", str(segment.index), *extra, *form])
                assert called.exit_code == 0, (called.output, called.exception)
                if form:
                    json.loads(called.output, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
        if made.manifest.signals.distribution is not None:
            own = segment.top(2, tokens=slice(0, 5)).index.get_level_values("token")
            assert own.tolist() == [t for t in range(segment.context_only, min(5, len(segment))) for _ in (0, 1)]
    assert len(lengths) > 1
    assert made.to_xarray()["tokens/input_ids"].size == made.seal.num_units * made.capacity_rows["tokens/input_ids"]


def test_overlays_and_generations_can_be_looked_at(
    cache: CacheView, recipe_for: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content: dict[str, Any] = {
        "base": cache.uri,
        "sources": None,
        "context": None,
        "unit_tokens": None,
        "signals": {"distribution": None, "stats": {}},
    }
    recipe = recipe_for(tmp_path / "overlay.zarr", **content)

    def failing(*_: Any) -> Any:
        raise RuntimeError("preempted")

    monkeypatch.setattr(fill_module, "compute_unit", failing)
    with pytest.raises(RuntimeError, match="preempted"):
        build(recipe)
    unfinished = inspect_page([cache.uri, recipe.cache])
    assert f"{recipe.cache} (not sealed)" in unfinished
    assert "RuntimeError: preempted" in unfinished
    monkeypatch.undo()
    build(recipe)
    both = open_cache([cache.uri, recipe.cache])
    assert "stats/ffn" in text_of(summarise(both))
    assert "ffn_statistics" in {name.rsplit("/", 1)[-1] for name in both[0].to_xarray().groups}
    assert inspect_page([cache.uri, recipe.cache]).startswith("<!doctype html>")


def test_an_extension_that_is_not_sealed_is_not(recipe_for: RecipeMaker, texts: dict[str, Path], tmp_path: Path) -> None:
    source = {"name": "train", "jsonl": texts["train"], "max_documents": 8}
    signals = {"distribution": {"rank": 8}}
    build(recipe_for(tmp_path / "cache.zarr", sources=[source], signals=signals))
    grown = recipe_for(tmp_path / "cache.zarr", sources=[source, {"name": "more", "jsonl": texts["validation"]}], signals=signals)
    extend(grown)
    assert (status(grown.cache).stage, status(grown.cache).generation) == ("sealed", 1)
    (tmp_path / "cache.zarr" / "ledger/seals/000001.json").unlink()
    found = status(grown.cache)
    assert (found.stage, found.generation) == ("filled", 0)
    assert all(found.done)


def test_inspect_does_not_import_torch(cache: CacheView) -> None:
    code = "import sys; from teacher_cache.cli import app; app(['inspect', sys.argv[1]], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, cache.uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "coverage by temperature" in done.stdout


def test_a_run_s_broken_files_are_named(finished_run: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "run.json").write_text((finished_run / "run.json").read_text())
    (torn / METRICS).write_text((finished_run / METRICS).read_text()[:-9])
    assert "not finished" in report([torn])
    lines = (finished_run / METRICS).read_text().splitlines()
    (torn / METRICS).write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]))
    with pytest.raises(CorruptError, match="not JSON"):
        report([torn])
    about = json.loads((torn / "run.json").read_text())
    about["recipe"]["of_another_version"] = 1
    (torn / "run.json").write_text(json.dumps(about))
    with pytest.raises(MismatchError, match="another version"):
        spikes(torn)
    (torn / "run.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        spikes(torn)


def test_a_terminal_is_not_steered_by_a_text() -> None:
    assert printable("a\x1b[31mb\tc\n\x07\u202e今") == "a\\x1b[31mb\tc\n\\x07\\u202e今"


NOT_NOTES = ['{"worker": "a/b"}', "[1]", "null", "7", "[" * 100_000]


def test_an_odd_note_is_passed_over(cache: CacheView, tmp_path: Path) -> None:
    folder = tmp_path / "cache.zarr"
    (folder / "ledger/workers").mkdir(parents=True)
    shutil.copy(Path(cache.uri) / "ledger/plan.json", folder / "ledger")
    whole = {"worker": '"0/1"', "host": '"a"', "pid": "1", "state": '"fills"', "started": "1.0", "updated": "2.0"}
    legal = {("error", '"x"'), ("error", "null"), ("unit", "null")}
    odd = list(NOT_NOTES)
    for field in ("worker", "updated", "tokens", "units", "error", "unit", "pid"):
        for value in ('"x"', "null", "Infinity", "-1", "{}", "1e400"):
            note = "{" + ", ".join(f'"{key}": {held}' for key, held in {**whole, field: value}.items()) + "}"
            odd += [note] * ((field, value) not in legal)
    for number, text in enumerate(odd):
        (folder / f"ledger/workers/{number}-of-99.json").write_text(text)
    assert status(str(folder)).workers == ()
    (folder / "ledger/workers/1-of-99.json").write_text("{" + ", ".join(f'"{k}": {v}' for k, v in whole.items()) + "}")
    assert [note.worker for note in status(str(folder)).workers] == ["0/1"]
    assert CliRunner().invoke(app, ["status", str(folder)]).exit_code == 0


def test_runs_of_the_wrong_shape_are_refused(finished_run: Path, tmp_path: Path) -> None:
    about, log = (finished_run / "run.json").read_text(), (finished_run / METRICS).read_text()
    spoiled = {
        "run.json": ["[1, 2]", "null", "{}", about.replace('"steps"', '"stops"', 1), "[" * 100_000],
        METRICS: ["7\n" + log, "null\n" + log, log.replace('"step": 3,', '"step": "x",', 1), '{"loss": 1}\n' + log],
        "result.json": ["[1, 2]", "3"],
    }
    for name, texts in spoiled.items():
        for text in texts:
            folder = tmp_path / "run"
            folder.mkdir(exist_ok=True)
            for held, whole in (("run.json", about), (METRICS, log)):
                (folder / held).write_text(whole)
            (folder / name).write_text(text)
            with pytest.raises((CorruptError, MismatchError)):
                report([folder])
            (folder / name).unlink()


def test_another_cache_in_a_run_s_place_is_refused(finished_run: Path, exact_cache: CacheView, tmp_path: Path) -> None:
    about = json.loads((finished_run / "run.json").read_text())
    (tmp_path / METRICS).write_text((finished_run / METRICS).read_text().replace('"loss": ', '"loss": 9', 1))
    shutil.copytree(finished_run / "student", tmp_path / "student")
    (tmp_path / "run.json").write_text(json.dumps(about | {"recipe": about["recipe"] | {"cache": exact_cache.uri}}))
    for look in (lambda: report([tmp_path], students=True), lambda: spikes(tmp_path)):
        with pytest.raises(MismatchError, match="another cache stands"):
            look()


def test_a_loss_that_is_not_finite_is_named_and_poisons_nothing() -> None:
    losses = [(n, 3 - 0.01 * n) for n in range(40)]
    losses[5], losses[20] = (5, float("nan")), (20, float("inf"))
    assert [step for step, *_ in spike_steps(losses)] == [5, 20]
    losses[2] = (2, 500.0)
    assert [step for step, *_ in spike_steps(losses)] == [2, 5, 20]


def test_what_is_not_meant_is_refused(cache: CacheView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = cache[0]
    with pytest.raises(InputError, match="without a step"):
        segment.top(2, tokens=slice(None, None, 2))
    with pytest.raises(MismatchError, match="one row a segment"):
        segment.row_of("tokens/input_ids")
    with pytest.raises(InputError, match="nothing would be drawn"):
        plots.plot_surprise(segment, tokens=0)
    with pytest.raises(InputError, match="seed"):
        cache.sample(-1)
    with pytest.raises(InputError, match="limit"):
        cache.search("x", limit=-1)
    assert [s.index for s in cache[1:3]] == [1, 2]
    with pytest.raises(IndexError, match="from 0"):
        cache[len(cache)]
    for command, where in ((app, ["inspect", cache.uri]), (student_app, ["report", str(tmp_path)])):
        called = CliRunner().invoke(command, [*where, "--html", str(tmp_path / "nowhere" / "page.html")])
        assert isinstance(called.exception, NotFoundError)
    called = CliRunner().invoke(app, ["inspect", cache.uri, "--html", str(Path(cache.uri) / "tokens" / "page.html")])
    assert isinstance(called.exception, InputError) and not list(Path(cache.uri).rglob("page.html"))
    monkeypatch.chdir(Path(cache.uri).parent)
    opened_here = open_cache(Path(cache.uri).name)
    monkeypatch.chdir(tmp_path)
    assert opened_here[len(cache) - 1].text == cache[len(cache) - 1].text
    assert pickle.loads(pickle.dumps(opened_here))[0].text == segment.text
