"""Runs `tools/inspect_cache.ipynb` and keeps its outputs, with paths told from the project's root. `./tools/demo` comes first."""

import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def executed(path: Path, seconds: int = 600) -> nbformat.NotebookNode:
    """The notebook with its outputs; CellExecutionError where a cell fails."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would like widgets
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def without_paths(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Nothing of the machine it ran on: neither where, nor when."""
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    text = json.dumps(notebook).replace(f"{ROOT}/", "")
    cleaned: nbformat.NotebookNode = nbformat.reads(text, as_version=4)
    return cleaned


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tools" / "inspect_cache.ipynb"
    nbformat.write(without_paths(executed(where)), where)
    print(where)
