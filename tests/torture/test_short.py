"""The short, seeded form of the torture; the long one is `./tools/torture`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import needs_torch

pytestmark = [pytest.mark.storage, needs_torch]
ROOT = Path(__file__).parent.parent.parent


def torture(*command: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked and killed: Linux")
def test_kills() -> None:
    assert torture("tests.torture.kills", "--kills", "6", "--seed", "1")["kills"] >= 6


def test_flips() -> None:
    assert torture("tests.torture.flips", "--flips", "25", "--seed", "1")["harm"]["bit"] == 25
