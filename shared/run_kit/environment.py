"""doctor: what this machine has, and what of it will be in the way."""

import json
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from model_taps.attention import softmax_attention_layers
from model_taps.attention_interface import own_kernel
from model_taps.blocks import num_layers
from model_taps.loading import LOADING_ERRORS, load_config, quiet
from model_taps.machine import KERNEL_FLAGS
from model_taps.native_dtype import cpu_flags, matmul_rates, name_of, native_dtypes
from signal_store.errors import SignalStoreError
from signal_store.io.commit_check import commit_faults
from signal_store.io.local import LocalObjects

LEAST_FREE_BYTES = 10 * 2**30
LEAST_OPEN_FILES = 1024
SHOWN = ("torch", "transformers", "tokenizers", "zarr", "numcodecs", "datasets", "accelerate", "torchdata")


@dataclass(frozen=True, slots=True)
class Check:
    """`ok`, `note` (works, but know it), or `bad` (will fail)."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""


def checks(folder: Path, model: str | None = None) -> list[Check]:
    """Of Python, packages, processors, memory, the disk that `folder` is on, attention; and of a model's config, where one is
    named."""
    quiet()
    found = [_python(), *_packages(), *_extras(), *_processor(), *_gpus(), _attention(), _compiler(), _open_files(), *_disk(folder)]
    return found + ([] if model is None else list(_model(model)))


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
    wanted = {r.name: r for r in map(Requirement, requires("teacher-cache") or []) if r.marker is None}
    yield Check("versions", "ok", ", ".join(f"{name} {version(name)}" for name in SHOWN if _is_installed(name)))
    for name, requirement in wanted.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, "bad", "not installed", f'pip install "{requirement}"')
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Check(name, "bad", found, f'pip install "{requirement}"')


def _extras() -> Iterator[Check]:
    """Which extras are whole."""
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requires("teacher-cache") or []):
        if requirement.marker is not None:
            for extra in ("gpu", "inspect", "lora", "nlp", "remote", "tensorboard"):
                if requirement.marker.evaluate({"extra": extra}):
                    by_extra.setdefault(extra, []).append(requirement)
    for extra, wanted in by_extra.items():
        lacking = [r.name for r in wanted if not _is_installed(r.name)]
        found = "installed" if not lacking else f"without {', '.join(lacking)}"
        yield Check(
            f"extra {extra}", "note" if lacking else "ok", found, f'pip install "teacher-cache[{extra}]"' if lacking else ""
        )


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    units = " ".join(flag for flag in KERNEL_FLAGS if flag in cpu_flags()) or "no flags known"
    yield Check("processor", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB, {units}")
    yield _products("processor's products", "cpu")


def _products(name: str, device: str) -> Check:
    """Matrix products in each dtype, measured; and which of them to use."""
    rates, native = matmul_rates(device), native_dtypes(device)
    shown = [f"{name_of(d)} {rate:,.0f} GFLOP/s{'' if d in native else ' (emulated)'}" for d, rate in rates.items()]
    halves = [name_of(dtype) for dtype in native if dtype != torch.float32]
    advice = "Use dtype: auto"
    advice += f", {' or '.join(halves)} for models trained in it" if halves else ": float32, whatever a model was trained in"
    slow = [name_of(d) for d in native if d in rates and rates[d] < rates[torch.float32] / 2]
    state: Literal["ok", "note"] = "note" if slow else "ok"
    return Check(
        name, state, ", ".join(shown), advice + (f"; {', '.join(slow)} is slower here than it should be." if slow else ".")
    )


def _gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else f"torch is built for CUDA {torch.version.cuda}"
        yield Check("GPU", "note", f"none; {built}", "Everything runs on the CPU, slowly for large teachers.")
        return
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        facts = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.0f} of {whole / 2**30:.0f} GiB free"
        yield Check(f"GPU {number}", "ok", facts)
        yield _products(f"GPU {number}'s products", f"cuda:{number}")


def _attention() -> Check:
    if is_flash_attn_2_available():
        return Check("attention", "ok", "FlashAttention 2, SDPA, eager")
    needs = "" if not torch.cuda.is_available() else 'pip install "teacher-cache[gpu]" for FlashAttention.'
    return Check("attention", "note" if needs else "ok", "SDPA, eager", needs)


def _compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    lacking = found is None and not torch.cuda.is_available()
    return Check("C++ compiler", "note" if lacking else "ok", found or "none", "compile: true needs one." if lacking else "")


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


def _model(name: str) -> Iterator[Check]:
    """Its config, and which blocks have attention that can be looked at."""
    try:
        config = load_config(name, what="model", trust_remote_code=False)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
        size, layers = sum(p.numel() for p in built.parameters()), softmax_attention_layers(built)
    except (SignalStoreError, *LOADING_ERRORS) as error:
        yield Check("model", "bad", " ".join(str(error).split())[:200], "Name a causal LM's folder or hub name.")
        return
    yield Check("model", "ok", f"{type(built).__name__}, {size:,} parameters, {size * 2 / 2**20:,.0f} MiB in bfloat16")
    found = f"{len(layers)} of {num_layers(built)} blocks, {own_kernel(built)}"
    yield Check("model's attention", "ok" if layers else "note", found, "" if layers else "signals.attention cannot be cached.")
