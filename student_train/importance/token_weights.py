"""From roles and the teacher's entropy to weights.

Impact I = Σ share · value over the levels that say something, their shares made to add up to 1; of code, its role's value.
Confidence c = 1 - H / log V. The weight is bilinear between four corners in s(I) and s(c), s(x) = 3x² - 2x³: smooth in both, never
outside [0.2, 3].
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from signal_store.format.roles import LEVELS
from student_train.importance.rules import LEAST, MOST, Corners, Rules

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TokenWeights:
    """`values` [4, 256] by level and stored role, NaN for one that says nothing; `shares` [3]."""

    values: Array
    shares: Array
    default: float
    corners: Corners
    log_vocab: float

    @classmethod
    def of(cls, rules: Rules, vocab_size: int) -> Self:
        """Of a rule base and a teacher's vocabulary."""
        values = np.full((len(LEVELS), 256), np.nan, np.float32)
        for row, (level, names) in enumerate(LEVELS.items()):
            for number, name in enumerate(names):
                if name != "none":
                    values[row, number] = getattr(rules, level).get(name, rules.default)
        shares = np.asarray([rules.shares[level] for level in list(LEVELS)[:3]], np.float32)
        return cls(values, shares, rules.default, rules.corners, math.log(vocab_size))

    def impact(self, roles: NDArray[np.uint8]) -> Array:
        """[n] in [0, 1], of roles [n, 4]."""
        words = np.stack([self.values[level, roles[:, level]] for level in range(3)], 1)
        said = ~np.isnan(words) & (self.shares > 0)
        share = np.where(said, self.shares, 0)
        total = share.sum(1)
        impact = np.where(total > 0, (share * np.nan_to_num(words)).sum(1) / np.maximum(total, 1e-9), self.default)
        code = self.values[3, roles[:, 3]]
        found: Array = np.where(np.isnan(code), impact, code).astype(np.float32)
        return found

    def weights(self, roles: NDArray[np.uint8], entropy: NDArray[np.floating]) -> Array:
        """[n] in [0.2, 3], of roles [n, 4] and the teacher's entropies [n] in nats."""
        confidence = 1 - np.clip(entropy.astype(np.float32) / self.log_vocab, 0, 1)
        return surface(self.impact(roles), confidence, self.corners)


def surface(impact: Array, confidence: Array, corners: Corners) -> Array:
    """The weight at impact and confidence, of any shapes that go together."""
    high, sure = _smooth(impact), _smooth(confidence)
    low_side = corners.low_unsure + (corners.low_confident - corners.low_unsure) * sure
    high_side = corners.high_unsure + (corners.high_confident - corners.high_unsure) * sure
    found: Array = np.clip(low_side + (high_side - low_side) * high, LEAST, MOST)
    return found


def _smooth(x: Array) -> Array:
    found: Array = x * x * (3 - 2 * x)
    return found
