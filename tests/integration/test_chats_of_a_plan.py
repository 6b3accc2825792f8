"""What a plan records of how its chats were read."""

import json
from pathlib import Path
from typing import Any

import pytest

from signal_store.errors import InputError
from signal_store.io.objects import objects_at
from teacher_cache.commands.plan import plan
from tests.unit.test_chats import TWO, assistant, user


def test_a_plan_records_how_its_chats_were_read(tmp_path: Path, recipe_for: Any) -> None:
    chats = [[{"role": "system", "content": "Be brief."}, *(TWO * 6)], [user("Say <|end|>"), assistant("So.")]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = {"name": "chats", "jsonl": path, "messages": "messages"}
    recipe = recipe_for(tmp_path / "cache", sources=[source], signals={"distribution": {"rank": 8}})
    planned = plan(recipe)
    (identity,) = planned.sources
    assert identity.chats is not None
    assert identity.chats.model_dump() == {"kept_whole": 2, "split": 0, "answers": 13, "unseen_reasoning": 0}
    assert identity.special_tokens_as_text == 1
    unit = planned.unit(objects_at(recipe.cache), 0)
    windows = [unit.input_ids[start : start + length] for start, length in zip(unit.token_start, unit.length, strict=True)]
    assert len(windows) > 2
    for window, context_only in zip(windows[1:-1], unit.context_only[1:-1], strict=True):
        assert (window[:context_only] == windows[0][:context_only]).all()
        assert context_only > 1
    assert unit.finished.tolist() == [0] * (len(windows) - 2) + [1, 1]
    with pytest.raises(InputError, match="longer than the context"):
        plan(recipe_for(tmp_path / "other", sources=[{**source, "long_chats": "refuse"}], signals={"distribution": {"rank": 8}}))
