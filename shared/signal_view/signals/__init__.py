"""How each signal is shown, a file each, found by the file's name; a signal without a file is shown as it is stored."""

import importlib
import pkgutil
from functools import cache as remembered

from signal_store.cache import Cache
from signal_store.signals import TagsSignal
from signal_view.signals.base import SignalView


@remembered
def view_of(signal: str) -> SignalView:
    """Of a signal by its name; TypeError where its file has not one class of `SignalView`."""
    if signal not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return SignalView(signal)
    module = importlib.import_module(f"{__name__}.{signal}")
    kinds = [
        k for k in vars(module).values() if isinstance(k, type) and issubclass(k, SignalView) and k.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise TypeError(f"{module.__name__} must have one class of SignalView, and has {len(kinds)}")
    return kinds[0](signal)


def views_of(cache: Cache) -> list[SignalView]:
    """Of all signals that a cache holds, tags last."""
    views = [view_of(name) for name in (*dict(cache.manifest.signals.cached()), TagsSignal.name())]
    return [view for view in views if any(view.holds(path) for path in cache.capacity_rows)]
