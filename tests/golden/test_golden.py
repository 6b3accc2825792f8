"""The golden cache of each format version is read by this version, by plain zarr, and by readers that do not know this project."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from signal_store.cache import open_cache
from teacher_cache.commands.verify import verify
from tests.golden.archive import VERSIONS, digests, unpack

FOLDER = Path(__file__).parent

pytestmark = pytest.mark.storage

STRANGER = """
import hashlib, json, sys, warnings

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"signal_store", "model_taps", "teacher_cache", "student_train"}:
            raise ImportError(name)

sys.meta_path.insert(0, Without())
warnings.simplefilter("ignore")
import numpy as np
import tensorstore
import xarray
import zarr

root = sys.argv[1]
group = zarr.open_group(root, mode="r", zarr_format=3)
tree = xarray.open_datatree(root, engine="zarr", zarr_format=3, mask_and_scale=False)
one = xarray.open_zarr(root, group="distribution", zarr_format=3, consolidated=False, mask_and_scale=False)
spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": root + "/tokens/input_ids/"}}
chunk = tensorstore.open(spec, read=True).result()[:256].read().result()
print(json.dumps({
    "zarr": group["tokens/input_ids"][:256].tolist(),
    "xarray": tree["tokens/input_ids"].values[:256].tolist(),
    "tensorstore": chunk.tolist(),
    "dims": list(one["head_ids"].dims),
    "scalars": hashlib.sha256(np.ascontiguousarray(one["scalars"].values).tobytes()).hexdigest(),
}))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("golden") / "cache.zarr"
    unpack(request.param, root)
    return root, json.loads((FOLDER / f"{request.param}.json").read_text())


def test_it_is_read_as_it_was_written(golden: tuple[Path, dict[str, Any]]) -> None:
    root, expected = golden
    cache = open_cache(root)
    assert cache.manifest.cache_id == expected["cache_id"]
    assert len(cache) == expected["segments"]
    assert digests(root) == expected["arrays"]
    for path in cache.capacity_rows:
        assert len(cache.read(path)) == cache.seal.num_units * cache.capacity_rows[path]
    assert [len(cache[i]) > 0 for i in range(len(cache))] == [True] * len(cache)
    assert not [damage for damage in verify(str(root)).damages if "this version of zarr" not in damage.what]


def test_readers_that_do_not_know_this_project_see_the_same(golden: tuple[Path, dict[str, Any]]) -> None:
    root, _ = golden
    done = subprocess.run([sys.executable, "-c", STRANGER, str(root)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    tokens = open_cache(root).read("tokens/input_ids", 0, 256).tolist()
    assert found["zarr"] == found["xarray"] == found["tensorstore"] == tokens
    assert found["dims"] == ["token", "rank"]
    import hashlib

    scalars = np.ascontiguousarray(open_cache(root).read("distribution/scalars"))
    assert found["scalars"] == hashlib.sha256(scalars.tobytes()).hexdigest()
