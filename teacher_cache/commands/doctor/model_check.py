"""doctor --model: what `build` can make of a model, found by building.

A tiny cache of two lines of text is built in a temporary folder: with every signal at once, and where that is refused with each
alone. A model that is not small is stood for by a random one of its class with a small config, which runs the same code.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from model_taps.loading import LOADING_ERRORS, load_config, quiet
from model_taps.tiny_config import tiny_config, tiny_model
from run_kit.check import Check
from signal_store.errors import SignalStoreError
from signal_store.signals import Signals
from teacher_cache.builder.fill import fill_units
from teacher_cache.builder.seal import seal_cache
from teacher_cache.builder.session import BuildSession
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.registry import extractor_class

CONTEXT = 48
MOST_OWN_PARAMETERS = 200_000_000
"""A model of up to so many is tried with its own weights."""
SIGNALS: Mapping[str, Mapping[str, Any]] = {
    name: trial for name in Signals.model_fields if (trial := extractor_class(name).trial) is not None
}
LOG_PROBABILITIES = {"distribution": {"rank": 0, "head": 8}}
_LINES = (
    "for name in names:\n    if name in seen:\n        continue\n    while name:\n        name = name[1:]\n",
    "def grow(size):\n    try:\n        return [n for n in range(size) if n % 2]\n    except ValueError:\n        return None\n",
)


@dataclass(frozen=True, slots=True)
class Tried:
    """Of a model: how segments share its forward passes (`forward`, empty where nothing could be built), and by signal `yes`, or
    why not; `rank 0` of a distribution that can be had as log-probabilities alone."""

    forward: str
    signals: Mapping[str, str] = field(default_factory=dict)


def signal_checks(name: str) -> Iterator[Check]:
    """doctor's lines for a model's folder or hub name: what of each signal can be cached, and how its segments are batched."""
    quiet()
    try:
        config = load_config(name, what="model", trust_remote_code=False)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        with contextlib.ExitStack() as stack:
            if size <= MOST_OWN_PARAMETERS:
                tried, of = try_signals(name), "its own weights"
            else:
                model = tiny_model(tiny_config(config, BYTES))
                tried, of = try_signals(stack.enter_context(saved(model))), "a small one of its class"
    except (SignalStoreError, *LOADING_ERRORS) as error:
        yield Check("signals", "bad", " ".join(str(error).split())[:300], "No cache can be built of this model.")
        return
    for signal, found in tried.signals.items():
        state = "ok" if found == "yes" else "bad" if signal == "distribution" and found != "rank 0" else "note"
        advice = "" if found == "yes" else f"Leave signals.{signal} out." if found != "rank 0" else "signals.distribution.rank: 0"
        yield Check(f"signal {signal}", state, f"{found}, on {of}", advice)  # type: ignore[arg-type]
    yield Check("forward passes", "ok" if tried.forward else "bad", tried.forward or "none")


def try_signals(model: str | Path) -> Tried:
    """Build tiny caches of a model's folder or hub name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in _LINES))
        forward, why = _built(model, folder, "every", SIGNALS)
        if not why:
            return Tried(forward, dict.fromkeys(SIGNALS, "yes"))
        found = {}
        for signal, trial in SIGNALS.items():
            way, why = _built(model, folder, signal, {"distribution": None, signal: trial})
            if why and signal == "distribution":
                way, other = _built(model, folder, "rank-0", LOG_PROBABILITIES)
                why = why if other else "rank 0"
            forward = forward or way
            found[signal] = why or "yes"
        return Tried(forward, found)


def _built(model: str | Path, folder: Path, name: str, signals: Mapping[str, Any]) -> tuple[str, str]:
    """(how segments were batched, "") of a cache that could be built, or ("", why not)."""
    recipe = {
        "cache": folder / name,
        "teacher": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "sources": [{"name": "lines", "jsonl": folder / "texts.jsonl", "text": "text", "lexer": "python"}],
        "context": CONTEXT,
        "unit_tokens": 1024,
        "batch_tokens": 2 * CONTEXT,
        "signals": signals,
    }
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each of many small builds says nothing
            session = BuildSession.of(CacheRecipe.model_validate(recipe)).planned()
            fill_units(session.calibrated, session.objects, session.worker)
            seal_cache(session.objects)
    except SignalStoreError as error:
        return "", error.what
    except (*LOADING_ERRORS, IndexError, AssertionError) as error:
        return "", f"{type(error).__name__}, which nothing foresaw"
    plan = session.open().manifest.plan
    split = "" if plan.split_length is None else f", up to {plan.split_length} tokens apart from longer ones"
    return plan.forward + split, ""


@contextlib.contextmanager
def saved(model: PreTrainedModel) -> Iterator[Path]:
    """A folder that holds the model and a tokenizer of bytes."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        yield Path(folder)


BYTES = 257
"""Tokens of `byte_tokenizer`."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{piece: n for n, piece in enumerate(alphabet, start=1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
