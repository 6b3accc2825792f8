"""Where in a transformer block each tap lies, family by family, and how to read it while the model runs.

Modules are found by the names families give them, not by family: a new family that keeps to the customs works at once, and
`resolve` says in words what is not there. A tap keeps the first firing only: activation checkpointing runs a block twice, and
the second run belongs to backward. Legend: B rows, S positions, d width, c residual streams (DeepSeek-V4 has several).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.blocks import decoder_blocks, num_layers, unsupported
from signal_store.errors import MismatchError
from signal_store.signals import Tap

TAPS: tuple[Tap, ...] = ("block_input", "attention_output", "ffn_input", "ffn_gate", "ffn_activation", "block_output")

_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
_FFN = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
_GATE = ("gate_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi_0", "wi", "w1", "up_proj")
_DOWN = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2")

State = tuple[Tap, int]
"""A tap and a layer, from 1."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A tap found: what a module (by its path in the model) takes in or gives out; `note` says what is special."""

    path: str
    module: nn.Module
    side: Literal["input", "output"]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Absent:
    """A tap that does not exist in a block, and why."""

    reason: str


def resolve(model: PreTrainedModel, tap: Tap, layer: int) -> Resolved | Absent:
    """The tap of a block (from 1)."""
    block = decoder_blocks(model)[layer - 1]
    path = next(name for name, module in model.named_modules() if module is block)
    if tap in ("block_input", "block_output"):
        return Resolved(path, block, "input" if tap == "block_input" else "output", _streams(model))
    if tap == "attention_output":
        name = _child(block, _ATTENTION)
        if name is None:
            return Absent(f"no attention module among {', '.join(n for n, _ in block.named_children())}")
        return Resolved(f"{path}.{name}", getattr(block, name), "output", "linear attention" if "linear" in name else "")
    ffn_name = _child(block, _FFN)
    if tap == "ffn_input":
        if ffn_name is not None:
            return Resolved(f"{path}.{ffn_name}", getattr(block, ffn_name), "input")
        return _linear(block, path, _GATE, "input")
    owner, owner_path, note = block, path, ""
    if ffn_name is not None:
        owner, owner_path = getattr(block, ffn_name), f"{path}.{ffn_name}"
    if hasattr(owner, "experts"):
        shared = _child(owner, ("shared_expert", "shared_experts", "shared_mlp"))
        if shared is None:
            return Absent("fused experts have no layer of their own to read, and there is no shared expert")
        owner, owner_path, note = getattr(owner, shared), f"{owner_path}.{shared}", "shared expert"
    found = _linear(owner, owner_path, _GATE if tap == "ffn_gate" else _DOWN, "output" if tap == "ffn_gate" else "input")
    if isinstance(found, Resolved) and found.path.endswith("gate_up_proj"):
        note = "gate half"
    return Resolved(found.path, found.module, found.side, note) if isinstance(found, Resolved) else found


def _child(module: nn.Module, names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _linear(owner: nn.Module, path: str, names: Sequence[str], side: Literal["input", "output"]) -> Resolved | Absent:
    """The first module below `owner` with one of the names, attention's own left out."""
    for name in names:
        for inner, module in owner.named_modules():
            if inner.rsplit(".", 1)[-1] == name and not any(part in inner.split(".") for part in _ATTENTION):
                return Resolved(f"{path}.{inner}", module, side)
    return Absent(f"none of {', '.join(names)} in {type(owner).__name__}")


def _streams(model: PreTrainedModel) -> str:
    streams = getattr(model.config.get_text_config(), "hc_mult", None)
    return f"mean of {streams} residual streams" if streams else ""


def tap_table(model: PreTrainedModel) -> list[tuple[int, Tap, Resolved | Absent]]:
    """Every tap of every block."""
    return [(layer, tap, resolve(model, tap, layer)) for layer in range(1, num_layers(model) + 1) for tap in TAPS]


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
        if found.note == "gate half":
            value = value.chunk(2, dim=-1)[0]
        elif found.note.startswith("mean of"):
            value = value.mean(-2)
        taken[state] = value

    return hook
