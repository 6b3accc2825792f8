"""What a run would optimise, against which cache, in words."""

from typing import Any

from transformers import PreTrainedModel

from signal_store.cache import Cache, open_cache
from student_train.align.aligned_cache import student_tokens, student_vocabulary
from student_train.data.stream import Stream
from student_train.evaluate.validation import check_splits
from student_train.importance.rules import load_rules
from student_train.losses import registry
from student_train.losses.across_check import alignment_of, refuse_few_rows
from student_train.losses.kinds import Kind
from student_train.losses.objective import Objective, refusals, resolve
from student_train.losses.presets import find_preset
from student_train.losses.router_balance import family_balance, refuse_lost_losses
from student_train.losses.term import RegularisationTerm
from student_train.recipe import RunRecipe
from student_train.session.reading import looked_at_cache
from student_train.student.build import build_student


def explanation(recipe: RunRecipe) -> dict[str, Any]:
    """Resolve a recipe's objective against its cache and its student, and say it. See `student_train.commands.explain`."""
    with looked_at_cache(recipe, open_cache(recipe.cache)) as cache:
        return _explained(recipe, cache)


def _explained(recipe: RunRecipe, cache: Cache) -> dict[str, Any]:
    student, _ = build_student(recipe.student, cache)
    objective = resolve(recipe.objective, cache, student, recipe.tail_rank)
    refuse_few_rows(objective.across, cache, recipe.align)
    refuse_lost_losses(student, student_vocabulary(cache), objective.balance)
    check_splits(cache, validates=recipe.validation is not None)
    Stream(cache, objective.needs, recipe.stream, packed=True)  # refuses what it cannot cut
    terms = [
        {
            "term": name,
            "kind": _kind(name),
            "weight": str(term.weight),
            "source": _source(recipe, name),
            "settings": term.model_dump(mode="json", exclude={"weight"}),
            "formula": _formula(term),
            "reads": _reads(objective, name),
            "taps": _taps(objective, name),
        }
        for name, term in objective.terms.items()
    ]
    if anchor := objective.losses.parameter_anchor:
        formula = _formula(anchor)
        about = {"term": "parameter_anchor", "kind": _kind("parameter_anchor"), "formula": formula, "settings": {}}
        terms.append(
            {**about, "weight": str(anchor.weight), "source": _source(recipe, "parameter_anchor"), "reads": [], "taps": []}
        )
    kinds = {kind: [name for name in objective.terms if _kind(name) == kind] for kind in Kind}
    importance = objective.losses.importance
    weights_of_tokens = "1 each"
    if importance is not None:
        weights_of_tokens = f"0.2 to 3, rules {load_rules(importance.rules).digest[:19]}, divided by {importance.normalise}"
    tokens = student_tokens(cache, sum(source.num_tokens for source in cache.sources if source.split == "train"))
    per_step = recipe.stream.sequence_length * recipe.stream.global_batch_rows
    return {
        "cache_id": cache.manifest.cache_id,
        "parameters": sum(p.numel() for p in student.parameters()),
        "terms": terms,
        "off": _off(recipe, objective, cache, student),
        "kinds": kinds,
        "weights_of_tokens": weights_of_tokens,
        **({"alignment": found} if (found := alignment_of(objective.across, cache)) else {}),
        "weights_at_progress": {str(p): objective.weights(p) for p in (0.0, 0.2, 0.6, 1.0)},
        "tokens_per_step": per_step,
        "train_tokens": tokens,
        "epochs": recipe.steps * per_step / max(1, tokens),
    }


def _kind(name: str) -> str:
    term = registry.terms()[name]
    return f"none: {term.about}" if isinstance(term, RegularisationTerm) else str(registry.kinds()[name])


def _formula(term: object) -> str:
    """What a term's section says of itself."""
    return " ".join((type(term).__doc__ or "").split())


def text_of(found: dict[str, Any]) -> str:
    """For a terminal of any width: a paragraph a term, then those that are off and why, then the stream."""
    lines = []
    for term in found["terms"]:
        settings = "".join(f", {key}: {value}" for key, value in term["settings"].items())
        lines += [
            f"{term['term']} ({term['kind']}), weight {term['weight']} ({term['source']}){settings}",
            f"    {term['formula']}",
        ]
        lines += [f"    {what}: {', '.join(term[what])}" for what in ("reads", "taps") if term[what]]
    lines += ["", "off"]
    lines += [f"    {term['term']} ({term['kind']}): {term['why']}" for term in found["off"]]
    rest = {key: value for key, value in found.items() if key not in ("terms", "off", "kinds")}
    lines.append("")
    for key, value in rest.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{key}: {shown:,.2f}" if isinstance(shown, float) else f"{key}: {shown}")
    return "\n".join(lines)


def _source(recipe: RunRecipe, name: str) -> str:
    """Who gave a term its weight."""
    given = recipe.losses.get(name)
    if isinstance(given, dict) and "weight" in given:
        return "losses"
    preset = find_preset(recipe.preset)
    held = {} if preset is None else preset.losses
    if name == "router_balance":
        return "the student's config"
    if name not in held:
        return "the term's default"
    return f"preset {recipe.preset}" if "weight" in held[name] else f"preset {recipe.preset}, the term's default"


def _off(recipe: RunRecipe, objective: Objective, cache: Cache, student: PreTrainedModel) -> list[dict[str, str]]:
    """Terms that are not in the objective, and why: who left them out, or what they would be refused for."""
    refused = refusals(cache, student)
    found = []
    for name, kind in registry.kinds().items():
        if name in objective.terms:
            continue
        if kind in recipe.without:
            why = f"without: {kind}"
        elif name in recipe.losses:
            why = f"losses.{name}: null"
        else:
            why = f"not in {'preset ' + recipe.preset if recipe.preset else 'losses'}"
        cannot = refused.get(name, "").removeprefix(f"{name}: ").removeprefix(f"{name} ")
        found.append({"term": name, "kind": kind, "why": why + (f"; could not be had: {cannot}" if cannot else "")})
    if objective.balance is None and (balance := family_balance(student)) is not None:
        given = "losses.router_balance" if "router_balance" in recipe.losses else "output_router_logits of the student's config"
        why = f"{given}; its coefficient there is {balance.coefficient:g}"
        found.append({"term": "router_balance", "kind": _kind("router_balance"), "why": why})
    return found


def _reads(objective: Objective, name: str) -> list[str]:
    """What a term reads of the cache."""
    if name == "gate":
        return ["distribution", "tags, where there are some"]
    if name not in objective.states:
        return ["tokens" if name in {"cross_entropy", "router_balance"} else "distribution"]
    return [what for request in objective.states[name].reads.cache for what in request.described()]


def _taps(objective: Objective, name: str) -> list[str]:
    """What a term reads of the student."""
    if name == "gate":
        return ["what the terms that it weighs read"]
    if name not in objective.states:
        return ["routers of its experts" if name == "router_balance" else "output head"]
    reads = objective.states[name].reads
    rows = [f"attention rows of block {layer}" for layers in (reads.rows or {}).values() for layer in layers]
    return [*(f"{tap} of block {layer}" for tap, layer in reads.states), *rows]
