"""Which terms there are: every file of this package that exports a TERM, by the file's name. A new term is one new file.

Names in a recipe are looked up here and nowhere else: nothing is imported because a recipe names it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from student_train.losses.kinds import Kind
from student_train.losses.term import AcrossTerm, KnowledgeTerm, LogitsTerm, StateTerm, Term, TermSection

PACKAGE = "student_train.losses"
ORDER = (
    "cross_entropy", "forward_kl", "reverse_kl", "jsd", "total_variation", "strict", "prefix", "likelihood", "uld",
    "lhsm", "apc", "asr", "attention_direction",
    "normalised_direction", "activation_mmd", "input_reconstruction", "residual_cka", "attention_statistics", "smoothness",
    "attention_evolution", "replay", "gate", "evidence", "coverage", "parameter_anchor", "router_balance", "importance",
)  # fmt: skip
"""In which losses are summed and weights drawn, which runs depend on to the last bit; other terms follow, by name."""


@cache
def terms() -> Mapping[str, Term]:
    """Every term by name, in the order in which they are summed. TypeError naming a file whose TERM is none."""
    found: dict[str, Term] = {}
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
        exported = vars(importlib.import_module(f"{PACKAGE}.{module.name}"))
        if "TERM" in exported:
            found[module.name] = _checked(module.name, exported["TERM"])
    known = {name: place for place, name in enumerate(ORDER)}
    return MappingProxyType(dict(sorted(found.items(), key=lambda term: (known.get(term[0], len(ORDER)), term[0]))))


def _checked(name: str, term: object) -> Term:
    if not isinstance(term, Term):
        raise TypeError(f"{PACKAGE}.{name}: TERM must be a Term, found {type(term).__name__}")
    if needed := [key for key, field in term.section.model_fields.items() if field.is_required()]:
        raise TypeError(f"{PACKAGE}.{name}: every setting must have a default, {', '.join(needed)} has none")
    if isinstance(term, KnowledgeTerm) and not issubclass(term.section, TermSection):
        raise TypeError(f"{PACKAGE}.{name}: the section must be a TermSection, found {term.section.__name__}")
    compares = isinstance(term, AcrossTerm) or (isinstance(term, LogitsTerm) and term.divergence is not None)
    if compares and "temperature" not in term.section.model_fields:
        raise TypeError(f"{PACKAGE}.{name}: the section of a divergence must have a temperature")
    return term


def kinds() -> dict[str, Kind]:
    """By name of every term that carries knowledge, of which kind."""
    return {name: term.kind for name, term in terms().items() if isinstance(term, KnowledgeTerm)}


def state_terms() -> dict[str, StateTerm]:
    """Those on the student's states or attention."""
    return {name: term for name, term in terms().items() if isinstance(term, StateTerm)}
