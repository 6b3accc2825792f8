"""Other names that recipes may use, and the names that stand for them. This file does not import torch: recipes name it.

A renamed term or preset keeps its old name here for one version. Whoever uses it is told once a process, in one line.
"""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

TERMS: Mapping[str, str] = {"forward_kl": "tla"}
"""By other name, the term's own: that of its file, its columns in metrics.jsonl and its place in a recipe's dump."""
PRESETS: Mapping[str, str] = {"demo_kl": "forward_kl", "flash_004": "logits_hidden_attention", "full_000": "every_kind"}
"""By other name, the preset's own."""


def term_name(name: str) -> str:
    """A term's own name."""
    return _own_name(name, TERMS, "losses")


def by_own_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same terms, aliases replaced. ValueError where a term stands there under two names."""
    found: dict[str, Any] = {}
    for name, options in content.items():
        own = term_name(name)
        if own in found:
            raise ValueError(f"{own} is given twice, by two names")
        found[own] = options
    return found


def preset_name(name: str) -> str:
    """A preset's own name."""
    return _own_name(name, PRESETS, "preset")


def _own_name(name: str, aliases: Mapping[str, str], where: str) -> str:
    if name not in aliases:
        return name
    _tell(f"{where}: {name} is another name of {aliases[name]}")
    return aliases[name]


@cache
def _tell(line: str) -> None:
    """Print a line, once a process."""
    print(line, file=sys.stderr)  # noqa: T201  (a person should see it while both names are known)
