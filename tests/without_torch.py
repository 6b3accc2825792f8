"""The fixtures of conftest.py where torch is not installed, as in some environments of tools/matrix: tests read the newest golden
cache, and those that need a teacher are skipped."""

from pathlib import Path

import pytest

from signal_store.cache import Cache, open_cache
from tests.golden.archive import VERSIONS, unpack


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    root = tmp_path_factory.mktemp("cache") / "cache.zarr"
    unpack(VERSIONS[-1], root)
    return open_cache(root)


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    pytest.skip("a teacher needs torch, which is not installed")
