"""The recipe of a sweep: a base run, and what is varied."""

import itertools
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from run_kit.recipe_file import LocalPath, apply_override, lost_places, validate
from signal_store.canonical import digest
from signal_store.format.section import Section, Seed
from student_train.recipe import RunRecipe, flat

Validated = Literal["validation_loss", "kl", "entropy_gap", "calibration_error", "agreement", "overlap"]
Metric = Literal[Validated, "tokens_per_second", "peak_rss_bytes", "parameters"]
HIGHER_IS_BETTER = {"agreement", "overlap", "tokens_per_second"}


class SweepRecipe(Section):
    """Every variant, at every combination of the matrix, with every seed. Keys are dotted places of a run recipe."""

    out: LocalPath
    base: dict[str, Any]
    """A run recipe without `out`."""
    variants: dict[str, dict[str, Any]] = Field({"base": {}}, min_length=1)
    """By name, what is set on top of the base; a preset's term is switched off by `losses.<term>: null`."""
    matrix: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """By place, the values that each variant is run with."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """Each sets `seed`, `student.seed` and `stream.seed`."""
    metric: Metric = "validation_loss"
    """What the report ranks by: a number of result.json."""
    order: Literal["lowest", "highest"] | None = None
    """Which comes first; None: the better."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        varied = {*self.matrix, *(place for changes in self.variants.values() for place in changes)}
        given = varied | {place for place, _ in flat(self.base)}
        if "out" in given:
            raise ValueError("the sweep itself gives every run its out: leave it out of base, variants and matrix")
        if twice := sorted({"seed", "student.seed", "stream.seed"} & given):
            raise ValueError(f"seeds sets {', '.join(twice)}: leave it out of base, variants and matrix")
        for name, changes in {**self.variants, "of the matrix": self.matrix}.items():
            if lost := lost_places(list(changes)):
                raise ValueError(f"variant {name} sets {lost[1]} after {lost[0]}, which is lost")
        for name, changes in self.variants.items():
            if twice := sorted(place for place in changes if any(_overlap(place, other) for other in self.matrix)):
                raise ValueError(f"variant {name} and the matrix both set {', '.join(twice)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"a seed is named twice: {self.seeds}")
        if any(len({repr(value) for value in values}) != len(values) for values in self.matrix.values()):
            raise ValueError("matrix: a value is named twice")
        if self.metric in get_args(Validated) and self.base.get("validation") is None:
            raise ValueError(f"metric: {self.metric} needs base.validation")
        if empty := [place for place, values in self.matrix.items() if not values]:
            raise ValueError(f"matrix: no values for {', '.join(empty)}")
        return self

    @property
    def ranking(self) -> Literal["lowest", "highest"]:
        """Which comes first."""
        return self.order or ("highest" if self.metric in HIGHER_IS_BETTER else "lowest")


def _overlap(place: str, other: str) -> bool:
    """Whether one of two dotted places holds the other."""
    return f"{place}.".startswith(f"{other}.") or f"{other}.".startswith(f"{place}.")


class PlannedRun(Section):
    """One run of a sweep: the `group` it is averaged in, its seed, and its resolved recipe."""

    group: str
    seed: int
    recipe: RunRecipe


def planned_runs(sweep: SweepRecipe) -> list[PlannedRun]:
    """All runs, in order; InputError naming the first that is wrong, before any starts."""
    places = list(sweep.matrix)
    runs = []
    for (name, variant), values in itertools.product(sweep.variants.items(), itertools.product(*sweep.matrix.values())):
        point = dict(zip(places, values, strict=True))
        group = ", ".join([name, *(f"{place}={value}" for place, value in point.items())])
        for seed in sweep.seeds:
            content: dict[str, Any] = _copied(sweep.base)
            seeds = dict.fromkeys(("seed", "student.seed", "stream.seed"), seed)
            for place, value in {**variant, **point, **seeds}.items():
                apply_value(content, place, value)
            content["out"] = str(sweep.out / "runs" / folder_name(group) / f"seed-{seed}")
            runs.append(PlannedRun(group=group, seed=seed, recipe=validate(content, RunRecipe, where=f"run {group}, seed {seed}")))
    return runs


def folder_name(group: str) -> str:
    """A folder's name for a group, readable and unlike any other's."""
    plain = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in group)[:80]
    return f"{plain}-{digest(group).removeprefix('sha256:')[:6]}"


def apply_value(content: dict[str, Any], place: str, value: Any) -> None:
    """Set a dotted place of a nested mapping."""
    apply_override(content, f"{place}=null")
    node: Any = content
    *parents, last = place.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value
