"""The training loop. Its whole state is the checkpoint's: parameters, optimizer, and a `Progress`."""

import time
from contextlib import closing
from dataclasses import replace
from itertools import islice

from accelerate.utils import gather_object

from run_kit.progress import progress_bar
from student_train.data.loader import load
from student_train.data.packed_batch import PackedBatch
from student_train.data.stream import Cursor
from student_train.engine.controller import Observation
from student_train.engine.engine import Engine
from student_train.evaluate.evaluation import numbers
from student_train.evaluate.gradient_shares import GradientShares
from student_train.train import checkpoint
from student_train.train.metrics import RunLog
from student_train.train.progress import Progress, later
from student_train.train.start import Run
from student_train.train.step import record_of, take_step


def train(run: Run) -> Progress:
    """Train from where the run stands to its end. Every rank must call this.

    Returns:
        the last progress, which is a checkpoint's.
    """
    settings, stream, accelerator, progress = run.settings, run.stream, run.accelerator, run.progress
    engine = Engine.of(run.objective, speaks=accelerator.is_main_process)
    engine.observe(Observation(progress.step, settings.steps))
    pinned = accelerator.device.type == "cuda"
    batches = load(stream, progress.cursor, progress.step - progress.stream_start, pin_memory=pinned)
    open_log = closing(RunLog(settings.out, progress.step, accelerator, tensorboard=settings.tensorboard))
    with open_log as log, progress_bar() as display:
        bar = display.add_task("train", total=settings.steps, completed=progress.step, unit="steps")
        while not progress.is_over(settings.steps, settings.validation):
            started = time.perf_counter()
            micro = list(islice(batches, stream.micro_steps))
            waited = time.perf_counter() - started
            shares = _gradient_shares(run, micro[0], progress.step)
            started = time.perf_counter()
            measured = take_step(run, micro, progress.step, engine.weights, times_forward=engine.needs_forward_seconds)
            decided = engine.observe(Observation(progress.step + 1, settings.steps, measured, waited))
            seconds = waited + time.perf_counter() - started
            progress = progress.stepped([packed_batch.contents.cursor for packed_batch in micro], int(measured.tokens), seconds)
            record = record_of(measured) | shares | decided
            log.write(step=progress.step, **record, seconds=seconds, data_wait_seconds=waited)
            says = f"loss {measured.loss:.3f} {measured.tokens / seconds:,.0f} tok/s wait {waited / seconds:.0%}"
            display.update(bar, advance=1, description=says)
            if settings.validation is not None and _due(progress, settings.validation.every, settings.steps):
                progress = _validate(run, progress, log)
            if _due(progress, settings.checkpoint.every, settings.steps) or progress.is_over(settings.steps, settings.validation):
                progress = _save(run, progress)
    return progress


def _due(progress: Progress, every: int, steps: int) -> bool:
    """Every so many steps, and after the last."""
    return progress.step == steps or progress.step % every == 0


def _gradient_shares(run: Run, packed_batch: PackedBatch, step: int) -> dict[str, float]:
    """On one micro-batch of the step that comes, where they are asked for then."""
    every = run.settings.gradient_shares_every
    if every is None or step % every:
        return {}
    return numbers(GradientShares(run.objective, step / run.settings.steps).run(run.parallel, [packed_batch.batch]))


def _validate(run: Run, progress: Progress, log: RunLog) -> Progress:
    """Validate, and keep the weights where they are the best so far and that is asked for."""
    settings, evaluation = run.settings, run.validation
    assert settings.validation is not None
    assert evaluation is not None
    batches = run.stream.once("validation", evaluation.needs, settings.validation.max_tokens)
    found = numbers(evaluation.run(run.parallel, batches))
    log.write(step=progress.step, **found)
    progress = progress.validated(found["validation_loss"], settings.validation.min_gain)
    if settings.keeps_best and progress.best_step == progress.step:
        writes = run.accelerator.is_main_process
        checkpoint.save_best(settings.out / "best", run.parallel.distiller, progress.step, writes=writes)
    return progress


def _save(run: Run, progress: Progress) -> Progress:
    """A checkpoint, with the places of all ranks' lanes."""
    cursors: list[Cursor] = gather_object([progress.cursor])
    progress = replace(progress, cursor=later(*cursors))
    folder, writes = run.settings.out / "checkpoints", run.accelerator.is_main_process
    checkpoint.save(folder, run.parallel.distiller, run.optimizer, progress, run.settings.checkpoint.keep, writes=writes)
    run.accelerator.wait_for_everyone()
    return progress
