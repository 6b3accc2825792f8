"""Token weights over a cache: looked at, grown with it, refused where it has no tags."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from signal_store.cache import Cache, open_cache
from signal_store.errors import MismatchError
from signal_store.format.roles import LEVELS
from student_train.importance.rules import load_rules
from student_train.importance.show import coloured, save_surface, token_weights
from teacher_cache.commands.build import build
from teacher_cache.commands.extend import extend
from tests.tiny import CODE, PROSE, write_jsonl

RULES = load_rules()


def test_a_tagged_cache_grows_and_untagged_ones_refuse(recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    code = {
        "name": "code",
        "jsonl": write_jsonl(tmp_path / "code.jsonl", CODE * 3),
        "lexer": "python",
        "tagger": {"parser": "pygments"},
    }
    prose = {"name": "prose", "jsonl": write_jsonl(tmp_path / "prose.jsonl", PROSE * 3), "tagger": {"parser": "jieba"}}
    signals = {"distribution": {"rank": 4}}
    cache = build(recipe_for(tmp_path / "cache.zarr", sources=[code], signals=signals))
    assert cache.sources[0].tagger is not None
    assert cache.sources[0].tagger.parser == "pygments"
    roles = cache.read("tags/roles")
    first = cache[0]
    mine = roles[first.token_start : first.token_start + len(first)]
    assert {LEVELS["code"][r] for r in mine[:, 3]} >= {"keyword", "definition", "identifier"}
    grown = extend(recipe_for(tmp_path / "cache.zarr", sources=[code, prose], signals=signals))
    last = grown[len(grown) - 1]
    mine = grown.read("tags/roles", last.token_start, last.token_start + len(last))
    assert (mine[:-1, 0] > 0).mean() > 0.8
    plain = build(recipe_for(tmp_path / "plain.zarr", sources=[{**code, "tagger": None}], signals=signals))
    assert "tags/roles" not in open_cache(plain.uri).capacity_rows
    with pytest.raises(MismatchError, match="no tags"):
        extend(recipe_for(tmp_path / "plain.zarr", sources=[{**code, "tagger": None}, prose], signals=signals))


def test_weights_can_be_looked_at(knowing_cache: Cache, exact_cache: Cache, tmp_path: Path) -> None:
    tokens = token_weights(knowing_cache, 0, RULES)
    assert "".join(t.text for t in tokens)[:12] == "# part 0\ndef"
    assert tokens[0].weight is None
    weights = {t.text: t.weight for t in tokens[1:] if t.roles.get("code") in ("keyword", "comment")}
    assert all(w is not None and 0.2 <= w <= 3.0 for w in weights.values())
    assert coloured(tokens).plain == "".join(t.text for t in tokens)
    save_surface(RULES, tmp_path / "surface.png")
    assert (tmp_path / "surface.png").stat().st_size > 10_000
    with pytest.raises(MismatchError, match="tags/roles"):
        token_weights(exact_cache, 0, RULES)
