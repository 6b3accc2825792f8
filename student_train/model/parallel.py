"""How the processes of a run share one student: alone, replicated (DDP through accelerate), or sharded (torch's FSDP2).

`fully_shard` is called directly: accelerate turns FSDP2 into DDP on a CPU without a word, and what is tested there must be what
runs on GPUs. Both ways average gradients over ranks, which the scaling of the losses counts on.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model_taps.blocks import decoder_blocks
from signal_store.errors import InputError, MismatchError
from student_train.model.accelerate_state import forget_precision
from student_train.model.distiller import Distiller
from student_train.model.sections import ParallelSection


def accelerator_of(*, bf16: bool, **options: Any) -> Accelerator:
    """An accelerator of this precision; accelerate by itself refuses another one in a process that had one, as a notebook does.

    Without `cpu` accelerate takes each process that torchrun starts on a machine without a GPU for one that is alone.

    Raises:
        MismatchError: if accelerate sees another number of processes than WORLD_SIZE says.
    """
    forget_precision()
    made = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.accelerator.is_available(), **options)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != started:
        raise MismatchError(
            "the processes do not see each other", expected=f"{started} (WORLD_SIZE)", found=made.num_processes, where="accelerate"
        )
    return made


def refuse_lone_shard(section: ParallelSection) -> None:
    """InputError where one process alone would share: nothing would be split and nothing offloaded."""
    if section.mode == "sharded" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise InputError(
            "one process cannot share a student",
            expected="several, started by torchrun or accelerate launch",
            found=1,
            where="parallel.mode",
            remedy="Start several, or give parallel: {mode: replicated}, which one process may go on with.",
        )


@dataclass(frozen=True, slots=True)
class ParallelModel:
    """A distiller as this run trains it. `model` is what is called."""

    accelerator: Accelerator
    distiller: Distiller
    model: nn.Module

    @classmethod
    def of(cls, accelerator: Accelerator, distiller: Distiller, section: ParallelSection) -> "ParallelModel":
        """Wrap it; parameters of a sharded one are replaced, so the optimizer is made afterwards."""
        if section.mode == "sharded":
            distiller.to(accelerator.device)
            policy = CPUOffloadPolicy() if section.cpu_offload else OffloadPolicy()
            for block in decoder_blocks(distiller.student):
                fully_shard(block, offload_policy=policy)
            fully_shard(distiller, offload_policy=policy)
            return cls(accelerator, distiller, distiller)
        return cls(accelerator, distiller, accelerator.prepare(distiller))

    def reshard(self) -> None:
        """After a forward pass without a backward one: a sharded module keeps its outermost parameters whole for it."""
        for module in self.distiller.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The student in evaluation mode, without gradients; afterwards as it was."""
        student = self.distiller.student
        training = student.training
        student.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.reshard()
            student.train(training)

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-step; gradients are reduced over ranks after the last."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        waits = isinstance(self.model, FSDPModule) or last
        try:
            with contextlib.nullcontext() if waits else self.accelerator.no_sync(self.model):
                yield
        finally:  # after running out of memory too: a tap left open would listen to whatever runs next
            self.distiller.close_taps()

    def clipped_norm(self, clip: float) -> Tensor:
        """Clip the gradients to an L2 norm of at most `clip`.

        Returns:
            scalar: their norm before that, over all parameters and ranks, on the device. Nothing waits for it here.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
