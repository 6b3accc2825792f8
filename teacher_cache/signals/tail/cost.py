"""What calibration costs, in multiplications and additions of its matrix products, before anything is run.

Exponentials are not counted: they take about as long as the products on a CPU with a narrow teacher, and nothing on a wide one.
Legend: V vocabulary, D width.
"""

from teacher_cache.signals.tail.basis import WEIGHT_TOKENS
from teacher_cache.signals.tail.choice import PILOT_FACTORS, PILOT_TOKENS
from teacher_cache.signals.tail.fidelity import SKETCH

ROUNDS = 2
"""Measurements of the chosen head on all held-out tokens, as a rule."""
CUBES = 20
"""D³ of a Cholesky factor, an eigendecomposition and three products."""


def fit_flops(width: int, vocab_size: int, tokens: int) -> float:
    """Of the tail's basis: weights of the vocabulary, the head's metric, the states' covariance, the basis."""
    products = 2.0 * vocab_size * width * min(WEIGHT_TOKENS, tokens)
    grams = 2.0 * (vocab_size + tokens) * width**2
    return products + grams + 2.0 * vocab_size * width**2 + CUBES * float(width) ** 3


def search_flops(width: int, vocab_size: int, held_out: int, heads: int = 1, temperatures: int = 4) -> float:
    """Of head and step: the pilot, and ROUNDS measurements; every tail at full rank."""
    product = 2.0 * vocab_size * width
    sketch = 2.0 * temperatures * min(SKETCH, vocab_size) * width
    steps = len(PILOT_FACTORS)
    pilot = min(PILOT_TOKENS, held_out) * (product * (1 + steps + (heads if heads > 1 else 0)) + sketch * (1 + heads * steps))
    return pilot + ROUNDS * held_out * 2 * (product + sketch) + min(PILOT_TOKENS, held_out) * product
