"""Streams a sealed cache and trains students from it, with no teacher in memory: run, explain."""

from typing import Any

__all__ = ["explain", "run"]


def __getattr__(name: str) -> Any:  # the verbs import torch; `student-train --help` must not
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(f"student_train.commands.{name}"), name)
    raise AttributeError(name)
