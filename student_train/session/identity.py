"""What a run is, and what only says how it is computed, watched or kept.

A run goes on wherever its `is` settings are equal, whatever has changed of the others: a smaller micro-batch after an out-of-memory
error, another precision on another machine. Those changes are written into the run's record. Every field of a recipe is named here.
"""

from typing import Any, Literal

from student_train.importance.rules import load_rules
from student_train.losses.aliases import preset_name
from student_train.recipe import RunRecipe, flat

Role = Literal["is", "computed", "watched", "kept"]
ROLES: dict[str, Role] = {
    "cache": "kept",  # a place; the cache's id is compared
    "out": "kept",
    "student.checkpoint": "is",
    "student.config": "is",
    "student.seed": "is",
    "student.tokenizer": "kept",  # a place; its digest is compared
    "student.attn_implementation": "computed",
    "student.trust_remote_code": "kept",  # a permission
    "student.lora": "is",
    "preset": "is",
    "losses": "is",
    "without": "is",
    "tail_rank": "is",
    "steps": "is",  # schedules end there
    "seed": "is",
    "precision": "computed",
    "activation_checkpointing": "computed",
    "compile": "computed",
    "parallel": "computed",
    "tensorboard": "watched",
    "gradient_shares_every": "watched",
    "optimizer": "is",
    "stream.sequence_length": "is",
    "stream.global_batch_rows": "is",
    "stream.micro_batch_rows": "computed",
    "stream.lanes": "is",
    "stream.window_units": "is",
    "stream.mix": "is",
    "stream.workers": "computed",
    "stream.seed": "is",
    "align": "kept",  # a place and a floor; the view is the cache's and the tokenizer's
    "validation": "watched",  # unless it decides the result, see `identity`
    "checkpoint": "kept",
    "export": "is",
}
"""By dotted place, or the place that holds it: `is` decides the numbers of a run, `computed` how they are computed (equal but for
rounding), `watched` what is looked at, `kept` where things lie."""


def role_of(place: str) -> Role:
    """Of a dotted place of a recipe; KeyError for one that this module forgot."""
    parts = place.split(".")
    return next(ROLES[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in ROLES)


def identity(recipe: RunRecipe) -> dict[str, Any]:
    """By dotted place, the settings that a run is. Those of validation are among them where they decide when it ends or which
    weights become its result. Rules of importance are not: they lie in a file (`rules_digest`)."""
    validation = recipe.validation
    decides = validation is not None and (recipe.export == "best" or validation.patience is not None)
    found = {}
    for place, value in flat(recipe.model_dump(mode="json")):
        deciding = decides and place.startswith("validation.") and place != "validation.fidelity"
        if (role_of(place) == "is" or deciding) and not f"{place}.".startswith("losses.importance."):
            found[place] = value
    importance = recipe.objective.importance
    return found | ({} if importance is None else {"losses.importance.normalise": importance.normalise})


def rules_digest(recipe: RunRecipe) -> str | None:
    """What the rules of importance say, wherever they lie; None where the objective has none."""
    importance = recipe.objective.importance
    return None if importance is None else load_rules(importance.rules).digest


def differences(held: dict[str, Any], asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By place, (held, asked) where they do not mean the same; None stands for a place that is absent."""
    places = [
        place for place in dict.fromkeys((*held, *asked)) if _meant(place, held.get(place)) != _meant(place, asked.get(place))
    ]
    return {place: (held.get(place), asked.get(place)) for place in places}


def _meant(place: str, value: Any) -> Any:
    """A preset by whichever of its names is one and the same."""
    return preset_name(value) if place == "preset" and isinstance(value, str) else value
