"""A segment's states do not depend on what else is in the forward pass; where they would, it is found at full length and repaired or
refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from model_taps.blocks import decoder_blocks
from model_taps.neighbours import Composition, probe, relative_difference
from model_taps.packing import Forward, position_ids
from signal_store.errors import InputError
from teacher_cache.teacher.batches import compose
from tests.tiny import COMMON, FAMILIES, make_model

VOCAB = 97
LONG_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 32}


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    FAMILIES.setdefault(family, COMMON)
    return make_model(family, VOCAB, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_that_choose_frequencies_are_kept_apart(dtype: torch.dtype) -> None:
    model: Any = model_of("phi3", **LONG_ROPE)
    model.to(dtype)
    assert probe(model, VOCAB, 64, what="teacher") == Composition("packed", 32)
    assert probe(model, VOCAB, 64, what="teacher", most_tokens=64) == Composition("packed", 32)
    assert probe(model, VOCAB, 64, what="teacher", allowed=("padded",)) == Composition("padded", 32)
    assert probe(model, VOCAB, 32, what="teacher") == Composition("packed", None)


def test_frequencies_that_remember_are_refused() -> None:
    model = model_of("llama", **DYNAMIC)
    with pytest.raises(InputError, match=r"depend on what it ran before.*lower context"):
        probe(model, VOCAB, 64, what="teacher")
    assert probe(model, VOCAB, 32, what="teacher") == Composition("packed", None)


def _among_the_batch(states: torch.Tensor) -> torch.Tensor:
    return states - states.mean((0, 1), keepdim=True).detach()


def _among_the_rows(states: torch.Tensor) -> torch.Tensor:
    return states - states.mean(0, keepdim=True) / 2


def _far_ahead(states: torch.Tensor) -> torch.Tensor:
    return states + torch.nn.functional.pad(states[:, 20:], (0, 0, 0, min(20, states.shape[1])))


def changed(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    decoder_blocks(model)[1].register_forward_hook(hook)
    return model


def test_what_only_a_pass_of_its_own_keeps_apart_has_one() -> None:
    model = changed(model_of("llama"), _among_the_rows)
    assert probe(model, VOCAB, 40, what="teacher").forward == "alone"
    with pytest.raises(InputError, match="share a forward pass change each other"):
        probe(model, VOCAB, 40, what="student", allowed=("packed", "padded"))


@pytest.mark.parametrize("change", [_far_ahead, _among_the_batch])
def test_what_sees_later_tokens_is_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"looks ahead|ran before"):
        probe(changed(model_of("llama"), change), VOCAB, 48, what="teacher")


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_a_pass_holds_one_side_of_the_length(forward: Forward) -> None:
    lengths = np.array([9, 30, 32, 33, 60, 5, 6, 64, 64, 7])
    batches = compose(lengths, Composition(forward, 32), 64, 256)
    for batch in batches:
        assert len({n > 32 for n in lengths[batch.first : batch.last]}) == 1
        assert sorted(s for row in batch.rows for s in row) == list(range(batch.first, batch.last))
    assert [b.first for b in batches] == [0, 3, 5, 7, 9]
    assert len(compose(lengths, Composition(forward), 64, 256)) < len(batches)
    assert all(b.last == b.first + 1 for b in compose(lengths, Composition("alone"), 64, 256))


def test_filler_reaches_no_position_that_segments_have_not() -> None:
    assert position_ids([3, 2], 12).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert position_ids([2], 2).tolist() == [0, 1]


def test_a_difference_at_either_end_counts() -> None:
    states = torch.ones(400, 4)
    for place in (slice(0, 3), slice(397, 400)):
        other = states.clone()
        other[place] = 2
        assert relative_difference(other, states) > 0.3
