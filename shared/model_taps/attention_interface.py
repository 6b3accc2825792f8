"""The one file that knows what transformers does not promise of its attention: the name of a model's kernel, the two registries
that turn such a name into functions, and where a family keeps its eager one.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from signal_store.errors import InputError
from signal_store.nearest import nearest

PREFIX = "tapped_"

Kernel = Callable[..., Any]
"""(module, query, key, value, attention_mask, **options) -> (output, probabilities or None)."""

_kernels: dict[str, str] = {}
"""By the name that a function around a kernel is registered under, the kernel. Kept, for the name does not tell: a kernel of the
hub has a slash in its own, which transformers would look for there."""


def own_kernel(model: PreTrainedModel) -> str:
    """The attention that a model computes with, as `set_attn_implementation` takes it, whether or not something is around it."""
    name = _registered(model)
    return _kernels.get(name, name)


def refuse_unknown_kernel(name: str, where: str) -> None:
    """InputError for an attention implementation that transformers does not know and that is no kernel of the hub. Whether it is
    installed, and whether a family has it, shows when a model is built."""
    known = sorted({"eager", *AttentionInterface()} - _kernels.keys())
    if name not in known and "/" not in name:
        found = f"{name} (perhaps {near})" if (near := nearest(name, known)) else name
        raise InputError("no such attention implementation", expected=", ".join(known), found=found, where=where)


def put_around_kernel(model: PreTrainedModel, around: Callable[[str], Kernel]) -> None:
    """Route the model's attention through `around(its kernel's name)`, with the kernel's own masks; idempotent."""
    kernel = _registered(model)
    if kernel in _kernels:
        return
    name = PREFIX + kernel.replace("/", "_")
    while _kernels.setdefault(name, kernel) != kernel:
        name += "_"
    AttentionInterface.register(name, around(kernel))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[kernel])
    model.set_attn_implementation(name)


def kernel_function(kernel: str, module: nn.Module) -> Kernel:
    """What computes attention under this name, for a module of a family. InputError where the family has no eager function."""
    if kernel != "eager":
        return AttentionInterface()[kernel]  # type: ignore[no-any-return]
    function: Kernel | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise InputError("attention rows need the family's eager attention", found="none", where=type(module).__module__)
    return function


def _registered(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)  # noqa: SLF001  (transformers has no public getter)
