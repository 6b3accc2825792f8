"""How each signal is read and batched, a file each, found by the file's name."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from student_train.data.signals.base import Request


@cache
def request_kinds() -> Mapping[str, type[Request]]:
    """By name of every signal that has a file here, its request; TypeError naming a file that has not one."""
    found: dict[str, type[Request]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        kinds = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        own = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Request) and kind.signal() == module.name]
        if len(own) != 1:
            raise TypeError(f"{__name__}.{module.name} must have one class of Request, and has {len(own)}")
        found[module.name] = own[0]
    return found
