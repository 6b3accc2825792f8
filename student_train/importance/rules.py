"""The rule base: what each role weighs, and the corners between which a weight is interpolated. Versioned; a user's file on top.

This file does not import torch: recipes name it.
"""

from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from signal_store.canonical import digest
from signal_store.errors import InputError, NotFoundError
from signal_store.format.roles import LEVELS
from signal_store.format.section import Section

LEAST, MOST = 0.2, 3.0
Impact = Annotated[float, Field(ge=0, le=1)]
CornerWeight = Annotated[float, Field(ge=LEAST, le=MOST)]


class Corners(Section):
    """The weight where impact and confidence are 0 or 1."""

    low_confident: CornerWeight
    low_unsure: CornerWeight
    high_confident: CornerWeight
    high_unsure: CornerWeight

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_confident > self.high_confident or self.low_unsure > self.high_unsure:
            raise ValueError("a token of more impact must not weigh less")
        return self


class Rules(Section):
    """See `rules.yaml`."""

    version: int
    shares: dict[str, Impact]
    default: Impact
    corners: Corners
    pos: dict[str, Impact]
    dependency: dict[str, Impact]
    semantic: dict[str, Impact]
    code: dict[str, Impact]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for level, names in LEVELS.items():
            if unknown := sorted(getattr(self, level).keys() - set(names)):
                raise ValueError(f"{level} has no {', '.join(unknown)}; it has {', '.join(names[1:])}")
        if self.shares.keys() != {"pos", "dependency", "semantic"} or not sum(self.shares.values()):
            raise ValueError("shares are of pos, dependency and semantic, and not all 0")
        return self

    @cached_property
    def digest(self) -> str:
        """Of all of it: what a run's record names."""
        return digest(self.model_dump(mode="json"))


def load_rules(path: Path | None = None) -> Rules:
    """The shipped rules, single values replaced by those of a user's YAML file; InputError naming what is wrong with it."""
    content: dict[str, Any] = yaml.safe_load(files("student_train.importance").joinpath("rules.yaml").read_text())
    if path is not None:
        if not path.is_file():
            raise NotFoundError("no such file", found=path, where="importance.rules")
        try:
            own = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise InputError("not YAML", found=str(error).splitlines()[0], where=path) from error
        if not isinstance(own, dict):
            raise InputError("rules are a mapping", found=type(own).__name__, where=path)
        for name, value in own.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) and isinstance(content.get(name), dict) else value
    try:
        return Rules.model_validate(content)
    except ValueError as error:
        line = "; ".join(str(error).splitlines()[1:3]).strip()
        raise InputError("rules do not hold", found=line, where=path or "the shipped rules") from error
