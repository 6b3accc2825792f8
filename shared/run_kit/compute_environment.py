"""doctor: what torch and transformers make of this machine, and of a model's config."""

import os
import shutil
from collections.abc import Iterator
from typing import Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from model_taps.attention import softmax_attention_layers
from model_taps.attention_interface import own_kernel
from model_taps.blocks import num_layers
from model_taps.loading import LOADING_ERRORS, load_config, quiet
from model_taps.machine import KERNEL_FLAGS
from model_taps.native_dtype import cpu_flags, matmul_rates, name_of, native_dtypes
from run_kit.check import Check
from signal_store.errors import SignalStoreError


def compute_checks() -> list[Check]:
    """Of processors and what they multiply in, GPUs, attention and a compiler."""
    quiet()
    return [*_processor(), *_gpus(), _attention(), _compiler()]


def model_checks(name: str) -> Iterator[Check]:
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
