"""Which term moves the student: each term's share of the gradient's norm, every term by itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from student_train.data.batch import CodedBatch
from student_train.data.request import SignalRequest
from student_train.evaluate.evaluation import SHARE, Quantity
from student_train.losses.objective import Objective
from student_train.model.parallel import ParallelModel

SUFFIX = "_gradient_share"
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class GradientShares:
    """At a `progress` of the run. Costs a forward and a backward pass for each term; leaves no gradient behind."""

    objective: Objective
    progress: float
    name: ClassVar[str] = "gradient shares"

    @property
    def needs(self) -> SignalRequest:
        """Whatever the objective reads."""
        return self.objective.needs

    def run(self, student: ParallelModel, batches: Iterable[CodedBatch]) -> dict[str, Quantity]:
        """‖g_i‖ / Σ_j ‖g_j‖, g_i the gradient of term i as it is weighed now; norms summed over batches.

        Returns:
            by "<term>_gradient_share".
        """
        terms = tuple(self.objective.terms)
        weights = self.objective.weights(self.progress)
        norms = torch.zeros(len(terms), device=student.accelerator.device)
        for coded in batches:
            counts, batch = self.objective.counts(coded), coded.to(student.accelerator.device)
            for number, name in enumerate(terms):
                scales = dict.fromkeys(terms, 0.0) | {name: weights[name] / max(1.0, counts[name])}
                with student.micro_step(last=True):
                    with student.accelerator.autocast():
                        total, _ = student.model(batch, scales, self.progress)
                    total.backward()
                norms[number] += student.clipped_norm(math.inf).to(norms.device)
                student.distiller.zero_grad(set_to_none=True)
        found = dict(zip(terms, norms.tolist(), strict=True))  # waits once, for all terms
        return {f"{name}{SUFFIX}": Quantity(norm / max(sum(found.values()), TINY), SHARE) for name, norm in found.items()}
