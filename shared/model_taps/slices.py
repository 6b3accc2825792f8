"""Reading the taps of a model while it runs.

`resolve` says in words what is not there. A tap keeps the first firing only: activation checkpointing runs a block twice, and the
second run belongs to backward. Legend: B rows, S positions, d width, c residual streams (DeepSeek-V4 has several).
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps import taps
from model_taps.block_parts import Absent, Block, Resolved
from model_taps.blocks import num_layers, unsupported
from signal_store.errors import MismatchError
from signal_store.signals import Tap

State = tuple[Tap, int]
"""A tap and a layer, from 1."""


def resolve(model: PreTrainedModel, tap: Tap, layer: int) -> Resolved | Absent:
    """The tap of a block (from 1)."""
    if tap not in taps.tap_names():  # a cache of a version that has more
        return Absent(f"this version knows {', '.join(taps.tap_names())}")
    found: Resolved | Absent = importlib.import_module(f"{taps.__name__}.{tap}").find(Block.of(model, layer))
    return found


def tap_table(model: PreTrainedModel) -> list[tuple[int, Tap, Resolved | Absent]]:
    """Every tap of every block."""
    return [(layer, tap, resolve(model, tap, layer)) for layer in range(1, num_layers(model) + 1) for tap in taps.tap_names()]


@contextlib.contextmanager
def tap_states(model: PreTrainedModel, wanted: Sequence[State]) -> Iterator[dict[State, Tensor]]:
    """Within the block, a forward pass fills the dict: (tap, layer) -> its tensor [B, S, d], in the model's dtype, in the graph.

    MismatchError for a tap that does not exist. ("block_output", l) equals `hidden_states[l]` of `output_hidden_states=True`,
    but for the last block, which transformers normalises.
    """
    taken: dict[State, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for state in wanted:
            found = resolve(model, *state)
            if isinstance(found, Absent):
                raise MismatchError(
                    f"block {state[1]} has no {state[0]}",
                    expected="a tap that exists",
                    found=found.reason,
                    where=type(model).__name__,
                    remedy="`teacher-cache taps MODEL` lists what there is.",
                )
            register = found.module.register_forward_pre_hook if found.side == "input" else found.module.register_forward_hook
            hooks.callback(register(_keeper(taken, state, found), with_kwargs=True).remove)
        yield taken


def refuse_silent_taps(
    model: PreTrainedModel, taken: Mapping[State, Tensor], wanted: Sequence[State], shape: Sequence[int]
) -> None:
    """InputError naming a tap that never fired in a pass over tokens [B, S] = `shape`, or that is not of one row per token."""
    for state in wanted:
        if state not in taken:
            raise unsupported(model, f"{state[0]} of block {state[1]} never came", "a module that was not called")
        sizes = tuple(taken[state].shape)
        rows = sizes[:2] if len(sizes) > 2 else sizes[:1]
        if rows != tuple(shape) and (len(sizes) > 2 or rows[0] != math.prod(shape)):
            raise unsupported(
                model, f"{state[0]} of block {state[1]} is not of one row per token", f"{sizes} of tokens {tuple(shape)}"
            )


def _keeper(taken: dict[State, Tensor], state: State, found: Resolved) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if state in taken:
            return
        value = output if found.side == "output" else (args[0] if args else kwargs.get("hidden_states"))
        value = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(value, Tensor):
            return  # `refuse_silent_taps` names it
        taken[state] = value if found.read is None else found.read(value)

    return hook
