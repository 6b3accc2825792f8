"""From a YAML file and `key=value` overrides to a validated recipe; every mistake in one line."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from signal_store.errors import InputError, NotFoundError
from signal_store.nearest import nearest

LARGEST = 2**53
Recipe = TypeVar("Recipe", bound=BaseModel)


def _local(path: Path) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # Path has made one slash of two
        raise ValueError("must be on this machine, it is no address")
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path's own raises where there is no such user)


LocalPath = Annotated[Path, AfterValidator(_local)]
"""A path of this machine; ~ is its user's home."""
ModelName = Annotated[str, AfterValidator(os.path.expanduser)]
"""A model's folder or hub name."""


def load_recipe(path: Path | str, overrides: Sequence[str], model: type[Recipe]) -> Recipe:
    """The recipe in the YAML file at `path`, with dotted `key=value` overrides (values are YAML) on top."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError("no such recipe", expected="a YAML file", found=path)
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("the recipe is not YAML", found=error, where=path) from error
    if not isinstance(content, dict):
        raise InputError("the recipe is not a mapping", expected="key: value lines", found=type(content).__name__, where=path)
    _refuse_lost([override.partition("=")[0] for override in overrides])
    for override in overrides:
        apply_override(content, override)
    return validate(content, model, where=str(path))


def lost_places(places: Sequence[str]) -> tuple[str, str] | None:
    """Of dotted places that are set in this order, the first that a later one sets again, by itself or with all that holds it, and
    that later one. The other way round, a part after the whole, nothing is lost."""
    for number, later in enumerate(places):
        if earlier := next((place for place in places[:number] if f"{place}.".startswith(f"{later}.")), None):
            return earlier, later
    return None


def _refuse_lost(places: Sequence[str]) -> None:
    if lost := lost_places(places):
        raise InputError(
            "an override is lost to a later one",
            expected=f"{lost[0]} once",
            found=" ".join(f"{place}=…" for place in lost),
            where="the overrides",
            remedy="Give one of them, or the part after the whole.",
        )


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested mappings, in place; sequence items are addressed by number."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError("not an override", expected="key=value", found=override)
    *parents, last = key.split(".")
    node: Any = content
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise InputError("an override addresses nothing", expected="a mapping", found=repr(node), where=key)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = _parsed(value, override)
    elif isinstance(node, dict):
        node[last] = _parsed(value, override)
    else:
        raise InputError("an override addresses nothing", expected="a mapping", found=repr(node), where=key)


def _parsed(value: str, override: str) -> Any:
    try:
        return _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("an override's value is not YAML", found=override) from error


class _Loader(yaml.SafeLoader):
    """A key that is given twice is an error: YAML takes the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def validate(content: Any, model: type[Recipe], where: str) -> Recipe:
    """`content` as a `model`; InputError listing every mistake with its place."""
    try:
        if problem := next(_unwritable(content, ""), None):
            raise InputError(f"the recipe is wrong: {problem}", where=where)
        return model.model_validate(content)
    except RecursionError as error:
        raise InputError("the recipe is wrong: it holds itself", where=where) from error
    except ValidationError as error:
        problems = "; ".join(_problem(dict(e), model) for e in error.errors())
        raise InputError(f"the recipe is wrong: {problems}", where=where) from error


def _unwritable(value: Any, place: str) -> Iterator[str]:
    """What of a recipe JSON does not carry everywhere, and so no record of it could hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            inside = f"{place}.{key}" if place else str(key)
            if not isinstance(key, str):
                yield f"{inside}: a key must be text, found {key!r}"
            yield from _unwritable(item, inside)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _unwritable(item, f"{place}.{number}")
    elif (isinstance(value, int) and abs(value) >= LARGEST) or (isinstance(value, float) and not math.isfinite(value)):
        yield f"{place}: a number must be finite and below 2**53, found {value!r}"
    elif not isinstance(value, str | int | float | Path | None):
        yield f"{place}: expected text, a number, a list or a mapping, found {type(value).__name__} {value!s:.80}"


def _problem(error: dict[str, Any], model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        keys = _all_keys(model)
        near = nearest(str(error["loc"][-1]), keys)
        return f"unknown key {place}" + (f" (perhaps {keys[near]})" if near else "")
    if error["type"] == "missing":
        return f"{place} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}, found {str(error['input'])[:80]!r}"


def _all_keys(model: type[BaseModel]) -> dict[str, str]:
    """Keys of a model and of the models in its fields, for a hint: the dotted place of each, the outermost if there are several."""
    places: dict[str, str] = {}
    pending: list[tuple[Any, str]] = [(model, "")]
    seen: set[Any] = set()
    while pending:
        kind, inside = pending.pop(0)
        if kind in seen:
            continue
        seen.add(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                places.setdefault(name, inside + name)
                pending.append((field.annotation, f"{inside}{name}."))
            pending += [(more, f"{inside}{name}.") for name, more in getattr(kind, "more_keys", dict)().items()]
        else:
            pending += [(part, inside) for part in getattr(kind, "__args__", ())]
    return places
