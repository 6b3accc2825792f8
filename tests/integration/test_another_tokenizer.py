"""A student that does not share its teacher's tokenizer: told again, compared across, trained; the same tokenizer is the plain case."""

import json
import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from typer.testing import CliRunner

from model_taps.head import OutputHead
from signal_store.cache import Cache, open_cache
from signal_store.errors import CorruptError, InputError, MismatchError
from signal_store.signals.distribution import SCALARS
from student_train.align.aligned_cache import AlignedCache, longest_segment
from student_train.align.view import VIEW, View
from student_train.align.view_maker import make_view
from student_train.cli import app
from student_train.commands.doctor import spikes
from student_train.commands.explain import explain
from student_train.commands.fidelity import fidelity_report
from student_train.commands.generate import generate
from student_train.commands.report import report
from student_train.commands.run import run
from student_train.data.aligned_rows import AlignedRows
from student_train.data.chunks import ChunksPart, ChunksRequest
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.sections import StreamSection
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.signals.hidden import HiddenPart, HiddenRequest
from student_train.data.stream import Stream
from student_train.data.unit import IGNORE
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Divergence
from student_train.losses.forward_kl import ForwardKl
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.objective import resolve
from student_train.losses.output_head import output_loss
from student_train.losses.section import Losses
from student_train.recipe import RunRecipe
from student_train.train.metrics import METRICS
from teacher_cache.commands.build import build
from tests.conftest import RecipeMaker
from tests.tiny import COMMON, make_model, make_other_tokenizer, make_tokenizer
from tests.unit.test_align import HEADED
from tests.unit.test_chats import assistant, user

LONG = 128
"""Tokens of a student's row: its tokens are shorter than the teacher's."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    make_other_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aligned(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> AlignedCache:
    view = make_view(cache, make_other_tokenizer(), str(tmp_path_factory.mktemp("view") / "view"))
    return AlignedCache(cache.parts, view)


def recipe_of(cache: Cache, out: Path, tokenizer: Path, **changes: Any) -> RunRecipe:
    return RunRecipe.model_validate(
        {
            "cache": cache.uri,
            "out": out,
            "student": {
                "config": {"model_type": "llama", **COMMON, "max_position_embeddings": LONG},
                "tokenizer": str(tokenizer),
            },
            "losses": {"strict": {}, "cross_entropy": {"weight": 0.1}},
            "steps": 3,
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
            "stream": {"sequence_length": LONG, "global_batch_rows": 4, "workers": 0},
            "validation": {"every": 2},
            "checkpoint": {"every": 2},
            **changes,
        }
    )


def test_every_segment_is_told_again(cache: Cache, aligned: AlignedCache) -> None:
    other = aligned.view.tokenizer
    for number in range(len(cache)):
        unit, place = cache.place_of(number)
        told = aligned.view.unit(unit)
        own = told.input_ids[told.token_start[place] : told.token_start[place + 1]].tolist()
        theirs = cache[number].input_ids.tolist()
        mine, told_again = (str(t.decode(n, skip_special_tokens=True)) for t, n in ((make_tokenizer(), theirs), (other, own)))
        assert told_again in mine
        assert len(mine.strip("\ufffd")) - len(told_again) < 4
    rows = aligned.view.rows
    assert rows["one_to_one"] <= rows["same_text"] <= rows["counted"]
    assert rows["one_to_one"] <= rows["within"] <= rows["counted"]
    assert rows["one_to_one"] > 0.2 * rows["counted"]


def test_a_batch_holds_the_students_tokens_beside_the_teachers_rows(cache: Cache, aligned: AlignedCache) -> None:
    request = SignalRequest.of(DistributionRequest(), HiddenRequest((("block_output", 2),)))
    stream = Stream(aligned, request, StreamSection(sequence_length=LONG, global_batch_rows=8), packed=True)
    batch = next(stream.micro_batches({}, 0))
    rows = batch.part(AlignedRows)
    assert rows is not None
    ids = batch.input_ids.flatten()
    assert (batch.labels == ids[batch.flat + 1]).all()
    assert (batch.labels != IGNORE).all()
    both = aligned.vocabularies
    start = 0
    for number, count in zip(batch.segments, batch.segment_rows, strict=True):
        segment = cache[number]
        unit, place = cache.place_of(number)
        told = aligned.view.unit(unit)
        own = slice(int(told.token_start[place]), int(told.token_start[place + 1]))
        counted = np.flatnonzero(told.counts[own])
        assert len(counted) == count
        for row, at in enumerate(counted.tolist(), start=start):
            if rows.one_to_one[row]:
                t = int(told.teacher[own][at])
                label = int(batch.labels[row])
                assert both.student.symbols[label] == both.teacher.symbols[int(segment.input_ids[t + 1])]
                assert rows.same_text[row]
        start += count
    hidden = batch.part(HiddenPart)
    assert hidden is not None
    assert 0 < len(hidden.flat) < sum(len(cache[number]) for number in batch.segments)
    assert batch.real.flatten()[hidden.flat].all()


def test_chunks_are_told_token_by_token(cache: Cache, aligned: AlignedCache) -> None:
    """By hand: every stretch of text between common ends, with the teacher's tokens in it and the student's."""
    column = SCALARS.index("label_logprob")
    stream = Stream(
        aligned, SignalRequest.of(ChunksRequest()), StreamSection(sequence_length=LONG, global_batch_rows=2), packed=True
    )
    batch = next(stream.micro_batches({}, 0))
    part = batch.part(ChunksPart)
    assert part is not None
    found, expected = Counter[tuple[float, tuple[int, ...]]](), Counter[tuple[float, tuple[int, ...]]]()
    for number, surprise in enumerate(part.teacher.tolist()):
        found[round(surprise, 3), tuple(part.labels[part.chunk == number].tolist())] += 1
    for segment in (cache[number] for number in batch.segments):
        rows = slice(segment.token_start, segment.token_start + len(segment))
        logprobs = cache.read("distribution/scalars", rows.start, rows.stop)[:, column].astype(float)
        mask = cache.read("tokens/loss_mask", rows.start, rows.stop)
        _, ends = aligned.vocabularies.teacher.spelled(segment.input_ids.astype(np.int64))
        unit, place = cache.place_of(segment.index)
        told = aligned.view.unit(unit)
        ids = told.input_ids[told.token_start[place] : told.token_start[place + 1]].astype(np.int64)
        _, own_ends = aligned.vocabularies.student.spelled(ids)
        common = sorted({*ends.tolist()} & {*own_ends.tolist()})
        for start, stop in pairwise(common):
            theirs = [t for t, end in enumerate(ends.tolist()) if start < end <= stop]
            mine = tuple(int(ids[s]) for s, end in enumerate(own_ends.tolist()) if start < end <= stop)
            if all(mask[t - 1] == 1 for t in theirs):
                expected[round(-sum(logprobs[t - 1] for t in theirs), 3), mine] += 1
    assert found == expected


def test_the_same_tokenizer_compared_across_is_forward_kl(cache: Cache, tmp_path: Path) -> None:
    """Loss and gradient, over the head's whole pass."""
    view = make_view(cache, make_tokenizer(), str(tmp_path / "view"))
    assert view.rows["one_to_one"] == view.rows["counted"]
    aligned = AlignedCache(cache.parts, view)
    student = make_model("llama", cache.manifest.tokenizer.vocab_size, seed=3)
    objective = resolve(Losses.of({"strict": {}, "prefix": {}}), aligned, student)
    stream = Stream(aligned, objective.needs, StreamSection(sequence_length=64, global_batch_rows=8), packed=True)
    batch = next(stream.micro_batches({}, 0))
    codec = Codecs.of(aligned, objective.needs, torch.device("cpu")).distribution
    targets = OutputTargets(batch.labels, DistributionPart.codes_of(batch), codec, None, batch.part(AlignedRows))
    found = []
    divergences: list[Divergence | AcrossDivergence] = [ForwardKl(), *objective.across.values()]
    for divergence in divergences:
        hidden = torch.randn(len(batch.labels), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = torch.randn(cache.manifest.tokenizer.vocab_size, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        total, _ = output_loss(hidden, OutputHead(weight, None, 1.0, None), targets, [OutputTerm(divergence, 1 / len(hidden), 2.0)])
        total.backward()
        found.append((total.detach(), hidden.grad, weight.grad))
    for across in found[1:]:
        torch.testing.assert_close(across, found[0], rtol=1e-6, atol=1e-6)


def test_a_run_in_another_tokenizers_tokens(cache: Cache, tokenizer_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(cache, tmp_path / "run", tokenizer_folder)
    told = explain(recipe)
    assert told["alignment"]["of_terms"]["strict"] == told["alignment"]["one_to_one"]
    assert 0 < told["alignment"]["teacher_mass_on_common_tokens"] < 1
    assert not (tmp_path / "run").exists()
    result = run(recipe)
    assert result["steps"] == 3
    assert result["bits_per_byte"] > 0
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["tokenizer"] == View.open(str(tmp_path / "run/view")).about["student_tokenizer"]
    again = recipe_of(cache, tmp_path / "again", tokenizer_folder, steps=3)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run/view", tmp_path / "again/view")
    assert run(again)["validation_loss"] == result["validation_loss"]
    assert json.loads((tmp_path / "run/student/config.json").read_text())["vocab_size"] == len(make_other_tokenizer())


def test_a_tokenizer_that_changes_texts_is_refused_where_it_does(cache: Cache, tmp_path: Path) -> None:
    lower = make_other_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(MismatchError, match=r"the student's tokenizer changes the text; expected b'[A-Z].*segment \d+, byte \d+"):
        make_view(cache, lower, str(tmp_path / "view"))
    with pytest.raises(InputError, match="a cache holds nothing but itself"):
        make_view(cache, make_other_tokenizer(), f"{cache.uri}/view")


def test_a_run_goes_on_only_as_it_read(cache: Cache, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Through a view of the same tokenizer other rows count: that is another run."""
    plain = {"student": {"config": {"model_type": "llama", **COMMON}}, "losses": {"cross_entropy": {}}, "validation": None}
    stream = {"sequence_length": 64, "global_batch_rows": 4, "workers": 0}
    recipe = recipe_of(cache, tmp_path / "run", tokenizer_folder, **plain, stream=stream, steps=2)
    run(recipe)
    (tmp_path / "run/result.json").unlink()
    through = RunRecipe.model_validate(recipe.model_dump() | {"align": {}})
    with pytest.raises(MismatchError, match="another way to read the cache"):
        run(through)
    assert run(recipe)["steps"] == 2


def test_a_finished_student_is_looked_at_and_writes(cache: Cache, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Fidelity through the view, spikes by the rows that it really had, a report, texts for the next round."""
    out = tmp_path / "run"
    result = run(recipe_of(cache, out, tokenizer_folder, losses={"strict": {}, "cross_entropy": {}, "lhsm": {}}, steps=20))
    with pytest.raises(MismatchError, match=r"another tokenizer than this cache is read with.*student-train align"):
        fidelity_report(out / "student", cache.uri)
    kept = fidelity_report(out / "student", cache.uri, view=str(out / "view"))
    assert kept["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-4)
    assert "agreement" not in kept
    assert kept["cka"]
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    for record in records:
        record["loss"] = record.get("loss", 1.0) * (100 if record["step"] == 15 else 1)
    (out / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    (spike,) = spikes(out, suspects=2)
    assert spike.step == 15
    report([out], tmp_path / "page.html", students=True)
    assert "reads with another tokenizer" in (tmp_path / "page.html").read_text()
    found = generate(out / "student", cache.uri, tmp_path / "texts.jsonl", samples=4, new_tokens=6, unfinished=True)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert found["written"] == len(lines) > 0
    texts = [make_tokenizer().decode(segment.input_ids.tolist()) for segment in cache]
    assert all(any(line["prompt"] in str(text) for text in texts) for line in lines)


@pytest.mark.parametrize(
    "losses", [{"prefix": {"divergence": "jsd"}}, {"likelihood": {}}, {"uld": {}}, {"strict": {"rows": "same_text"}, "lhsm": {}}]
)
def test_other_terms_train(cache: Cache, tokenizer_folder: Path, tmp_path: Path, losses: dict[str, Any]) -> None:
    result = run(recipe_of(cache, tmp_path / "run", tokenizer_folder, losses=losses, steps=2))
    assert result["steps"] == 2


def test_chats_are_told_in_the_students_template(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Answers count, whatever stands around them; windows that begin inside a turn are counted and left out."""
    chats = [[user(f"{n}?"), assistant(f"{n}, 学 {'yes' * (n % 3)}")] for n in range(40)]
    chats += [[{"role": "system", "content": "Be brief."}, user("a"), assistant("long " * 60)]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    sources = [{"name": split, "split": split, "jsonl": path, "messages": "messages"} for split in ("train", "validation")]
    build(recipe_for(tmp_path / "cache.zarr", sources=sources, signals={"distribution": {"rank": 8}}))
    cache = open_cache(str(tmp_path / "cache.zarr"))
    tokenizer = make_other_tokenizer()
    tokenizer.chat_template = HEADED
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    view = make_view(cache, tokenizer, str(tmp_path / "view"))
    assert 0 < view.rows["untold_segments"] < len(cache) / 4
    answers = {str(chat[-1]["content"]) for chat in chats}
    for number in range(len(cache)):
        unit, place = cache.place_of(number)
        told = view.unit(unit)
        own = slice(int(told.token_start[place]), int(told.token_start[place + 1]))
        if own.start == own.stop:
            continue
        ids, counts = told.input_ids[own].astype(np.int64), told.counts[own]
        assert str(tokenizer.decode(ids)).startswith(("### user:\n", "### system:\n"))
        learnt = str(tokenizer.decode(ids[1:][counts[:-1]], skip_special_tokens=True))
        assert any(learnt.strip() in answer for answer in answers)
        if cache[number].finished:
            assert ids[1:][counts[:-1]][-1] == tokenizer.eos_token_id
            last = np.flatnonzero(counts)[-1]
            assert told.one_to_one[own][last]  # the end of a turn is the same, whatever it is called
    result = run(recipe_of(cache, tmp_path / "run", tmp_path / "tokenizer", align={"view": str(tmp_path / "view")}))
    assert result["steps"] == 3


def test_what_cannot_be_had_across_is_refused_by_name(cache: Cache, tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in ("forward_kl", "apc"):
        with pytest.raises(MismatchError, match=rf"{name} compares token by token.*strict, prefix"):
            run(recipe_of(cache, tmp_path / "run", tokenizer_folder, losses={name: {}}))
    with pytest.raises(MismatchError, match="strict is for a student with another tokenizer"):
        plain = recipe_of(cache, tmp_path / "plain", tokenizer_folder).model_dump()
        run(RunRecipe.model_validate(plain | {"student": {"config": {"model_type": "llama", **COMMON}}}))
    with pytest.raises(MismatchError, match=r"strict says something of too few.*expected at least 100%"):
        run(recipe_of(cache, tmp_path / "run", tokenizer_folder, align={"least_share": 1.0}))
    with pytest.raises(InputError, match=r"a segment may be longer than a row.*found 16"):
        stream = {"sequence_length": 16, "global_batch_rows": 4, "workers": 0}
        run(recipe_of(cache, tmp_path / "run", tokenizer_folder, stream=stream))


def test_a_view_is_made_once_and_checked_whenever_it_is_read(
    cache: Cache, aligned: AlignedCache, tokenizer_folder: Path, tmp_path: Path
) -> None:
    said = CliRunner().invoke(
        app, ["align", cache.uri, "--student", str(tokenizer_folder), "--out", str(tmp_path / "v"), "--processes", "2", "--json"]
    )
    assert json.loads(said.stdout)["longest"] == longest_segment(aligned)
    view = View.open(str(tmp_path / "v"))
    assert view.units == aligned.view.units  # whoever makes it, the same bytes
    assert pickle.loads(pickle.dumps(view)).units == view.units
    both = pickle.loads(pickle.dumps(AlignedCache(cache.parts, view)))
    assert both.view.units == view.units
    (tmp_path / "v" / VIEW).unlink()
    first = tmp_path / "v/units" / f"0000000-{view.units[0]}"
    first.unlink()
    again = make_view(cache, make_other_tokenizer(), str(tmp_path / "v"))
    assert again.units == view.units
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    with pytest.raises(CorruptError, match="a unit of the view was altered"):
        view.unit(0)
    with pytest.raises(MismatchError, match=r"another view lies here \(student_tokenizer"):
        make_view(cache, make_other_tokenizer(290), str(tmp_path / "v"))
