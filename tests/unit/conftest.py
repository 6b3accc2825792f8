"""Unit tests build no cache: whoever asks for one here is told where it belongs."""

import pytest


@pytest.fixture(scope="session")
def recipe_for() -> None:
    raise pytest.UsageError("a unit test builds no cache: move it to tests/integration, or to tests/conformance")
