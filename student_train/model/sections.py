"""How a recipe says what several processes do with one student. This file does not import torch."""

from typing import Literal, Self

from pydantic import model_validator

from signal_store.format.section import Section


class ParallelSection(Section):
    """How several processes (started by torchrun or accelerate launch) share the student: each holds all of it, or a shard
    (FSDP2)."""

    mode: Literal["replicated", "sharded"] = "replicated"
    """`sharded` is for two processes or more: one alone is refused."""
    cpu_offload: bool = False
    """Keep the shards in host memory between uses (sharded only)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cpu_offload and self.mode != "sharded":
            raise ValueError("cpu_offload needs mode: sharded")
        return self
