"""From what a recipe asks for to a run that can take its next step: probed, restored from its last checkpoint, parallel out.

The order matters: the student is probed before anything wraps it, a checkpoint is loaded before the student is shared, and the
optimizer is made afterwards, for sharding replaces the parameters.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.attention_interface import own_kernel
from model_taps.causality import refuse_look_ahead
from model_taps.head import refuse_another_head
from signal_store.cache import Cache
from signal_store.errors import MismatchError
from student_train.align.aligned_cache import student_vocabulary
from student_train.data.codecs import Codecs
from student_train.data.request import SignalRequest
from student_train.data.stream import Stream
from student_train.evaluate.validation import Validation
from student_train.losses.attention_rows import HeadPairs
from student_train.losses.objective import Objective
from student_train.losses.parameter_anchor import Anchor
from student_train.losses.router_balance import refuse_lost_losses
from student_train.model.distiller import Distiller
from student_train.model.parallel import ParallelModel
from student_train.student.build import build_student
from student_train.student.packing import packs_rows
from student_train.student.sections import StudentSection
from student_train.student.sharded import like
from student_train.train import checkpoint
from student_train.train.optimizer import build_optimizer
from student_train.train.progress import Progress
from student_train.train.settings import TrainSettings

HEAD_MATCHING_BATCHES = 64
HEAD_MATCHING_ROWS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A run that stands at `progress`; its other state is in the parameters of `parallel` and in the `optimizer`."""

    settings: TrainSettings
    cache: Cache
    objective: Objective
    parallel: ParallelModel
    optimizer: torch.optim.Optimizer
    anchor: Anchor | None
    stream: Stream
    progress: Progress

    @property
    def accelerator(self) -> Accelerator:
        """Of its processes."""
        return self.parallel.accelerator

    @property
    def validation(self) -> Validation | None:
        """What it is validated by, if at all."""
        return validation_of(self.settings, self.cache)


def validation_of(settings: TrainSettings, cache: Cache) -> Validation | None:
    """The evaluation that the recipe asks for."""
    asked = settings.validation
    return None if asked is None else Validation(cache, with_teacher=asked.fidelity)


def start(
    settings: TrainSettings,
    accelerator: Accelerator,
    cache: Cache,
    distiller: Distiller,
    run_id: str,
    packed: bool | None = None,
) -> Run:
    """Bring a run to where its last checkpoint left it, or to its beginning. Every rank must call this.

    Args:
        distiller: the student as the recipe builds it, with the objective's terms; not wrapped yet.
        run_id: the digest that names the run: a checkpoint of another is refused.
        packed: whether rows held several segments when the run began; None if it begins now.
    Raises:
        InputError: if the student or the stream cannot be trained as the recipe says.
        MismatchError: if the checkpoint is another run's, or this student cannot keep segments of a row apart any more.
    """
    objective, device = distiller.objective, accelerator.device
    distiller.to(device)
    objective.to(device)
    able = _probe(settings, accelerator, cache, distiller)
    ranks = accelerator.process_index, accelerator.num_processes
    stream = Stream(cache, objective.needs, settings.stream, _packs(able, packed, distiller), *ranks, objective.token_weights)
    found = checkpoint.newest(settings.out / "checkpoints")
    fresh = Progress.begin(cache.manifest.cache_id, run_id)
    progress = fresh if found is None else _restored(found, distiller, fresh, accept=settings.checkpoint.accept_other_cache)
    if settings.activation_checkpointing:
        _checkpoint_activations(distiller.student)
    anchored = objective.losses.parameter_anchor is not None
    begun = _weights_at_the_start(settings.student, cache) if anchored else {}
    parallel = ParallelModel.of(accelerator, distiller, settings.parallel)
    anchor = Anchor.of(distiller.student, begun, like) if anchored else None
    del begun
    optimizer = build_optimizer(distiller, settings.optimizer)
    if found is not None:
        checkpoint.restore_optimizer(found, optimizer)
    distiller.codecs = Codecs.of(cache, _needed_signals(settings, cache, objective), device, settings.tail_rank)
    if objective.matched_layers and not progress.head_pairs:
        progress = replace(progress, head_pairs=_match_heads(parallel, stream))
    distiller.head_pairs = progress.head_pairs
    return Run(settings, cache, objective, parallel, optimizer, anchor, stream, progress)


def _probe(settings: TrainSettings, accelerator: Accelerator, cache: Cache, distiller: Distiller) -> bool:
    """Refuse a student that training would be wrong for; whether it can keep the segments of a row apart.

    Probes run in float32, where rounding is far below what they look for; FlashAttention has none.
    """
    student, vocab_size = distiller.student, student_vocabulary(cache)
    with accelerator.autocast() if "flash" in own_kernel(student) else contextlib.nullcontext():
        refuse_look_ahead(student, vocab_size, "student")
        refuse_another_head(student, vocab_size, "student")
        distiller.refuse_silent_rows()
        refuse_lost_losses(student, vocab_size, distiller.objective.balance)
        return packs_rows(student, cache, settings.stream.sequence_length, settings.stream.forward_rows)


def _packs(able: bool, packed: bool | None, distiller: Distiller) -> bool:
    """Whether rows hold several segments: as they did when the run began. MismatchError where this student cannot."""
    if packed and not able:
        raise MismatchError(
            "the run's rows hold several segments, which this student does not keep apart here",
            expected="the attention that the run began with",
            found=own_kernel(distiller.student),
            where="student.attn_implementation",
        )
    return able if packed is None else packed


def _restored(path: Path, distiller: Distiller, fresh: Progress, *, accept: bool) -> Progress:
    """Load a checkpoint's weights; its progress, or, of another cache or recipe and if that is accepted, its step alone.
    MismatchError where it is not."""
    progress = checkpoint.restore_module(path, distiller)
    for name in ("cache_id", "recipe_digest"):
        if getattr(progress, name) != getattr(fresh, name) and not accept:
            raise MismatchError(
                f"the checkpoint has another {name}",
                expected=getattr(fresh, name),
                found=getattr(progress, name),
                where=path,
                remedy="Give another out; or checkpoint.accept_other_cache, to go on with this cache from its beginning.",
            )
    if (progress.cache_id, progress.recipe_digest) == (fresh.cache_id, fresh.recipe_digest):
        return progress
    # Another cache's or recipe's places, heads and best loss mean nothing here.
    if distiller.gate is not None:
        distiller.gate.forget()
    return replace(
        fresh, step=progress.step, stream_start=progress.step, tokens=progress.tokens, train_seconds=progress.train_seconds
    )


def _checkpoint_activations(student: PreTrainedModel) -> None:
    """transformers 5 has a new word for it."""
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _weights_at_the_start(section: StudentSection, cache: Cache) -> Mapping[str, Tensor]:
    """The student's weights as the run began with them; on a resumed run they are made again as they were made then."""
    student, _ = build_student(section, cache)
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


def _needed_signals(settings: TrainSettings, cache: Cache, objective: Objective) -> SignalRequest:
    """What steps and validations read of the cache."""
    validation = validation_of(settings, cache)
    return objective.needs if validation is None else objective.needs | validation.needs


def _match_heads(parallel: ParallelModel, stream: Stream) -> HeadPairs:
    """On the stream's first rows, the same for every rank and whatever a micro-batch holds."""
    config = stream.config.model_copy(update={"micro_batch_rows": math.gcd(HEAD_MATCHING_ROWS, stream.config.global_batch_rows)})
    first = replace(stream, config=config, rank=0, world_size=1)
    with parallel.evaluating():
        matched = any(
            parallel.model(batch.to(parallel.accelerator.device), look=Distiller.choose_heads)
            for batch in islice(first.micro_batches({}, 0), HEAD_MATCHING_BATCHES)
        )
    if not matched:
        raise MismatchError("no keyword row in the first batches", expected="some, to match heads by", where=stream.cache.uri)
    return parallel.distiller.head_pairs
