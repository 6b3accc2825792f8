"""Residual maps: what attention adds to the stream, compared by the similarities between a segment's tokens: 1 - debiased CKA, of
any two widths."""

from torch import Tensor
from transformers import PreTrainedModel

from model_taps.spread import Groups
from signal_store.cache import Cache
from student_train.losses.cka import debiased_cka
from student_train.losses.features import FeatureSection, GroupedLoss
from student_train.losses.kinds import Kind
from student_train.losses.schedule import WeightField, constant
from student_train.losses.term import StateTerm


class ResidualCkaSection(FeatureSection):
    """1 - CKA of the attention's outputs over a segment's tokens, linear, by the debiased estimator; mean over segments."""

    weight: WeightField = constant(0.1)


class ResidualCka(GroupedLoss):
    """Without parameters: no map is learned, for CKA needs none."""

    def __init__(self, section: ResidualCkaSection, cache: Cache, student: PreTrainedModel) -> None:
        super().__init__("residual_cka", ("attention_output", "attention_output"), section.depth_decay, cache, student)
        self.max_tokens = section.max_tokens

    def group_sum(self, _number: int, own_Pd: Tensor, other_PD: Tensor, groups: Groups) -> Tensor:
        """Over segments."""
        if not len(groups.index):
            return 0 * own_Pd.sum()
        return (1 - debiased_cka(groups.of(own_Pd), groups.of(other_PD), groups.inside)).sum()


TERM = StateTerm(section=ResidualCkaSection, kind=Kind.STRUCTURED, module=ResidualCka, residue=1e-4, across=True)
