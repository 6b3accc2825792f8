"""The section of a recipe that says which terms, how heavy, with which settings."""

from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from signal_store.format.section import Section
from student_train.losses import registry
from student_train.losses.kinds import Kind
from student_train.losses.term import AcrossTerm, LogitsTerm, StateTerm, TermSection, TokenWeightsTerm

if TYPE_CHECKING:
    from student_train.importance.section import ImportanceSection
    from student_train.losses.cross_entropy import CrossEntropySection
    from student_train.losses.gate import GateSection
    from student_train.losses.parameter_anchor import ParameterAnchorSection
    from student_train.losses.router_balance import RouterBalanceSection


class Losses(Section):
    """Terms by name; one that is left out, or null, is off. Made by `of`, with a field for every term of the registry, in the order
    in which they are summed.

    `router_balance`, left out, is as the student's config says (`output_router_logits` and its coefficient); null, it is off.
    """

    if TYPE_CHECKING:  # those that code asks for by name
        cross_entropy: CrossEntropySection | None
        gate: GateSection | None
        importance: ImportanceSection | None
        parameter_anchor: ParameterAnchorSection | None
        router_balance: RouterBalanceSection | None

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Losses":
        """Checked; ValidationError with the place of each mistake, an unknown name too."""
        return cls.with_every_term().model_validate(content)

    @classmethod
    @cache
    def with_every_term(cls) -> type["Losses"]:
        """The class with its fields."""
        fields: dict[str, Any] = {name: (term.section | None, None) for name, term in registry.terms().items()}
        made: type[Losses] = create_model("Losses", __base__=cls, __doc__=cls.__doc__, **fields)
        return made

    @property
    def knowledge(self) -> dict[str, TermSection]:
        """Terms that are on and have a kind, by name."""
        return {name: term for name, term in self if name in registry.kinds() and isinstance(term, TermSection)}

    @property
    def divergences(self) -> dict[str, Any]:
        """Terms that compare with the cached distribution, by name."""
        known = registry.terms()
        found = {}
        for name, term in self.knowledge.items():
            spec = known[name]
            if isinstance(spec, AcrossTerm) or (isinstance(spec, LogitsTerm) and spec.divergence is not None):
                found[name] = term
        return found

    def without(self, kinds: Collection[Kind]) -> "Losses":
        """The same, terms of these kinds switched off; and the weights of tokens with the divergences."""
        known = registry.kinds()
        off = [name for name in self.knowledge if known[name] in kinds]
        if Kind.EXPLICIT in kinds:
            off += [name for name, term in registry.terms().items() if isinstance(term, TokenWeightsTerm)]
        return self.model_copy(update=dict.fromkeys(off))

    def empty_kinds(self) -> tuple[Kind, ...]:
        """Kinds of knowledge that no term carries."""
        known = registry.terms()
        carrying = [known[name] for name in self.knowledge]
        held = {term.kind for term in carrying if isinstance(term, LogitsTerm | AcrossTerm | StateTerm)}
        return tuple(kind for kind in Kind if kind not in held)
