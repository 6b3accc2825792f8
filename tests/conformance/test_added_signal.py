"""A signal is added by files alone: in copies of the source, those of docs/extending.md and one that is sampled and calibrated build,
verify, repair and read like the signals that came with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from signal_store.errors import InputError
from tests.conftest import RecipeMaker
from tests.tiny import needs_torch

pytestmark = needs_torch
ROOT = Path(__file__).parents[2]

PACE = {
    "shared/signal_store/signals/pace.py": '''
"""How far final hidden states are from their mean, at every n-th token."""
from typing import ClassVar
from pydantic import Field
from signal_store.format.arrays import ArraySpec
from signal_store.format.grid import position_array, rounded_capacity, row_range_arrays
from signal_store.signals.base import Dimensions, Meaning, Signal

class PaceSignal(Signal):
    meanings: ClassVar[tuple[Meaning, ...]] = (Meaning(r"pace/values", "distance from the mean", "mean distance"),)
    every: int = Field(4, ge=1)

    def arrays(self, dimensions: Dimensions) -> tuple[ArraySpec, ...]:
        rows = dimensions.capacities.rows("pace_rows")
        values = ArraySpec.of("pace/values", "float32", rounded_capacity(rows), "row", shuffle="shuffle")
        return (*row_range_arrays("pace", dimensions.capacities.segments), position_array("pace", rows), values)
''',
    "teacher_cache/signals/pace.py": """
import numpy as np
import torch
from signal_store.signals.pace import PaceSignal
from teacher_cache.signals.base import SampledExtractor
from teacher_cache.signals.extracted import Extracted, numpy_of

class PaceExtractor(SampledExtractor[PaceSignal, tuple[torch.Tensor, float]]):
    def positions(self, unit):
        return np.flatnonzero((unit.place_in_segment % self.section.every == 0) & ~unit.is_context)

    def collect(self, facts, batch):
        return batch.outputs.hidden.float().cpu()[torch.from_numpy(~batch.is_context)]

    def fit(self, facts, collected, sample):
        states = torch.cat(collected)
        mean = states.mean(0)
        return {"distance": float((states - mean).norm(dim=1).mean())}, {"pace/mean": mean.numpy()}

    def prepare(self, facts, manifest, arrays, teacher):
        return torch.from_numpy(arrays["pace/mean"]).to(teacher.device), facts["distance"]

    def extract(self, prepared, batch):
        (mean, distance), rows = prepared, batch.rows_of(batch.work.once(self.positions))
        far = (batch.outputs.hidden[rows].float() - mean).norm(dim=1) / distance
        return Extracted({"pace/values": numpy_of(far, "float32")})
""",
}

BUILD = """
import json, sys
from pathlib import Path
import numpy as np
import torch
import signal_store, teacher_cache
from model_taps.head import final_hidden
from run_kit.recipe_file import load_recipe
from signal_store.errors import MismatchError
from signal_store.ledger.documents import CALIBRATION, read_document
from signal_store.io.objects import objects_at
from signal_store.signals import meaning
from teacher_cache.commands.build import build
from teacher_cache.commands.estimate import estimate
from teacher_cache.commands.repair import repair
from teacher_cache.commands.verify import verify
from teacher_cache.recipe import CacheRecipe
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
recipe = load_recipe(sys.argv[1], (), CacheRecipe)
low, high = estimate(recipe, quick=True).bytes_per_token["sharpness"]
cache = build(recipe)
root = Path(cache.uri)
assert not verify(cache.uri).damages
flipped = {}
for path in ("sharpness/values", "pace/values"):
    shard = root / path / "c" / "0"
    flipped[shard] = shard.read_bytes()
    data = bytearray(flipped[shard])
    data[40] ^= 1
    shard.write_bytes(data)
assert {damage.key for damage in verify(cache.uri).damages} == {str(shard.relative_to(root)) for shard in flipped}
assert set(repair(recipe).restored) >= {str(shard.relative_to(root)) for shard in flipped}
assert all(shard.read_bytes() == data for shard, data in flipped.items())

model = AutoModelForCausalLM.from_pretrained(recipe.teacher.model, dtype=torch.float32)
manifest, facts = cache.manifest, read_document(objects_at(cache.uri), CALIBRATION).body["signals"]
assert manifest.calibration.signals == facts and set(facts) == {"pace"}
mean = torch.from_numpy(cache.read("calibration/pace/mean"))
sharp, far = [], []
position, values = cache.read("pace/rows/position"), cache.read("pace/values")
for index in (0, 5, -1):
    segment = cache[index]
    ids = torch.from_numpy(segment.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        p = (model(ids, use_cache=False).logits[0, :, : manifest.tokenizer.vocab_size] / 2.0).softmax(1).amax(1)
        states = final_hidden(model, ids, None)[0]
    start, own = segment.token_start, slice(segment.context_only, len(segment))
    stored = cache.read("sharpness/values", start, start + len(segment))
    assert np.isnan(stored[: segment.context_only]).all()
    sharp.append(float(np.abs(stored[own] - p.numpy()[own]).max()))
    mine = (position >= start) & (position < start + len(segment))
    places = torch.from_numpy(position[mine] - start)
    assert places.tolist() == [t for t in range(segment.context_only, len(segment)) if t % 3 == 0]
    live = (states[places] - mean).norm(dim=1) / facts["pace"]["distance"]
    far.append(float((torch.from_numpy(values[mine]) - live).abs().max()))
other = recipe.model_copy(update={"signals": recipe.signals.model_copy(update={"pace": type(recipe.signals.pace)(every=2)})})
try:
    build(other)
except MismatchError as error:
    refused = str(error)
print(json.dumps({
    "sharp": max(sharp), "far": max(far), "low": low, "high": high, "refused": refused, "meaning": meaning("sharpness/values"),
    "where": [signal_store.__file__, teacher_cache.__file__], "capacity": manifest.plan.capacities.rows("pace_rows"),
}))
"""


def page_files(kind: str) -> dict[str, str]:
    """By name the files of docs/extending.md's signal part."""
    text = (ROOT / "docs" / "extending.md").read_text()
    part = text[text.index("## Add a signal") :]
    found = dict(re.findall(rf'^```{kind} title="([^"]+)"\n(.*?)^```$', part, re.MULTILINE | re.DOTALL))
    return {name: content for name, content in found.items() if not name.startswith("student_train")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This version, and two more signals."""
    root = tmp_path_factory.mktemp("added")
    for name in ("shared", "teacher_cache"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shown = page_files("python")
    assert set(shown) == {"shared/signal_store/signals/sharpness.py", "teacher_cache/signals/sharpness.py"}
    for name, content in {**shown, **PACE}.items():
        assert not (root / name).exists()
        (root / name).write_text(content)
    return root


def test_files_alone_add_a_signal(source: Path, tmp_path: Path, recipe_for: RecipeMaker) -> None:
    recipe = recipe_for(tmp_path / "c.zarr", signals={"distribution": {"rank": 4}}, overlap=8)
    content = recipe.model_dump(mode="json", exclude_unset=True)
    content["signals"] |= {"sharpness": {"temperature": 2.0}, "pace": {"every": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{source / 'shared'}"}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=source)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(str(source) in where for where in found["where"])
    assert found["sharp"] < 1e-3
    assert found["far"] < 1e-4
    assert found["meaning"] == ["largest probability", "probability"]
    assert 0 < found["low"] < 2 < found["high"]
    assert found["capacity"] > 0
    assert "signals.pace.every: 3" in found["refused"]


def test_a_signal_without_a_teachers_file_is_one_line() -> None:
    from teacher_cache.signals.registry import extractor_class

    with pytest.raises(InputError, match=r"nothing says how the signal nowhere is taken .*teacher_cache/signals/nowhere\.py"):
        extractor_class("nowhere")
