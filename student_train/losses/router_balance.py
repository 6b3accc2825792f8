"""The load-balancing loss of a mixture of experts (Switch Transformers, Fedus et al. 2021, equations 4 to 6), as the student's own
family computes it in its forward pass, which a run does not call; and the check that a family adds no other loss there.

Experts · Σ_i f_i P_i over the real tokens of one forward pass and all its layers: f_i the share of tokens that go to expert i, P_i
the mean probability that the router gives it. Filler takes no part. Over the micro-batches and ranks of a step it is their mean by
real tokens. The product is not linear in tokens: micro-batches of another size weigh the balance a little differently, as they do
wherever the family's own forward pass is trained. No other term is so.
Legend: B rows, S tokens a row, V vocabulary.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.evaluating import evaluating
from signal_store.errors import InputError, MismatchError
from signal_store.format.section import Section
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import RegularisationTerm

KNOWN_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What families call the coefficient, on the model."""
PROBE_TOKENS = 16
TOLERANCE = 1e-4
"""Of a loss in nats: below any coefficient in use times a loss that is at least 1."""


class RouterBalanceSection(Section):
    """experts · Σ_i f_i P_i, the load-balancing loss that the student's own family adds to cross-entropy: f_i the share of tokens
    sent to expert i, P_i the mean probability of its router; mean over the tokens of a forward pass."""

    weight: WeightField | None = None
    """None: the coefficient of the student's config."""


@dataclass(frozen=True, slots=True)
class RouterBalance:
    """A family's own function and what it passes to it; `coefficient` is the config's."""

    function: Callable[..., Tensor]
    experts: int
    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[Tensor, ...], real_BS: Tensor) -> Tensor:
        """experts · Σ_i f_i P_i times the number of real tokens.

        Args:
            router_logits: by layer, float [B · S, experts], in the graph.
            real_BS: bool or int [B, S]; what is not real takes no part.
        Returns:
            float32 scalar, without unit, a sum over real tokens.
        Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6.
        """
        return self.function(router_logits, self.experts, self.top_k, real_BS) * real_BS.sum()


def family_balance(student: PreTrainedModel) -> RouterBalance | None:
    """The balance that the student's family knows; None where it has none, or one of another shape."""
    function = getattr(sys.modules[type(student).__module__], "load_balancing_loss_func", None)
    if function is None or tuple(inspect.signature(function).parameters) != KNOWN_ARGUMENTS:
        return None
    coefficient = next((value for name in COEFFICIENTS if (value := getattr(student, name, None)) is not None), 0.0)
    experts, top_k = getattr(student, "num_experts", None), getattr(student, "num_experts_per_tok", None)
    if not isinstance(experts, int) or not isinstance(top_k, int):
        return None
    return RouterBalance(function, experts, top_k, float(coefficient))


def asks_for_it(student: PreTrainedModel) -> bool:
    """Whether the student's config switches the loss on: routers' logits are given out, and the coefficient is not 0."""
    on = any(getattr(config, "output_router_logits", False) for config in (student.config, student.config.get_text_config()))
    coefficients = [getattr(student, name, getattr(student.config, name, 0)) for name in COEFFICIENTS]
    return bool(on) and any(coefficients)


def resolve_balance(
    section: RouterBalanceSection | None, *, given: bool, student: PreTrainedModel
) -> tuple[RouterBalanceSection | None, RouterBalance | None]:
    """The section as the recipe says, or, where it says nothing (`given`: it says something, if only null), the student's config;
    and what computes it. MismatchError where the recipe wants it and the family has none that is known here; of a config,
    `refuse_lost_losses` sees to it."""
    balance = family_balance(student)
    if section is None and (given or balance is None or not asks_for_it(student)):
        return None, None
    if balance is None:
        raise MismatchError(
            "router_balance: the student's family has no such loss that is known here",
            expected="a mixture of experts with transformers' load_balancing_loss_func",
            found=student.config.model_type,
            where="losses.router_balance",
            remedy="Switch it off: losses.router_balance: null.",
        )
    if section is None or section.weight is None:
        section = RouterBalanceSection(weight=constant(balance.coefficient))
    if section.weight is not None and section.weight.start == section.weight.end == 0:
        return None, None
    return section, balance


@torch.no_grad()
def refuse_lost_losses(student: PreTrainedModel, vocab_size: int, balance: RouterBalance | None) -> None:
    """InputError where the family's own forward pass adds to cross-entropy what a run here would lose. MismatchError where
    `balance`, the objective's, is not the family's own value."""
    if "labels" not in inspect.signature(student.forward).parameters:
        return
    ids_BS = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids_BS = ids_BS.to(next(student.parameters()).device)
    options = {} if balance is None else {"output_router_logits": True}
    try:
        with evaluating(student):
            found = student(input_ids=ids_BS, labels=ids_BS, use_cache=False, **options)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        if balance is None:
            return  # a family that cannot form a loss of its own adds none
        raise _unheard(student, f"{type(error).__name__}: {error}") from error
    whole_BS = torch.ones_like(ids_BS)
    if balance is not None:
        ours, own = float(balance(found.router_logits, whole_BS)) / whole_BS.numel(), float(found.aux_loss)
        if abs(ours - own) > TOLERANCE * max(1.0, abs(own)):
            raise _unheard(student, f"{own:.6g} by the family itself, {ours:.6g} here")
    switched_off = family_balance(student) if balance is None and asks_for_it(student) else None
    added_by = balance or switched_off
    known = 0.0 if added_by is None else added_by.coefficient * float(added_by(found.router_logits, whole_BS)) / whole_BS.numel()
    logits_SV = found.logits[0].float()
    plain = (
        torch.nn.functional.cross_entropy(logits_SV[:-1], ids_BS[0, 1:]),
        torch.nn.functional.cross_entropy(logits_SV, ids_BS[0]),  # families made for encoders' partners do not shift
    )
    added = min((float(found.loss) - float(each) for each in plain), key=lambda value: abs(value - known))
    if abs(added - known) > TOLERANCE * max(1.0, float(plain[0])):
        raise InputError(
            "the student's family adds a loss of its own, which a run here would lose",
            expected=f"cross-entropy{f' and {known:.4g} nats of router_balance' if known else ''}",
            found=f"{added:.4g} nats more than cross-entropy",
            where=f"the forward pass of {type(student).__name__}",
            remedy="Set the coefficient of that loss to 0 in the student's config.",
        )


def _unheard(student: PreTrainedModel, found: str) -> MismatchError:
    return MismatchError(
        "router_balance: the student's routers do not give what its family's loss needs",
        expected="the logits of each",
        found=found[:200],
        where=f"the forward pass of {type(student).__name__}",
        remedy="Switch it off: losses.router_balance: null.",
    )


TERM = RegularisationTerm(section=RouterBalanceSection, about="the load of the student's experts")
