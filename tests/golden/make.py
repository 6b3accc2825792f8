"""Makes the golden cache of this format version: `python -m tests.golden.make`. Every later version reads what it wrote."""

import json
import tempfile
import zipfile
from pathlib import Path

import torch

from signal_store.manifest import FORMAT_VERSION
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe
from tests.golden.archive import FOLDER, digests
from tests.torture.material import make_material, recipe_at

ARCHIVE = FOLDER / f"cache-v{FORMAT_VERSION}.zip"
EXPECTED = FOLDER / f"cache-v{FORMAT_VERSION}.json"


def golden_recipe(folder: Path) -> CacheRecipe:
    """A small cache with every signal."""
    recipe = recipe_at(folder, folder / "cache.zarr")
    sources = tuple(source.model_copy(update={"max_documents": 6}) for source in recipe.sources)
    return recipe.model_copy(update={"sources": sources, "unit_tokens": 256, "teacher": recipe.teacher})


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_material(folder)
        cache = build(golden_recipe(folder))
        root = Path(cache.uri)
        EXPECTED.write_text(
            json.dumps({"cache_id": cache.manifest.cache_id, "segments": len(cache), "arrays": digests(root)}, indent=1) + "\n"
        )
        with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                archive.writestr(zipfile.ZipInfo(path.relative_to(root).as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
