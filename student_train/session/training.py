"""Train a student in its folder, and leave a plain `save_pretrained` folder there. Started again, it goes on where it stopped."""

import json
import os
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedTokenizerFast

from model_taps.attention_interface import own_kernel
from run_kit.progress import tell
from signal_store.cache import Cache, open_cache
from signal_store.errors import InputError
from signal_store.io.local import LocalObjects
from signal_store.ledger.documents import refuse_inside_a_cache
from student_train.evaluate.validation import check_splits
from student_train.losses.across_check import alignment_of, refuse_few_rows
from student_train.losses.objective import resolve
from student_train.model.distiller import Distiller
from student_train.model.parallel import accelerator_of, refuse_lone_shard
from student_train.model.precision import Precision, choose_precision, emulated, training_device
from student_train.recipe import RunRecipe
from student_train.session.claim import Claim, refuse_strangers
from student_train.session.reading import FOLDER, reading_cache
from student_train.session.run_record import Begun, refuse_another_run, write_record
from student_train.student.build import build_student
from student_train.train import checkpoint
from student_train.train.loop import train
from student_train.train.metrics import METRICS, read_json, read_metrics
from student_train.train.progress import Progress
from student_train.train.start import start as start_run

RESULT = "result.json"


def train_in_folder(recipe: RunRecipe) -> dict[str, Any]:
    """Claim the folder, train, export; what `result.json` says. See `student_train.commands.run`."""
    refuse_inside_a_cache(recipe.out)
    with Claim(recipe.out, "trains") as claim:
        start = _Start.of(recipe)
        first = int(os.environ.get("RANK", "0")) == 0
        if first and start.finished is None and recipe.out.is_dir():  # else it is made, and claimed, when the run can begin
            claim.take()
            start = _Start.of(recipe)  # as its last holder left it
        return start.finished or _train(recipe, start, claim)


@dataclass(frozen=True, slots=True)
class _Start:
    """What a folder holds when a run starts there, and the cache as the run knows it."""

    begun: Begun
    cache: Cache
    run_id: str
    finished: dict[str, Any] | None
    """The result, where there is nothing left to do."""

    @classmethod
    def of(cls, recipe: RunRecipe) -> "_Start":
        """Look; MismatchError where another run is there, InputError where something else is."""
        cache, begun = open_cache(recipe.cache), Begun.of(recipe.out)
        if not begun.about and checkpoint.newest(recipe.out / "checkpoints") is None:
            refuse_strangers(recipe.out, own=(FOLDER,))
        if begun.about.get("cache_id") == cache.manifest.cache_id:  # a run goes on with the generation that it began with
            cache = open_cache(recipe.cache, generation=int(begun.about["generation"]))
        if not recipe.checkpoint.accept_other_cache:
            refuse_another_run(begun, recipe, cache.manifest.cache_id)
        run_id = begun.run_id(recipe, cache.manifest.cache_id)
        result, student = recipe.out / RESULT, recipe.out / "student"
        done = result.is_file() and student.is_dir() and begun.about.get("recipe_digest") == run_id
        return cls(begun, cache, run_id, read_json(result) | {"student": str(student)} if done else None)  # it may have been moved


def _train(recipe: RunRecipe, start: _Start, claim: Claim) -> dict[str, Any]:
    refuse_lone_shard(recipe.parallel)
    check_splits(start.cache, validates=recipe.validation is not None)
    cache = reading_cache(recipe, start.cache)
    start.begun.refuse_another_tokenizer(cache, recipe.out)
    student, tokenizer = build_student(recipe.student, cache)
    torch.manual_seed(recipe.seed)
    objective = resolve(recipe.objective, cache, student, recipe.tail_rank)
    refuse_few_rows(objective.across, cache, recipe.align)
    alignment = alignment_of(objective.across, cache)
    distiller = Distiller(student, objective, impl="compiled" if recipe.compile else "torch")
    accelerator, precision = _accelerator(recipe, start.begun)
    if alignment and accelerator.is_main_process:
        tell(f"rows across tokenizers: {', '.join(f'{name} {_told(value)}' for name, value in alignment.items())}")
    try:
        packed = None if recipe.checkpoint.accept_other_cache else start.begun.packed
        begun = start_run(recipe.training, accelerator, cache, distiller, start.run_id, packed)
        _begin(recipe, start, cache, claim, accelerator, precision, step=begun.progress.step, packed=begun.stream.packed)
        progress = train(begun)
        if accelerator.is_main_process:
            parameters = sum(p.numel() for p in student.parameters())
            _export(recipe, cache, tokenizer)
            result = _result(recipe, progress, parameters, accelerator.num_processes)
            LocalObjects(recipe.out, scratch=".").put(RESULT, json.dumps(result, indent=1).encode())
        accelerator.wait_for_everyone()
    finally:
        if accelerator.num_processes > 1:
            accelerator.end_training()
    return read_json(recipe.out / RESULT)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _accelerator(recipe: RunRecipe, begun: Begun) -> tuple[Accelerator, Precision]:
    # What is offloaded is reduced on the CPU, which NCCL does not serve.
    both = (
        [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if recipe.parallel.cpu_offload and torch.cuda.is_available() else []
    )
    precision = choose_precision(recipe.precision, training_device(), begun.precision)
    accelerator = accelerator_of(bf16=precision.bf16, kwargs_handlers=both)
    if accelerator.is_main_process:
        for line in filter(None, (emulated(precision, accelerator.device), _long_warmup_notice(recipe))):
            tell(line)
    return accelerator, precision


def _long_warmup_notice(recipe: RunRecipe) -> str | None:
    """What to say of a run that ends in its warm-up. That is legitimate: a trial of a few steps begins as the longer run would."""
    rate, steps, warmup = recipe.optimizer.learning_rate, recipe.steps, recipe.optimizer.warmup_steps
    if warmup <= steps:
        return None
    last = rate * steps / warmup
    return f"the warm-up, {warmup:,} steps, is longer than the run, {steps:,}: the learning rate ends at {last:.3g}"


def _begin(
    recipe: RunRecipe,
    start: _Start,
    cache: Cache,
    claim: Claim,
    accelerator: Accelerator,
    precision: Precision,
    *,
    step: int,
    packed: bool,
) -> None:
    """Claim the folder and write the run's record: nothing of the recipe is wrong. Every rank must call this."""
    if accelerator.is_main_process:
        claim.take()
        if Begun.of(recipe.out) != start.begun:
            raise InputError("another process began here meanwhile", where=recipe.out, remedy="Run the same command again.")
        write_record(start.begun, recipe, start.run_id, cache, accelerator, precision, step=step, packed=packed)
    accelerator.wait_for_everyone()


def _export(recipe: RunRecipe, cache: Cache, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain `save_pretrained` folder of the best or last weights: of a fresh student, which no sharing or capture has touched."""
    student, _ = build_student(recipe.student, cache)
    plain = Distiller(student, resolve(recipe.objective, cache, student, recipe.tail_rank))
    last = checkpoint.newest(recipe.out / "checkpoints")
    assert last is not None
    checkpoint.restore_weights(recipe.out / "best" if recipe.export == "best" else last, plain)
    student.set_attn_implementation(recipe.student.attn_implementation or own_kernel(student))
    with checkpoint.disk_errors(recipe.out):
        student.save_pretrained(recipe.out / "student")
        tokenizer.save_pretrained(recipe.out / "student")


def _result(recipe: RunRecipe, progress: Progress, parameters: int, processes: int) -> dict[str, Any]:
    lines = read_metrics(recipe.out / METRICS)
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    last: dict[str, Any] = next((line for line in reversed(lines) if "validation_loss" in line), {})
    fidelity: dict[str, Any] = {
        name: last[name]
        for name in ("bits_per_byte", "agreement", "overlap", "kl", "entropy_gap", "calibration_error")
        if name in last
    }
    return {
        "student": str(recipe.out / "student"),
        "parameters": parameters,
        "steps": progress.step,
        "validation_loss": (progress.best_loss if recipe.export == "best" else validations[-1]) if validations else None,
        "best_step": progress.best_step,
        **fidelity,
        "processes": processes,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(1e-9, progress.train_seconds),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
