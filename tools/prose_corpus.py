"""English prose that every machine has: the language reference that Python brings (`pydoc_data.topics`), and docstrings of its
standard library and of the packages this project installs.

Policy: a document is a topic, or the docstrings of one module in their order, without short ones. As in `stdlib_corpus`, a document
belongs to the side its family hashes to: the module's top-level name and, of an installed package, its first subpackage.
"""

import ast
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from stdlib_corpus import Split, modules, split_of

PACKAGES = ("numpy", "torch", "matplotlib")
"""Not transformers: its docstrings say the same thing five hundred times."""
SHORTEST_CHARACTERS = 200
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Passage:
    """One document: where it comes from (`kind`: reference, docstrings), its `name`, its `text` and its `split`."""

    kind: str
    name: str
    text: str
    split: Split


def passages(packages: tuple[str, ...] = PACKAGES) -> Iterator[Passage]:
    """The reference, then docstrings of the standard library, then those of the packages that are installed; each in order of name."""
    for name, text in sorted(topics.items()):
        yield Passage("reference", name, text, split_of(name))
    for module in modules():
        if not module.is_test and (text := docstrings(module.text)):
            yield Passage("docstrings", module.name, text, module.split)
    for package in packages:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            for module in modules(Path(place)):
                if not module.is_test and (text := docstrings(module.text)):
                    yield Passage(
                        "docstrings", f"{package}.{module.name}", text, split_of(f"{package} {module.name.split('.')[0]}")
                    )


def docstrings(source: str) -> str:
    """The longer docstrings of a module, a blank line between them; nothing of what does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DEFINITIONS))
    return "\n\n".join(text for text in found if text and len(text) >= SHORTEST_CHARACTERS)


def write_corpus(folder: Path, packages: tuple[str, ...] = PACKAGES) -> dict[Split, Path]:
    """`train.jsonl` and `validation.jsonl` (columns name, kind, text) in a folder, unless they lie there."""
    paths: dict[Split, Path] = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    found = list(passages(packages))
    for split, path in paths.items():
        lines = [json.dumps({"name": p.name, "kind": p.kind, "text": p.text}) for p in found if p.split == split]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
