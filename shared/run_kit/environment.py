"""doctor: what this machine has, and what of it will be in the way."""

import json
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from run_kit.check import Check
from run_kit.requirements import EXTRAS, how_to_install, is_installed, required
from signal_store.errors import SignalStoreError
from signal_store.io.commit_check import commit_faults
from signal_store.io.local import LocalObjects

LEAST_FREE_BYTES = 10 * 2**30
LEAST_OPEN_FILES = 1024
SHOWN = ("torch", "transformers", "tokenizers", "zarr", "numcodecs", "datasets", "accelerate", "torchdata")


def checks(folder: Path, model: str | None = None) -> list[Check]:
    """Of Python, packages, processors, memory, the disk that `folder` is on, attention; and of a model's config, where one is
    named. Without torch or transformers, of what needs neither."""
    found = [_python(), *_packages(), *_extras()]
    computes = is_installed("torch") and is_installed("transformers")
    if computes:
        from run_kit.compute_environment import compute_checks, model_checks

        found += compute_checks()
    found += [_open_files(), *_disk(folder)]
    if model is not None:
        unloaded = Check("model", "bad", "no transformers to load it with", how_to_install("teacher"))
        found += model_checks(model) if computes else [unloaded]
    return found


def say(found: list[Check], *, as_json: bool) -> None:
    """On the terminal, as a table or JSON; typer.Exit(1) if something will fail."""
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found]))
    else:
        table = Table("", "check", "found", "what to do")
        marks = {"ok": Text("ok", style="green"), "note": Text("note", style="yellow"), "bad": Text("bad", style="bold red")}
        for check in found:
            table.add_row(marks[check.state], check.name, Text(check.found), Text(check.advice))
        Console().print(table)
    if any(check.state == "bad" for check in found):
        raise typer.Exit(1)


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    yield Check("versions", "ok", ", ".join(f"{name} {version(name)}" for name in SHOWN if is_installed(name)))
    for requirement in required():
        if not is_installed(requirement.name):
            yield Check(requirement.name, "bad", "not installed", f'pip install "{requirement}"')


def _extras() -> Iterator[Check]:
    """Which extras are whole; and packages, of any of them, in versions that will not do."""
    wanted = {extra: required(extra) for extra in EXTRAS}
    for extra, requirements in wanted.items():
        lacking = [r.name for r in requirements if not is_installed(r.name)]
        found = "installed" if not lacking else f"without {', '.join(lacking)}"
        yield Check(f"extra {extra}", "note" if lacking else "ok", found, how_to_install(extra) if lacking else "")
    by_name = {r.name: r for r in (*required(), *(r for requirements in wanted.values() for r in requirements))}
    for name, requirement in by_name.items():
        if is_installed(name) and not requirement.specifier.contains(version(name), prereleases=True):
            yield Check(name, "bad", version(name), f'pip install "{name}{requirement.specifier}"')


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < LEAST_OPEN_FILES
    return Check("open files", "note" if few else "ok", f"at most {soft:,}", f"ulimit -n {LEAST_OPEN_FILES}" if few else "")


def _disk(folder: Path) -> Iterator[Check]:
    """Room, and whether a commit (create once, whole, durable) works there."""
    if folder.exists() and not folder.is_dir():
        yield Check("disk", "bad", f"{folder} is a file", "Name a folder.")
        return
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    short = free < LEAST_FREE_BYTES
    advice = "teacher-cache estimate says what a cache will take." if short else ""
    yield Check("disk", "note" if short else "ok", f"{free / 2**30:,.1f} GiB free at {place}", advice)
    try:
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            faults = commit_faults(LocalObjects(Path(scratch)))
    except (OSError, SignalStoreError) as error:
        yield Check("commit", "bad", str(error), "Name a folder that you may write.")
        return
    for fault in faults:
        yield Check("commit", "bad", f"{fault.what} ({fault.found})", fault.remedy or "Name a folder that you may write.")
    if not faults:
        yield Check("commit", "ok", "create-once, rename and sync work")
