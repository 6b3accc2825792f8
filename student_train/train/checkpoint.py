"""Training state on disk: safetensors and JSON, never pickle; a folder that is renamed last, so that it is whole or not there.

What is written is whole tensors and places of the stream that no number of processes is part of: a run goes on with another number
of them, replicated or sharded.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from signal_store.errors import CorruptError, MismatchError, storage_error
from signal_store.io.local import NO_SYNC, sync
from student_train.data.batch import LaneCursor
from student_train.student.sharded import like, whole
from student_train.train.progress import Progress

VERSION = 3
MODEL = "model.safetensors"


def _gathered(tensors: dict[str, Tensor], *, keeps: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on the rank that keeps them; every rank takes part, one tensor at a time."""
    found = {}
    for name, value in tensors.items():
        tensor = whole(value)
        if keeps:
            found[name] = tensor
    return found


def gathered_state(module: nn.Module, *, keeps: bool = True) -> dict[str, Tensor]:
    """Whole parameters, each shared one once, and persistent buffers, on the CPU. Every rank must call this."""
    parameters = dict(module.named_parameters())
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in aliases}
    return _gathered(parameters | buffers, keeps=keeps)


def restore_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `gathered_state`, in place, before the module is shared."""
    targets = dict(module.named_parameters()) | {n: b for n, b in module.state_dict().items() if n in state}
    with torch.no_grad():
        for name, value in state.items():
            targets[name].copy_(value)


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or refusing disk into one line; safetensors wraps the system's error in its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else next(iter(re.findall(r"os error (\d+)", str(error))), None)
        known = None if number is None else storage_error(OSError(int(number), os.strerror(int(number))), where)
        if known is None:
            raise
        raise known from error


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int, *, writes: bool) -> None:
    """Write `folder/step-N`, then remove all but the last `keep`, and what a killed save left behind. Every rank must call this;
    one writes."""
    state = gathered_state(module, keeps=writes)
    moments = _gathered(_optimizer_tensors(optimizer), keeps=writes)
    if not writes:
        return
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{target.name}"
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale)
    with disk_errors(target):
        temporary.mkdir(parents=True)
        save_file(state, temporary / MODEL)
        save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps({"version": VERSION, **asdict(progress)}, indent=1))
        _sync_tree(temporary)
        if target.exists():  # the same step again, from an export that failed
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def restore_module(path: Path, module: nn.Module) -> Progress:
    """Load a checkpoint's weights into a module that is not shared yet; its progress."""
    try:
        content: dict[str, Any] = json.loads((path / "progress.json").read_text())
        state = load_file(path / MODEL)
    except (ValueError, SafetensorError) as error:
        raise CorruptError(
            "a checkpoint is damaged", found=error, where=path, remedy="Remove it: the one before it stands."
        ) from error
    if content.pop("version") != VERSION:
        raise MismatchError("another checkpoint version", expected=VERSION, where=path)
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    expected = dict(module.named_parameters()).keys() | (module.state_dict().keys() - aliases)
    if differ := sorted(name for name in expected ^ state.keys() if name in expected or name.startswith(("terms.", "gate."))):
        raise MismatchError(
            "the checkpoint is of another objective or student",
            expected=", ".join(differ[:3]),
            found="weights without them, or others",
            where=path,
            remedy="Start a run of its own, with the student's folder as student.checkpoint.",
        )
    restore_state(module, state)
    content["cursor"] = {int(lane): LaneCursor(**at) for lane, at in content["cursor"].items()}
    content["head_pairs"] = {int(layer): [(int(a), int(b)) for a, b in pairs] for layer, pairs in content["head_pairs"].items()}
    return Progress(**content)


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's moments into the optimizer of the shared module."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        moments = load_file(path / "optimizer.safetensors")
    except SafetensorError as error:
        raise CorruptError(
            "a checkpoint is damaged", found=error, where=path, remedy="Remove it: the one before it stands."
        ) from error
    for key, value in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = like(value, parameters[int(number)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def _sync_tree(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Durable where the file system can: a checkpoint torn by a power cut is found when it is read; the one before stands."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def save_best(folder: Path, module: nn.Module, step: int, *, writes: bool) -> None:
    """Keep these weights as the best so far; the file is replaced in one step. Every rank must call this; one writes."""
    state = gathered_state(module, keeps=writes)
    if not writes:
        return
    temporary = folder / ".model"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata={"step": str(step)})
        _sync(temporary)
        temporary.rename(folder / MODEL)
        _sync(folder)


def restore_weights(path: Path, module: nn.Module) -> None:
    """Load the weights of a checkpoint's folder, or of the best so far."""
    restore_state(module, load_file(path / MODEL))
