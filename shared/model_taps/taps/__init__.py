"""Places of a transformer block, a file each: its name is the tap's, part of the format, since caches carry it; `find` says where
the tap lies in a block, or why it does not. The names are known without torch."""

import pkgutil

_IN_ORDER = ("block_input", "attention_output", "ffn_input", "ffn_gate", "ffn_activation", "block_output")


def tap_names() -> tuple[str, ...]:
    """All of them, as a token passes them; further ones follow, by name."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return (*_IN_ORDER, *sorted(found - set(_IN_ORDER)))
