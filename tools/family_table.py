"""Builds a tiny cache of a small random model of every architecture that transformers' causal LM mapping lists, and writes what came
of it as docs/families.md. `./tools/family_table NAME ...` prints the rows of these alone."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from model_taps.tiny_config import architectures, tiny_config, tiny_model
from signal_store.errors import SignalStoreError
from teacher_cache.commands.doctor.model_check import BYTES, SIGNALS, saved, try_signals

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = """# Families

What can be cached of each architecture that the causal LM mapping of transformers {version} lists. Each was built small, with random
weights, and a cache of two lines of text was built of it with every signal, as `teacher-cache doctor --model` does for a model of yours.
`./tools/family_table` makes this page; a test builds some of its rows anew.

*forward*: whether several segments share a row (`packed`), one has a row (`padded`) or a pass (`alone`); the first that gives a segment
what it gets by itself. *rank 0*: log-probabilities can be cached, but no tail. What is not supported is refused by the name in the last
column before any work. A default config is what is built: another may need more (`rope_parameters` that depend on the length).

{count} of {total} architectures give a distribution.

| architecture | forward | {signals} | why not |
|---|---|{rules}|---|
"""


def row(name: str) -> str:
    """The line of an architecture."""
    try:
        with saved(tiny_model(tiny_config(name, BYTES))) as folder:
            tried = try_signals(folder)
    except SignalStoreError as error:
        return f"| {name} | |{' |' * len(SIGNALS)} {error.what} |"
    cells = [found if found in ("yes", "rank 0") else "no" for found in tried.signals.values()]
    reasons: dict[str, list[str]] = {}
    for signal, found in tried.signals.items():
        if found not in ("yes", "rank 0"):
            reasons.setdefault(found, []).append(signal)
    why = "; ".join(f"{', '.join(signals)}: {reason}" for reason, signals in reasons.items())
    return f"| {name} | {tried.forward} | {' | '.join(cells)} | {why} |"


def gives_distribution(line: str) -> bool:
    """Whether a line says so."""
    return line.split("|")[3].strip() in ("yes", "rank 0")


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = []
    for name in names or architectures():
        lines.append(row(name))
        print(lines[-1], flush=True)
    if names:
        return
    count = Counter(gives_distribution(line) for line in lines)[True]
    rules = "|".join(["---"] * len(SIGNALS))
    facts = {
        "version": version("transformers"),
        "count": count,
        "total": len(lines),
        "signals": " | ".join(SIGNALS),
        "rules": rules,
    }
    PAGE.write_text(HEAD.format(**facts) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
