"""Terms are found by their files' names, checked, and named in no other place; aliases stand for them."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import student_train.losses
from signal_store.format import renamed
from student_train.losses import aliases, registry
from student_train.losses.presets import PRESETS, find_preset
from student_train.losses.section import Losses
from student_train.recipe import RunRecipe
from student_train.session.identity import differences, identity

TERM = """
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import KnowledgeTerm, TermSection
class Mine(TermSection):
    weight: WeightField = constant(0.5)
TERM = KnowledgeTerm(section=Mine, kind=Kind.TASK)
"""
Add = Callable[[str], str]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Add]:
    """Lay a file with this text beside the terms; gives its name."""
    name = f"aa_{abs(hash(request.node.name)) % 10**8}"

    def forget() -> None:
        registry.terms.cache_clear()
        Losses.with_every_term.__func__.cache_clear()  # type: ignore[attr-defined]

    def lay(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(student_train.losses, "__path__", [*student_train.losses.__path__, str(tmp_path)])
        forget()
        return name

    yield lay
    monkeypatch.undo()
    sys.modules.pop(f"{registry.PACKAGE}.{name}", None)
    vars(student_train.losses).pop(name, None)
    forget()


def recipe(**parts: Any) -> RunRecipe:
    return RunRecipe.model_validate({"cache": "c", "out": "o", "student": {"checkpoint": "s"}, "steps": 1, **parts})


def test_one_new_file_is_a_new_term_that_follows_the_others(add: Add) -> None:
    before = list(registry.terms())
    name = add(TERM)
    assert list(registry.terms()) == [*before, name]
    assert recipe(losses={name: {"weight": 2}}).objective.knowledge[name].weight.at(0) == 2
    assert name in registry.kinds()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("TERM = KnowledgeTerm", "TERM = dict"), "TERM must be a Term, found dict"),
        (("= constant(0.5)", ""), "every setting must have a default, weight has none"),
        (("TermSection)", "Section)"), "the section must be a TermSection"),
        (("KnowledgeTerm(section", "LogitsTerm(divergence=lambda _: None, section"), "must have a temperature"),
    ],
)
def test_a_file_whose_term_is_none_is_refused_by_name(add: Add, change: tuple[str, str], says: str) -> None:
    text = TERM.replace(*change).replace("import KnowledgeTerm", "import LogitsTerm, KnowledgeTerm")
    name = add("from signal_store.signals import Section\n" + text)
    with pytest.raises(TypeError, match=rf"losses\.{name}: .*{says}"):
        registry.terms()


def test_the_order_names_terms_that_there_are() -> None:
    assert tuple(registry.terms()) == registry.ORDER


def test_a_name_imports_nothing() -> None:
    for name in ("os", "registry", "student_train.losses.forward_kl", "features"):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            Losses.of({name: {}})


def test_aliases_stand_for_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(aliases.TERMS.values()) <= registry.terms().keys()
    assert set(aliases.PRESETS.values()) <= PRESETS.keys()
    assert not aliases.TERMS.keys() & registry.terms().keys()
    assert not aliases.PRESETS.keys() & PRESETS.keys()
    renamed._tell.cache_clear()
    for _ in range(2):
        found = recipe(losses={"tla": {"temperature": 2}})
        assert found.losses == {"forward_kl": {"temperature": 2}}
    assert capsys.readouterr().err == "losses: tla is called forward_kl now\n"
    with pytest.raises(ValidationError, match="forward_kl is given twice, by two names"):
        recipe(losses={"tla": {}, "forward_kl": {}})
    for alias, name in aliases.PRESETS.items():
        assert find_preset(alias) is PRESETS[name]


def test_a_run_goes_on_under_either_name_of_its_preset() -> None:
    old, new = (identity(recipe(preset=name)) for name in ("flash_004", "logits_hidden_attention"))
    assert old["preset"] == "flash_004", "the digest of a run that began under this name stays what it was"
    assert differences(old, new) == {}
    assert differences(old, identity(recipe(preset="every_kind"))) != {}


def test_keys_of_before_are_read_and_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    renamed._tell.cache_clear()
    old = recipe(stream={"row_tokens": 64, "rows_per_step": 4, "micro_rows": 2}, sharing={"mode": "sharded"}, losses={"tla": {}})
    new = recipe(
        stream={"sequence_length": 64, "global_batch_rows": 4, "micro_batch_rows": 2},
        parallel={"mode": "sharded"},
        losses={"forward_kl": {}},
    )
    assert old == new
    assert differences(identity(old), identity(new)) == {}
    told = capsys.readouterr().err.splitlines()
    assert "recipe: row_tokens is called sequence_length now" in told
    assert len(told) == 5
    renamed._tell.cache_clear()
    with renamed.untold():
        assert recipe(stream={"row_tokens": 64}, losses={"forward_kl": {}}).stream.sequence_length == 64
    assert capsys.readouterr().err == ""
    with pytest.raises(ValidationError, match="sequence_length is given twice, by two names"):
        recipe(stream={"row_tokens": 64, "sequence_length": 64})


def test_the_recipes_module_does_not_import_torch() -> None:
    code = "import sys; import student_train.recipe; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
