"""The names that the losses knew requests by, until they make them of the classes in `student_train/data/signals/`."""

from model_taps.slices import State
from signal_store.cache import Cache
from student_train.data.request import SignalRequest
from student_train.data.signals.attention import AttentionRequest
from student_train.data.signals.base import Request
from student_train.data.signals.coverage import CoverageRequest
from student_train.data.signals.distribution import DistributionRequest
from student_train.data.signals.evidence import EvidenceRequest
from student_train.data.signals.hidden import HiddenRequest
from student_train.data.signals.replay import ReplayRequest
from student_train.data.signals.stats import StatsRequest
from student_train.data.signals.tags import TagsRequest
from student_train.data.unit import UnitReader


class Needs(SignalRequest):
    """A request for signals, by the arguments that there were."""

    def __init__(
        self,
        distribution: bool,
        hidden: tuple[State, ...],
        attention: tuple[int, ...],
        steps: bool = False,
        statistics: tuple[int, ...] = (),
        replay: bool = False,
        tags: bool = False,
        evidence: tuple[int, ...] = (),
        coverage: bool = False,
        sparsity: bool = False,
    ) -> None:
        wanted: dict[Request, bool] = {
            DistributionRequest(): distribution,
            HiddenRequest(hidden): True,
            AttentionRequest(attention, steps): True,
            StatsRequest(statistics, sparsity): True,
            ReplayRequest(): replay,
            TagsRequest(): tags,
            EvidenceRequest(evidence): True,
            CoverageRequest(): coverage,
        }
        super().__init__(SignalRequest.of(*(request for request, asked in wanted.items() if asked)).signals)

    def union(self, other: SignalRequest) -> "Needs":
        """What either reads."""
        found = Needs(False, (), ())
        found.signals.update((self | other).signals)
        return found


TOKENS_ONLY = Needs(False, (), ())


def load_units(cache: Cache, units: list[int], needs: SignalRequest) -> list[UnitReader]:
    """See `SignalRequest.load`."""
    return needs.load(cache, units)
