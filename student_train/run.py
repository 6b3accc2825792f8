"""run: train a student from a cache, and leave a plain `save_pretrained` folder. Started again, it goes on where it stopped."""

import json
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from signal_store.cache import Cache, open_cache
from signal_store.canonical import digest
from signal_store.errors import InputError, MismatchError
from signal_store.local_objects import LocalObjects
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.distiller import Distiller
from student_train.losses.objective import resolve
from student_train.recipe import RunRecipe
from student_train.student import build_student
from student_train.trainer import Trainer

RESULT = "result.json"


def run(recipe: RunRecipe) -> dict[str, Any]:
    """Train and export; returns what `result.json` says. A finished run is not repeated."""
    cache = open_cache(recipe.cache, generation=_begun_generation(recipe))
    identity = {"recipe": recipe.model_dump(mode="json", exclude={"out", "cache"}), "cache_id": cache.manifest.cache_id}
    recipe_digest = digest(identity)
    _refuse_another_run(recipe, recipe_digest)
    finished = recipe.out / RESULT
    if finished.is_file():
        result: dict[str, Any] = json.loads(finished.read_text())
        return result
    if recipe.validation is not None and not len(cache.units("validation")):
        raise InputError("the cache has no validation split", expected="a source with split: validation", where=recipe.cache)
    student, tokenizer = build_student(recipe.student, cache)
    objective = resolve(recipe.objective, cache, student)
    torch.manual_seed(recipe.seed)
    distiller = Distiller(student, objective, cache)
    _describe(recipe, recipe_digest, cache)
    progress = Trainer(recipe, cache, objective, distiller, recipe_digest).train()
    if recipe.export == "best":
        checkpoint.restore_best(recipe.out / "best", distiller)
    implementation = recipe.student.attn_implementation
    if objective.attention_pairs:  # leave no trace of the row capture in the exported config
        student.set_attn_implementation(implementation or student.config._attn_implementation.removeprefix("tapped_"))  # noqa: SLF001
    with checkpoint.disk_errors(recipe.out):
        student.save_pretrained(recipe.out / "student")
        tokenizer.save_pretrained(recipe.out / "student")
    result = _result(recipe, progress, sum(p.numel() for p in student.parameters()))
    LocalObjects(recipe.out, scratch=".").put(RESULT, json.dumps(result, indent=1).encode())
    return result


def _refuse_another_run(recipe: RunRecipe, recipe_digest: str) -> None:
    described = recipe.out / "run.json"
    if described.is_file():
        found = json.loads(described.read_text())["recipe_digest"]
        if found != recipe_digest:
            raise MismatchError(
                "the folder holds another run",
                expected=recipe_digest,
                found=found,
                where=recipe.out,
                remedy="Give another out, or restore the recipe.",
            )


def _begun_generation(recipe: RunRecipe) -> int | None:
    """The generation of the cache that this run began with: it goes on with that, however the cache has grown since."""
    described = recipe.out / "run.json"
    return int(json.loads(described.read_text())["generation"]) if described.is_file() else None


def _describe(recipe: RunRecipe, recipe_digest: str, cache: Cache) -> None:
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe_digest,
        "cache_id": cache.manifest.cache_id,
        "generation": cache.seal.generation,
        "command": sys.argv,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "zarr", "teacher-cache")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
    }
    LocalObjects(recipe.out, scratch=".").put("run.json", json.dumps(about, indent=1).encode())


def _result(recipe: RunRecipe, progress: Progress, parameters: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return {
        "student": str(Path(recipe.out) / "student"),
        "parameters": parameters,
        "steps": progress.step,
        "validation_loss": (progress.best_loss if recipe.export == "best" else validations[-1]) if validations else None,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / max(1e-9, progress.train_seconds),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
