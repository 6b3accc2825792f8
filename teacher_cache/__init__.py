"""Runs a teacher once and writes down what it thought: plan, calibrate, fill, seal; or build, which does all four."""

from typing import Any

__all__ = ["build", "calibrate", "fill", "plan", "seal"]


def __getattr__(name: str) -> Any:  # the verbs import torch; `teacher-cache --help` must not
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(f"teacher_cache.commands.{name}"), name)
    raise AttributeError(name)
