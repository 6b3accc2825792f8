"""Names of terms and presets that recipes used before. This file does not import torch: recipes name it."""

from collections.abc import Mapping
from typing import Any

from signal_store.format.renamed import by_current_names, current_name

TERMS: Mapping[str, str] = {"tla": "forward_kl"}
"""By name of before, the term's own: that of its file, its columns in metrics.jsonl and its place in a recipe's dump."""
PRESETS: Mapping[str, str] = {"demo_kl": "forward_kl", "flash_004": "logits_hidden_attention", "full_000": "every_kind"}
"""By name of before, the preset's own."""


def by_own_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same terms by their own names. ValueError where a term stands there under two."""
    return by_current_names(content, TERMS, "losses")


def preset_name(name: str) -> str:
    """A preset's own name."""
    return current_name(name, PRESETS, "preset")
