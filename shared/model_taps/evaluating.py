"""A model in evaluation mode for as long as a block runs, whatever ends it."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; the mode of before comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
