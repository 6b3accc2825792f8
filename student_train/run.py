"""run: train a student from a cache, and leave a plain `save_pretrained` folder. Started again, it goes on where it stopped."""

import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedTokenizerFast

from signal_store.cache import Cache, open_cache
from signal_store.canonical import digest
from signal_store.errors import MismatchError
from signal_store.ledger import refuse_inside_a_cache
from signal_store.local_objects import LocalObjects
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.distiller import Distiller
from student_train.losses.objective import resolve
from student_train.metrics import METRICS, read_json, read_metrics
from student_train.recipe import RunRecipe, flat
from student_train.sharing import accelerator_of
from student_train.student import build_student
from student_train.trainer import Trainer, run_settings
from student_train.validation import check_splits

RESULT = "result.json"


def run(recipe: RunRecipe) -> dict[str, Any]:
    """Train and export; returns what `result.json` says. A finished run is not repeated. Started by torchrun or accelerate launch,
    its processes train one student together."""
    cache = open_cache(recipe.cache)
    refuse_inside_a_cache(recipe.out)
    begun = _begun(recipe)
    if begun.get("cache_id") == cache.manifest.cache_id:  # a run goes on with the generation that it began with
        cache = open_cache(recipe.cache, generation=int(begun["generation"]))
    recipe_digest = digest({"recipe": run_settings(recipe), "cache_id": cache.manifest.cache_id})
    if not recipe.checkpoint.accept_other_cache:
        _refuse_another_run(recipe, recipe_digest, begun)
    finished = recipe.out / RESULT
    if finished.is_file() and (recipe.out / "student").is_dir() and begun.get("recipe_digest") == recipe_digest:
        return read_json(finished) | {"student": str(recipe.out / "student")}  # the folder may have been moved
    check_splits(recipe.validation, cache)
    student, tokenizer = build_student(recipe.student, cache)
    torch.manual_seed(recipe.seed)
    objective = resolve(recipe.objective, cache, student, recipe.tail_rank)
    distiller = Distiller(student, objective, compiled=recipe.compile)
    # What is offloaded is reduced on the CPU, which NCCL does not serve.
    both = (
        [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if recipe.sharing.cpu_offload and torch.cuda.is_available() else []
    )
    accelerator = accelerator_of(bf16=recipe.precision == "bfloat16", kwargs_handlers=both)

    def claim() -> None:
        if accelerator.is_main_process:
            _describe(recipe, recipe_digest, cache, accelerator)
        accelerator.wait_for_everyone()

    try:
        progress = Trainer(recipe, accelerator, cache, objective, distiller, recipe_digest, claim).train()
        if accelerator.is_main_process:
            parameters = sum(p.numel() for p in student.parameters())
            _export(recipe, cache, tokenizer)
            result = _result(recipe, progress, parameters, accelerator.num_processes)
            LocalObjects(recipe.out, scratch=".").put(RESULT, json.dumps(result, indent=1).encode())
        accelerator.wait_for_everyone()
    finally:
        if accelerator.num_processes > 1:
            accelerator.end_training()
    return read_json(finished)


def _export(recipe: RunRecipe, cache: Cache, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain `save_pretrained` folder of the best or last weights: of a fresh student, which no sharing or capture has touched."""
    student, _ = build_student(recipe.student, cache)
    plain = Distiller(student, resolve(recipe.objective, cache, student, recipe.tail_rank))
    last = checkpoint.newest(recipe.out / "checkpoints")
    assert last is not None
    checkpoint.restore_weights(recipe.out / "best" if recipe.export == "best" else last, plain)
    implementation = recipe.student.attn_implementation or student.config._attn_implementation.removeprefix("tapped_")  # noqa: SLF001
    student.set_attn_implementation(implementation)
    with checkpoint.disk_errors(recipe.out):
        student.save_pretrained(recipe.out / "student")
        tokenizer.save_pretrained(recipe.out / "student")


def _refuse_another_run(recipe: RunRecipe, recipe_digest: str, begun: dict[str, Any]) -> None:
    if begun.get("recipe_digest", recipe_digest) != recipe_digest:
        differ = _differences(begun, recipe)
        raise MismatchError(
            f"the folder holds another run ({', '.join(differ) or 'its cache or rules'} differ)",
            expected={place: held for place, (held, _) in differ.items()} or begun["recipe_digest"],
            found={place: asked for place, (_, asked) in differ.items()} or recipe_digest,
            where=recipe.out,
            remedy="Give another out, or restore the recipe.",
        )


def _differences(begun: dict[str, Any], recipe: RunRecipe) -> dict[str, tuple[Any, Any]]:
    """By place, what the run that began has and what this recipe asks for."""
    try:
        held = dict(flat(run_settings(RunRecipe.model_validate(begun["recipe"]))))
    except (KeyError, ValueError):  # of another version: the digests must do
        return {}
    asked = dict(flat(run_settings(recipe)))
    places = [place for place in dict.fromkeys((*held, *asked)) if held.get(place) != asked.get(place)]
    return {place: (held.get(place), asked.get(place)) for place in places}


def _begun(recipe: RunRecipe) -> dict[str, Any]:
    """What the folder says of the run that began there; nothing if none did."""
    described = recipe.out / "run.json"
    return read_json(described) if described.is_file() else {}


def _describe(recipe: RunRecipe, recipe_digest: str, cache: Cache, accelerator: Accelerator) -> None:
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe_digest,
        "cache_id": cache.manifest.cache_id,
        "generation": cache.seal.generation,
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "sharing": recipe.sharing.mode if accelerator.num_processes > 1 else "alone",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "zarr", "teacher-cache")},
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpus": gpus,
    }
    LocalObjects(recipe.out, scratch=".").put("run.json", json.dumps(about, indent=1).encode())


def _commit() -> str | None:
    """The commit that this code was run from, if it lies in a git checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None


def _result(recipe: RunRecipe, progress: Progress, parameters: int, processes: int) -> dict[str, Any]:
    lines = read_metrics(recipe.out / METRICS)
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    last: dict[str, Any] = next((line for line in reversed(lines) if "validation_loss" in line), {})
    fidelity: dict[str, Any] = {
        name: last[name] for name in ("agreement", "overlap", "kl", "entropy_gap", "calibration_error") if name in last
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
