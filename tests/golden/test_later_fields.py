"""A version whose recipes, signals and manifests have fields that came later opens, extends and resumes what this one made."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from signal_store.cache import open_cache
from teacher_cache.commands.build import build
from tests.conftest import RecipeMaker
from tests.golden.test_golden import FOLDER
from tests.tiny import needs_torch

pytestmark = [pytest.mark.storage, needs_torch]
ROOT = FOLDER.parents[1]

OPEN = """
import json, sys
from signal_store.cache import open_cache
cache = open_cache(sys.argv[1])
assert cache.manifest.signals.distribution.came_later == 7
assert cache.manifest.teacher.came_later == 7
print(json.dumps({"cache_id": cache.manifest.cache_id, "segments": len(cache)}))
"""

BUILD = """
import json, sys
from run_kit.recipe_file import load_recipe
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe
from teacher_cache.commands.verify import verify
recipe = load_recipe(sys.argv[1], (), CacheRecipe)
assert recipe.sources[0].came_later == 7
assert recipe.signals.distribution.came_later == 7
cache = build(recipe)
print(json.dumps({"cache_id": cache.manifest.cache_id, "damages": len(verify(cache.uri).damages)}))
"""


@pytest.fixture(scope="module")
def later_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This version, with one more field in every section of recipes, signals and manifests."""
    root = tmp_path_factory.mktemp("later")
    for name in ("shared", "teacher_cache"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    signals = sorted((root / "shared/signal_store/signals").glob("*.py"))
    others = ("shared/signal_store/format/capacities.py", "shared/signal_store/manifest.py", "teacher_cache/recipe.py")
    for path in [*(path for path in signals if path.stem not in ("base", "tags")), *(root / name for name in others)]:
        lines = path.read_text().splitlines()
        sections = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and _is_section(n)]
        for section in reversed(sections):
            lines.insert(section.body[0].end_lineno or 0, "    came_later: int = 7")  # after its docstring
        assert sections
        path.write_text("\n".join(lines) + "\n")
    return root


def _is_section(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in ("Section", "Signal") for base in node.bases)


def run(later_version: Path, code: str, argument: Path) -> dict[str, object]:
    command = [sys.executable, "-c", code, str(argument)]
    environment = {**os.environ, "PYTHONPATH": f"{later_version}:{later_version}/shared"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=later_version)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("cache-v*.json")))
def test_a_later_version_opens_the_golden_cache(later_version: Path, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        archive.extractall(tmp_path / "cache.zarr")
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    found = run(later_version, OPEN, tmp_path / "cache.zarr")
    assert (found["cache_id"], found["segments"]) == (expected["cache_id"], expected["segments"])


def test_a_later_version_goes_on_with_a_cache_that_this_one_began(
    later_version: Path, tmp_path: Path, recipe_for: RecipeMaker
) -> None:
    signals = {"distribution": {"rank": 4}, "hidden": {"positions": {"every": 3}, "rank": 4}, "replay": {}}
    recipe = recipe_for(tmp_path / "c.zarr", signals=signals)
    build(recipe)
    for seal in (tmp_path / "c.zarr/ledger/seals").iterdir():
        seal.unlink()
    max((tmp_path / "c.zarr/ledger/units").iterdir()).unlink()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    found = run(later_version, BUILD, tmp_path / "recipe.yaml")
    assert found["cache_id"] == open_cache(tmp_path / "c.zarr").manifest.cache_id
    assert found["damages"] == 0
