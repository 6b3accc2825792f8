"""Training state on disk: safetensors and JSON, never pickle; a folder that is renamed last, so that it is whole or not there."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from signal_store.errors import MismatchError, storage_error
from student_train.batch import Cursor
from student_train.distiller import HeadPairs

VERSION = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """Everything of a run that is not a tensor. `step` optimizer steps are done; `cursor` is where the stream goes on."""

    cache_id: str
    recipe_digest: str
    step: int
    cursor: Cursor
    best_loss: float | None
    best_step: int | None
    validations_without_gain: int
    head_pairs: HeadPairs
    tokens: int
    train_seconds: float


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, each shared one once, and persistent buffers."""
    parameters = dict(module.named_parameters())
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in aliases}
    return {name: value.detach().cpu().contiguous() for name, value in (parameters | buffers).items()}


def restore_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `trainable_state`, in place."""
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


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int) -> None:
    """Write `folder/step-N`, then remove all but the last `keep`, and what a killed save left behind."""
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{target.name}"
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale)
    with disk_errors(target):
        temporary.mkdir(parents=True)
        save_file(trainable_state(module), temporary / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
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


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint into module and optimizer."""
    content: dict[str, Any] = json.loads((path / "progress.json").read_text())
    if content.pop("version") != VERSION:
        raise MismatchError("another checkpoint version", expected=VERSION, where=path)
    restore_state(module, load_file(path / "model.safetensors"))
    _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    content["cursor"] = Cursor(**content["cursor"])
    content["head_pairs"] = {int(layer): [(int(a), int(b)) for a, b in pairs] for layer, pairs in content["head_pairs"].items()}
    return Progress(**content)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value.cpu().contiguous() for number, values in state.items() for name, value in values.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync_tree(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_best(folder: Path, module: nn.Module, step: int) -> None:
    """Keep these weights as the best so far; the file is replaced in one step."""
    temporary = folder / ".model"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable_state(module), temporary, metadata={"step": str(step)})
        _sync(temporary)
        temporary.rename(folder / "model.safetensors")
        _sync(folder)


def restore_best(folder: Path, module: nn.Module) -> None:
    """Load what `save_best` kept."""
    restore_state(module, load_file(folder / "model.safetensors"))
