"""run.json: what the run in a folder is, how it was computed, and what of that has changed since it began."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from run_kit.cores import usable_cores
from signal_store.cache import Cache
from signal_store.canonical import digest
from signal_store.errors import MismatchError
from signal_store.format.renamed import untold
from signal_store.io.local import LocalObjects
from student_train.align.aligned_cache import AlignedCache, student_tokenizer_digest
from student_train.model.precision import Precision
from student_train.recipe import RunRecipe, flat
from student_train.session.identity import differences, identity, role_of, rules_digest
from student_train.train import checkpoint
from student_train.train.metrics import read_json

RECORD = "run.json"
FACTS = ("processes", "parallel", "precision", "packed", "versions", "commit", "python", "machine", "gpus")
"""What a record says besides the recipe, and what `history` follows."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What a folder says of the run that began there; empty if none did."""

    about: dict[str, Any]

    @classmethod
    def of(cls, out: Path) -> "Begun":
        """Read it."""
        path = out / RECORD
        held = read_json(path) if path.is_file() else {}
        return cls({"parallel" if name == "sharing" else name: value for name, value in held.items()})  # its name of before

    @property
    def packed(self) -> bool | None:
        """Whether its rows hold several segments; None where it does not say."""
        found = self.about.get("packed")
        return found if isinstance(found, bool) else None

    @property
    def precision(self) -> str | None:
        """What it was begun in; None where there is no run."""
        if not self.about:
            return None
        taken = self.about.get("precision", {}).get("taken")
        return str(taken or self.about.get("recipe", {}).get("precision", "float32"))

    def recipe(self) -> RunRecipe | None:
        """Its recipe with today's defaults; None where there is none, or it is of another version."""
        try:
            with untold():
                return RunRecipe.model_validate(self.about["recipe"])
        except (KeyError, ValueError):
            return None

    def differs(self, recipe: RunRecipe, cache_id: str) -> dict[str, tuple[Any, Any]]:
        """By place, (held, asked) of what makes the asked run another one than this. Recipes are compared as today's code reads
        them, not by a digest, so that a field which came later separates nothing."""
        if not self.about:
            return {}
        asked = identity(recipe) | {"cache_id": cache_id, "rules_digest": rules_digest(recipe)}
        if "rules_digest" not in self.about:  # a record of before it was written down
            del asked["rules_digest"]
        held = self.recipe()
        if held is None:
            return {"recipe": ("another version's", "this version's")}
        known = {name: self.about[name] for name in ("cache_id", "rules_digest") if name in self.about}
        return differences(identity(held) | known, asked)

    def refuse_another_tokenizer(self, cache: Cache, where: Path) -> None:
        """MismatchError where the run began with another tokenizer of the student's, or read the cache as it is and not through a
        view, or the other way; an older record says neither, and knew no views."""
        if not self.about:
            return
        found = (student_tokenizer_digest(cache), isinstance(cache, AlignedCache))
        held = (self.about.get("tokenizer", found[0]), self.about.get("through_view", False))
        if held != found:
            what = "the run began with another tokenizer, or another way to read the cache"
            raise MismatchError(what, expected=held, found=found, where=where, remedy="Give another out, or the recipe as it was.")

    def run_id(self, recipe: RunRecipe, cache_id: str) -> str:
        """The digest that names the run: the one that it began with, or a new one."""
        if self.about and not self.differs(recipe, cache_id):
            return str(self.about["recipe_digest"])
        return digest({"recipe": identity(recipe), "rules": rules_digest(recipe), "cache_id": cache_id})


def refuse_another_run(begun: Begun, recipe: RunRecipe, cache_id: str) -> None:
    """MismatchError naming what differs, where the folder holds another run than this recipe's. It is never replaced, even where it
    died before its first checkpoint: its log says why."""
    if differ := begun.differs(recipe, cache_id):
        bare = checkpoint.newest(recipe.out / "checkpoints") is None
        raise MismatchError(
            f"the folder holds another run ({', '.join(differ)} differ)",
            expected={place: held for place, (held, _) in differ.items()},
            found={place: asked for place, (_, asked) in differ.items()},
            where=recipe.out,
            remedy="Give another out, or restore the recipe"
            + ("; that run has no checkpoint yet: remove the folder to begin anew in it." if bare else "."),
        )


def write_record(
    begun: Begun,
    recipe: RunRecipe,
    run_id: str,
    cache: Cache,
    accelerator: Accelerator,
    precision: Precision,
    *,
    step: int,
    packed: bool,
) -> None:
    """Write run.json: this start's facts, and `history`, what each start changed of the one before, by place: [before, now]."""
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": run_id,
        "rules_digest": rules_digest(recipe),
        "cache_id": cache.manifest.cache_id,
        "tokenizer": student_tokenizer_digest(cache),
        "through_view": isinstance(cache, AlignedCache),
        "generation": cache.seal.generation,
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "parallel": recipe.parallel.mode if accelerator.num_processes > 1 else "alone",
        "precision": {"taken": precision.name, "reason": precision.reason},
        "packed": packed,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "zarr", "teacher-cache")},
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {usable_cores()} cores, {torch.get_num_threads()} threads",
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }
    history = list(begun.about.get("history", []))
    if begun.about and (changed := _changes(begun, recipe, about)):
        history.append({"step": step, "changed": changed})
    data = json.dumps({**about, "history": history}, indent=1)
    LocalObjects(recipe.out, scratch=".").put(RECORD, data.encode())


def _changes(begun: Begun, recipe: RunRecipe, about: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Between two starts of a run, whatever a reader should know: not where things lie."""
    held = begun.recipe()
    recipes = [{} if one is None else _told(one) for one in (held, recipe)]
    facts = [dict(flat({f"start.{name}": one[name] for name in FACTS if name in one})) for one in (begun.about, about)]
    return differences(*recipes) | differences(*facts) if held is not None else differences(*facts)


def _told(recipe: RunRecipe) -> dict[str, Any]:
    return {place: value for place, value in flat(recipe.model_dump(mode="json")) if role_of(place) != "kept"}


def _commit() -> str | None:
    """The commit that this code was run from, if it lies in a git checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None
