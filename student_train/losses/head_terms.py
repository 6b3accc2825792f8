"""What a pass over the output head is given: the terms that it forms, and what the rows are compared with.

Legend: N rows whose distribution counts, V vocabulary of the student, D its width, K terms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from student_train.data.aligned_rows import AlignedRows
from student_train.losses.across import AcrossDivergence
from student_train.losses.divergence import Divergence


@dataclass(frozen=True, slots=True)
class OutputTerm:
    """`divergence` from the cached distribution, over the same tokens or across two vocabularies; None: cross-entropy with the
    labels. `scale`: what the sum over rows is multiplied
    by in the total, weight / global count (times ranks). A divergence counts `temperature`² times."""

    divergence: Divergence | AcrossDivergence | None
    scale: float
    temperature: float = 1.0
    weighted: bool = True
    """Whether the targets' weights are for this term."""


@dataclass(frozen=True, slots=True)
class OutputTargets:
    """What the rows are compared with. `labels` int64 [N], IGNORE where none is stored; `codes` of the same rows; `codec` decodes
    them; `weights` float32 [N] multiplies each row's losses of the weighted terms, None is 1; `aligned`: how the rows stand to the
    teacher's, where the tokens are others."""

    labels: Tensor
    codes: DistributionCodes | None = None
    codec: DistributionCodec | None = None
    weights: Tensor | None = None
    aligned: AlignedRows | None = None


OutputLoss = Callable[[Tensor, OutputHead, OutputTargets, Sequence[OutputTerm]], tuple[Tensor, Tensor]]
"""From hidden states [N, D] to (Σ scale · loss, in the graph; losses of each row [K, N] in nats); K is at least 1."""
