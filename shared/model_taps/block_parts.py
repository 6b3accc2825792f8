"""A transformer block, and its parts by the names that families give them: a new family that keeps to the customs works at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.blocks import decoder_blocks

Side = Literal["input", "output"]

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
FFN = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
GATE = ("gate_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi_0", "wi", "w1", "up_proj")
DOWN = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2")
SHARED_EXPERT = ("shared_expert", "shared_experts", "shared_mlp")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A tap found: what a module (by its path in the model) takes in or gives out; `note` says what is special, and `read` makes
    the state of the tensor [B, S, ...] that passes there, where it is not that itself."""

    path: str
    module: nn.Module
    side: Side
    note: str = ""
    read: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Absent:
    """A tap that does not exist in a block, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """A module of a model, and its path there."""

    path: str
    module: nn.Module
    note: str = ""

    def child(self, names: Sequence[str]) -> "Part | None":
        """The first child of one of these names."""
        for name in names:
            if isinstance(found := getattr(self.module, name, None), nn.Module):
                return Part(f"{self.path}.{name}", found, self.note)
        return None

    def linear(self, names: Sequence[str], side: Side) -> Resolved | Absent:
        """The first module below of one of these names, attention's own left out."""
        for name in names:
            for inner, module in self.module.named_modules():
                if inner.rsplit(".", 1)[-1] == name and not any(part in inner.split(".") for part in ATTENTION):
                    return Resolved(f"{self.path}.{inner}", module, side, self.note)
        return Absent(f"none of {', '.join(names)} in {type(self.module).__name__}")

    def at(self, side: Side) -> Resolved:
        """What it takes in or gives out."""
        return Resolved(self.path, self.module, side, self.note)


@dataclass(frozen=True, slots=True)
class Block(Part):
    """A transformer block. `streams`: how many residual streams it carries, where it is more than one (DeepSeek-V4)."""

    streams: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, layer: int) -> "Block":
        """The block of this number, from 1."""
        block = decoder_blocks(model)[layer - 1]
        path = next(name for name, module in model.named_modules() if module is block)
        return cls(path, block, streams=getattr(model.config.get_text_config(), "hc_mult", None))

    def residual(self, side: Side) -> Resolved:
        """What the block takes in or gives out, the mean of its streams where there are several."""
        if self.streams is None:
            return self.at(side)
        return Resolved(self.path, self.module, side, f"mean of {self.streams} residual streams", lambda state: state.mean(-2))

    def dense_ffn(self) -> Part | Absent:
        """The module whose layers every token passes: the FFN, the shared expert of a mixture, or the block itself, where its FFN
        has no module of its own."""
        owner = self.child(FFN) or self
        if not hasattr(owner.module, "experts"):
            return owner
        shared = owner.child(SHARED_EXPERT)
        if shared is None:
            return Absent("fused experts have no layer of their own to read, and there is no shared expert")
        return Part(shared.path, shared.module, "shared expert")
