"""Which layers a signal is taken of: by depth fractions, or by number."""

from collections.abc import Sequence


def check_layers(layers: Sequence[int] | None, *, default: bool) -> None:
    """ValueError where layers are named twice, or beside depths that are not the `default` ones."""
    if layers is not None and not default:
        raise ValueError("depths and layers exclude each other")
    if layers is not None and len(set(layers)) != len(layers):
        raise ValueError("layers names one twice")
