"""The notebook runs from its first cell to its last on a cache it has not seen, and its committed form has its outputs."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from run_notebook import ROOT, executed
from signal_store.cache import Cache
from student_train.commands.run import run
from student_train.recipe import RunRecipe
from tests.tiny import COMMON

NOTEBOOK = ROOT / "tools" / "inspect_cache.ipynb"


def test_it_runs_on_another_cache(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for preset in ("cross_entropy", "forward_kl"):
        content = {
            "cache": cache.uri,
            "out": tmp_path / preset,
            "student": {"config": {"model_type": "llama", **COMMON, "num_hidden_layers": 2}},
            "preset": preset,
            "steps": 3,
            "stream": {"sequence_length": 48, "global_batch_rows": 4, "workers": 0},
        }
        run(RunRecipe.model_validate(content))
        runs.append(str(tmp_path / preset))
    monkeypatch.setenv("INSPECT_CACHE", cache.uri)
    monkeypatch.setenv("INSPECT_RUNS", os.pathsep.join(runs))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = executed(NOTEBOOK, seconds=200)
    pictures = [out for cell in done.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) >= 9
    assert cache.uri in str(done.cells[1].outputs[0])


def test_its_outputs_are_committed_and_say_nothing_of_the_machine() -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    shown = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.outputs and cell.execution_count == n for n, cell in enumerate(shown, start=1))
    text = NOTEBOOK.read_text()
    assert not re.findall(r"[\"' (=](/(?:home|root|tmp|work|Users|mnt|opt)/[^\"' ]*)", text)
    assert "Traceback" not in text
    assert not [out for cell in shown for out in cell.outputs if out.output_type in {"error", "stream"}]
