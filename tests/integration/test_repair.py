"""A cache that grew twice loses parts of its ledger, and is repaired to the same bytes or refused with nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from signal_store.cache import open_cache
from signal_store.errors import CorruptError, InputError, MismatchError, SignalStoreError
from signal_store.io.local import LocalObjects
from signal_store.ledger.catalogue import catalogue
from signal_store.ledger.documents import EXTENSIONS, listed_seals
from signal_store.ledger.entries import Ledger, Origin
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from teacher_cache.commands.fill import fill
from teacher_cache.commands.repair import repair
from teacher_cache.commands.seal import seal
from teacher_cache.commands.verify import verify
from teacher_cache.recipe import CacheRecipe
from tests.integration.test_generations import bodies
from tests.tiny import CODE, make_model, make_tokenizer, needs_torch, write_jsonl

pytestmark = [pytest.mark.storage, needs_torch]
RecipeMaker = Callable[..., CacheRecipe]


def add(file: Path, text: str) -> None:
    with file.open("a") as f:
        f.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeMaker) -> tuple[CacheRecipe, Path]:
    """A cache of one source, extended twice, and its texts."""
    folder = tmp_path_factory.mktemp("twice")
    file = write_jsonl(folder / "texts.jsonl", [f"# part {i}\n{text}" for i in range(2) for text in CODE])
    source = {"name": "train", "jsonl": file, "lexer": "python"}
    recipe = recipe_for(folder / "cache.zarr", sources=[source], signals={"distribution": {"rank": 8}})
    build(recipe)
    for number in range(2):
        add(file, CODE[number] + f"# new {number}")
        extend(recipe)
    return recipe, file


@pytest.fixture
def grown(twice: tuple[CacheRecipe, Path], tmp_path: Path) -> tuple[CacheRecipe, Path]:
    """A copy of it, to be spoiled."""
    recipe, file = twice
    root, texts = shutil.copytree(recipe.cache, tmp_path / "cache.zarr"), shutil.copy(file, tmp_path / "texts.jsonl")
    source = recipe.sources[0].model_copy(update={"jsonl": (Path(texts),)})
    return recipe.model_copy(update={"cache": str(root), "sources": (source,)}), Path(texts)


LOST: dict[str, list[str]] = {
    "first seal": ["ledger/seals/000000.json"],
    "middle seal": ["ledger/seals/000001.json"],
    "newest seal": ["ledger/seals/000002.json"],
    "an extension": ["ledger/extensions/000001.json"],
    "plan and extensions": ["ledger/plan.json", "ledger/extensions/000001.json", "ledger/extensions/000002.json"],
    "both copies of the calibration": ["ledger/calibration"],
    "manifest, calibration, a record, a shard": [
        "ledger/manifest.json", "ledger/calibration.json", "ledger/units/0000001.0.json", "distribution/scalars/c/0/0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", ["gone", "cut"])
@pytest.mark.parametrize("what", LOST)
def test_a_grown_cache_is_mended_to_the_same_bytes(grown: tuple[CacheRecipe, Path], what: str, how: str) -> None:
    recipe, _ = grown
    root = Path(recipe.cache)
    whole = bodies(root)
    for key in LOST[what]:
        for path in sorted((root / key).iterdir()) if (root / key).is_dir() else [root / key]:
            path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:-7])
    repair(recipe)
    assert bodies(root) == whole
    assert not verify(recipe.cache).damages
    assert open_cache(recipe.cache).seal.generation == 2


@pytest.mark.parametrize("what", ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "plan/0000000.*", "calibration/*"])
def test_what_was_planned_and_calibrated_is_looked_at_before_a_cache_is_sealed(
    tmp_path: Path, texts: dict[str, Path], recipe_for: RecipeMaker, what: str
) -> None:
    source = {"name": "train", "jsonl": texts["train"]}
    recipe = recipe_for(tmp_path / "cache.zarr", sources=[source], signals={"distribution": {"rank": 8}})
    fill(recipe)
    place = next((Path(recipe.cache) / "ledger").glob(what))
    if "plan" in what:
        place.unlink()
    else:
        place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"made before is gone or altered.*teacher-cache repair"):
        seal(recipe.cache)
    repair(recipe)
    assert seal(recipe.cache).generation == 0
    assert not verify(recipe.cache).damages


def test_what_lies_in_the_place_of_another_is_mended(grown: tuple[CacheRecipe, Path]) -> None:
    recipe, _ = grown
    root = Path(recipe.cache)
    whole = bodies(root)
    swapped = [("ledger/extensions/000001.json", "ledger/extensions/000002.json")]
    swapped += [("ledger/units/0000000.0.json", "ledger/units/0000001.0.json"), ("zarr.json", "tokens/zarr.json")]
    for pair in swapped:
        one, other = (root / key for key in pair)
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    assert {key for pair in swapped for key in pair} <= {damage.key for damage in verify(recipe.cache).damages}
    repair(recipe)
    assert bodies(root) == whole
    assert not verify(recipe.cache).damages


def test_the_catalogue_holds_all_of_a_cache_and_nothing_else(grown: tuple[CacheRecipe, Path]) -> None:
    objects = LocalObjects(grown[0].cache)
    ledger = Ledger(objects, listed_seals(objects))
    entries = list(catalogue(ledger))
    assert sorted(entry.key for entry in entries) == objects.list("")
    assert not ledger.failing(entries)
    newest = [entry.key for entry in entries if entry.digest is None and entry.origin is not Origin.RECORD]
    assert newest == ["ledger/seals/000002.json"]  # all else is named by a document above it
    assert ledger.num_bytes == sum(objects.size(key) or 0 for key in objects.list(""))


def test_files_beside_the_cache_are_left_alone(grown: tuple[CacheRecipe, Path]) -> None:
    recipe, _ = grown
    root = Path(recipe.cache)
    (root / "thesis.txt").write_text("precious")
    (root / "ledger/units/.DS_Store").write_bytes(b"?")
    assert [damage.key for damage in verify(recipe.cache).damages] == ["ledger/units/.DS_Store"]
    assert repair(recipe).removed == ("ledger/units/.DS_Store",)
    assert (root / "thesis.txt").read_text() == "precious"
    with pytest.raises(InputError, match="holds something else"):
        build(recipe.model_copy(update={"cache": str(root.parent)}))


def test_an_extension_that_was_begun_is_no_damage(grown: tuple[CacheRecipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, file = grown
    add(file, CODE[2] + "# third")
    monkeypatch.setattr("teacher_cache.builder.fill.fill_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extend(recipe)
    monkeypatch.undo()
    assert not verify(recipe.cache).damages
    assert repair(recipe).removed == ()
    file.write_text("\n".join([*file.read_text().splitlines()[:-1], json.dumps({"text": "others"})]) + "\n")
    with pytest.raises(MismatchError, match="not what they were"):
        extend(recipe)
    file.write_text("\n".join([*file.read_text().splitlines()[:-1], json.dumps({"text": CODE[2] + "# third"})]) + "\n")
    add(file, "# and a fourth")
    assert extend(recipe).seal.generation == 4


def test_what_is_refused_commits_nothing(
    grown: tuple[CacheRecipe, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe, file = grown
    make_model("llama", len(tokenizer), seed=9).save_pretrained(tmp_path / "other")
    other = make_tokenizer()
    other.add_tokens(["zzz"])
    other.save_pretrained(tmp_path / "other")
    add(file, "# one more")
    before = LocalObjects(recipe.cache).list("")
    teacher = recipe.teacher
    source = recipe.sources[0]
    refused: dict[str, dict[str, Any]] = {
        "another tokenizer": {"teacher": teacher.model_copy(update={"tokenizer": str(tmp_path / "other")})},
        "another teacher": {"teacher": teacher.model_copy(update={"model": str(tmp_path / "other"), "tokenizer": teacher.model})},
        "another recipe": {"batch_tokens": 96},
        "read otherwise": {"sources": (source.model_copy(update={"lexer": None}),)},
    }
    for what, change in refused.items():
        with pytest.raises(MismatchError, match=what):
            extend(recipe.model_copy(update=change))
    assert LocalObjects(recipe.cache).list("") == before
    assert len(LocalObjects(recipe.cache).list(EXTENSIONS)) == 2


def test_a_wrong_recipe_cannot_spoil_a_repair(grown: tuple[CacheRecipe, Path]) -> None:
    recipe, file = grown
    root = Path(recipe.cache)
    whole = bodies(root)
    (root / "ledger/plan.json").write_bytes(b"{")
    text = file.read_text()
    file.write_text(text.replace("part 0", "part 7"))
    for wrong in (recipe, recipe.model_copy(update={"context": 32})):
        with pytest.raises(MismatchError, match="not what they were"):
            repair(wrong)
    file.write_text(text)
    repair(recipe)
    assert whole.items() <= bodies(root).items()  # unit plans of the wrong texts may lie there, inert
    assert not verify(recipe.cache).damages


def test_a_teacher_that_does_not_think_in_numbers_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recipe_for: RecipeMaker
) -> None:
    model = make_model("llama", len(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("天")[0]] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    file = write_jsonl(tmp_path / "t.jsonl", [*CODE * 8, "天 rare"])
    recipe = recipe_for(
        tmp_path / "c.zarr",
        teacher={"model": str(tmp_path / "nan"), "dtype": "float32", "device": "cpu"},
        sources=[{"name": "train", "jsonl": file}],
        signals={"distribution": {"rank": 8}},
    )
    with pytest.raises(SignalStoreError, match="not finite"):
        build(recipe)
    assert not verify_exists(recipe)


def verify_exists(recipe: CacheRecipe) -> bool:
    return LocalObjects(recipe.cache).exists("ledger/seals/000000.json")


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path, teacher_folder: Path, recipe_for: RecipeMaker) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(InputError, match="lacks weights"):
        build(recipe_for(tmp_path / "c.zarr", teacher={"model": str(folder), "dtype": "float32", "device": "cpu"}))
