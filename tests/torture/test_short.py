"""The short, seeded form of the torture; the long one is `./tools/torture`."""

import sys

import pytest

from tests.tiny import HAS_TORCH, needs_torch

if HAS_TORCH:
    from tests.torture import flips, kills

pytestmark = [pytest.mark.storage, needs_torch]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked and killed: Linux")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_kills() -> None:
    assert kills.run(6, seed=1)["kills"] >= 6


def test_flips() -> None:
    assert flips.run(15, seed=1)["harm"]["bit"] == 15
