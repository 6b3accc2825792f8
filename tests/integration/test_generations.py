"""A cache grows, is damaged, and is repaired: extend, verify, repair; and many workers fill one."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from signal_store.cache import Cache, open_cache
from signal_store.errors import CorruptError, InputError, MismatchError
from signal_store.io.local import LocalObjects
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from teacher_cache.commands.fill import fill
from teacher_cache.commands.repair import repair
from teacher_cache.commands.seal import seal
from teacher_cache.commands.verify import verify
from teacher_cache.recipe import CacheRecipe
from teacher_cache.worker import Worker
from tests.processes import fresh
from tests.tiny import CODE, needs_torch, write_jsonl

pytestmark = [pytest.mark.storage, needs_torch]
RecipeMaker = Callable[..., CacheRecipe]


def bodies(root: Path) -> dict[str, Any]:
    """Every object's bytes; of a ledger document its body."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        key = path.relative_to(root).as_posix()
        if path.is_file() and not key.startswith(("ledger/tokenizer/", "ledger/workers/")):
            data = path.read_bytes()
            found[key] = json.loads(data)["body"] if key.startswith("ledger/") and key.endswith(".json") else data
    return found


@pytest.fixture
def grown(tmp_path: Path, recipe_for: RecipeMaker) -> tuple[CacheRecipe, Path]:
    """A recipe whose source has a file of its own, built and sealed."""
    file = write_jsonl(tmp_path / "texts.jsonl", [f"# part {i}\n{text}" for i in range(4) for text in CODE])
    source = {"name": "train", "jsonl": file, "lexer": "python"}
    recipe = recipe_for(
        tmp_path / "cache.zarr", sources=[source], signals={"distribution": {"rank": 8}, "hidden": {"positions": {"every": 4}}}
    )
    build(recipe)
    return recipe, file


def test_extending_leaves_old_readers_alone(grown: tuple[CacheRecipe, Path], recipe_for: RecipeMaker, tmp_path: Path) -> None:
    recipe, file = grown
    old = open_cache(recipe.cache)
    before = {path: old.read(path) for path in old.capacity_rows}
    student = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    content = {"cache": recipe.cache, "out": tmp_path / "run", "student": {"config": {**student, "max_position_embeddings": 64}}}
    begun = RunRecipe.model_validate(
        {**content, "losses": {"cross_entropy": {}}, "steps": 1, "stream": {"sequence_length": 48, "global_batch_rows": 2}}
    )
    run(begun)
    late = open_cache(recipe.cache)  # opened before, reads its first byte after
    with file.open("a") as f:
        f.write(json.dumps({"text": CODE[1] + "# new"}) + "\n")
    extra = write_jsonl(tmp_path / "extra.jsonl", [CODE[0] + "# other"])
    sources = [recipe.sources[0], {"name": "extra", "split": "validation", "jsonl": extra, "lexer": "python"}]
    wider = recipe_for(recipe.cache, sources=sources, signals=recipe.signals)
    new = extend(wider)
    assert (new.seal.generation, old.seal.generation) == (1, 0)
    assert new.manifest.cache_id == old.manifest.cache_id
    assert len(new) > len(late) == len(old)
    for path, rows in before.items():
        assert np.array_equal(late.read(path), rows, equal_nan=rows.dtype.kind == "f"), path
        assert np.array_equal(new.read(path, 0, len(rows)), rows, equal_nan=rows.dtype.kind == "f"), path
    assert [s.name for s in new.sources] == ["train", "train", "extra"]
    assert new[-1].split == "validation"
    assert new[len(old)].document == 12
    assert not verify(recipe.cache).damages
    assert len(open_cache(recipe.cache, generation=0)) == len(old)
    (begun.out / "result.json").unlink()
    run(begun)  # a run goes on with the generation that it began with
    assert json.loads((begun.out / "run.json").read_text())["generation"] == 0
    with pytest.raises(InputError, match="nothing to extend"):
        extend(wider)
    with pytest.raises(MismatchError, match="no such generation"):
        open_cache(recipe.cache, generation=7)


def test_extending_with_other_old_documents_is_refused(grown: tuple[CacheRecipe, Path]) -> None:
    recipe, file = grown
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[1], lines[0], *lines[2:], lines[0]]) + "\n")
    with pytest.raises(MismatchError, match="not what they were"):
        extend(recipe)


def spoil(root: Path, keys: list[str]) -> None:
    """Flip a bit of each."""
    for key in keys:
        data = bytearray((root / key).read_bytes())
        data[len(data) // 2] ^= 16
        (root / key).write_bytes(bytes(data))


def test_what_is_damaged_is_named_and_mended_to_the_same_bytes(cache: Cache, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    root = Path(shutil.copytree(cache.uri, tmp_path / "cache.zarr"))
    whole = bodies(root)
    plan_unit = next(key for key in whole if key.startswith("ledger/plan/"))
    copy = next(key for key in whole if key.startswith("ledger/calibration/"))
    flipped = ["distribution/scalars/c/1/0", "distribution/scalars/zarr.json", "calibration/distribution/tail_basis/c/0/0"]
    flipped += ["ledger/units/0000002.0.json", plan_unit, copy, "units/000000/plan/segments/c/0", "zarr.json"]
    spoil(root, flipped)
    (root / "tokens/input_ids/c/0").unlink()
    (root / "tokens/input_ids/c/99").write_bytes(b"?")
    swapped = [root / f"distribution/head_codes/c/{n}/0" for n in (0, 1)]
    first, second = (path.read_bytes() for path in swapped)
    swapped[0].write_bytes(second)
    swapped[1].write_bytes(first)
    damaged = {
        *flipped,
        "tokens/input_ids/c/0",
        "tokens/input_ids/c/99",
        "distribution/head_codes/c/0/0",
        "distribution/head_codes/c/1/0",
    }
    assert {damage.key for damage in verify(str(root)).damages} == damaged
    repaired = repair(recipe_for(root))
    assert (repaired.revised_units, repaired.removed) == ((), ("tokens/input_ids/c/99",))
    assert bodies(root) == whole


def test_a_ledger_that_is_gone_follows_from_recipe_and_units(cache: Cache, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    root = Path(shutil.copytree(cache.uri, tmp_path / "cache.zarr"))
    whole = bodies(root)
    spoil(root, ["ledger/manifest.json", "ledger/calibration.json", "ledger/plan.json", "ledger/seals/000000.json"])
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        verify(str(root))
    repair(recipe_for(root))
    assert bodies(root) == whole


def test_a_unit_that_comes_out_otherwise_gets_a_new_revision(
    cache: Cache, recipe_for: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(cache.uri, tmp_path / "cache.zarr"))
    old = open_cache(root)
    scalars = old.read("distribution/scalars")
    (root / "distribution/scalars/c/1/0").write_bytes(b"spoiled")
    from teacher_cache.signals import batch

    real = batch.extract_batch

    def otherwise(*args: Any) -> Any:
        found = real(*args)
        scalars = found.rows["distribution/scalars"]
        np.copyto(scalars, scalars.astype(np.float32) + 0.01, casting="unsafe")
        return found

    monkeypatch.setattr("teacher_cache.builder.fill.extract_batch", otherwise)
    assert repair(recipe_for(root)).revised_units == (1,)
    new = open_cache(root)
    assert new.seal.generation == 1
    unit = old.capacity_rows["distribution/scalars"]
    assert np.array_equal(new.read("distribution/scalars", 0, unit), scalars[:unit], equal_nan=True)
    changed = new.read("distribution/scalars", unit, 2 * unit)
    assert np.nanmax(np.abs(changed.astype(np.float32) - scalars[unit : 2 * unit].astype(np.float32))) <= 0.02
    assert not verify(str(root)).damages


def work(recipe: CacheRecipe, number: int, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    fill(recipe, Worker(number, count))


def test_three_workers_fill_one_cache(cache: Cache, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "cache.zarr")
    workers = [fresh().Process(target=work, args=(recipe, i, 3)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert worker.exitcode == 0
    seal(recipe.cache)
    assert bodies(Path(recipe.cache)) == bodies(Path(cache.uri))
    assert not LocalObjects(recipe.cache).list("ledger/claims")


def test_workers_take_over_what_others_left(
    recipe_for: RecipeMaker, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards = itertools.count(10**9, -3600)
    monkeypatch.setattr(
        "signal_store.ledger.documents.time.time", lambda: next(backwards)
    )  # a clock that jumps back changes nothing
    recipe = recipe_for(tmp_path / "cache.zarr")
    objects = LocalObjects(recipe.cache)
    fill(recipe, Worker(1, 2))  # the only one of two that ever ran
    assert Worker(0, 2).claims(objects, "unit-0000000") is False
    seal(recipe.cache)
    assert bodies(Path(recipe.cache)) == bodies(Path(cache.uri))


@pytest.mark.parametrize("text", ["3/3", "x/2", "1", "-1/2"])
def test_worker_names_are_checked(text: str) -> None:
    with pytest.raises(InputError, match="i/n"):
        Worker.parse(text)


def test_workers_are_told_by_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Worker.from_environment() == Worker()
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Worker.from_environment() == Worker(3, 8, 1)
