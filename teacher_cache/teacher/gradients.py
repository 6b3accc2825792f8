"""Gradients of each token's own loss with respect to the outputs of the teacher's blocks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.blocks import unsupported
from signal_store.errors import memory_error
from teacher_cache.corpus.unit_plan import UnitPlan
from teacher_cache.teacher.batches import BatchLayout
from teacher_cache.teacher.load import Teacher

LOSS_ROWS = 512
"""Of a chunk of logits."""


def loss_gradients(
    teacher: Teacher, unit: UnitPlan, laid: BatchLayout, hidden_BSD: Tensor, states: Sequence[Tensor]
) -> list[Tensor]:
    """Gradient of the summed loss of the tokens that count with respect to each of the states, of the states' shapes. `hidden_BSD`:
    what the head reads, with its graph."""
    labels_n = torch.from_numpy(unit.labels()[laid.tokens])
    counted_n = torch.from_numpy(unit.loss_mask[laid.tokens] == 1)
    flat_n = torch.from_numpy(laid.flat)
    upstream = _loss_gradient(teacher, hidden_BSD.detach().flatten(0, 1), flat_n, labels_n, counted_n).view_as(hidden_BSD)
    try:
        return list(torch.autograd.grad(hidden_BSD, list(states), upstream.to(hidden_BSD.dtype)))
    except RuntimeError as error:
        if memory_error(error) is not None:
            raise
        raise unsupported(teacher.model, "no gradient reaches its blocks", str(error).splitlines()[0]) from error


@contextlib.contextmanager
def gradients_of_activations(model: PreTrainedModel) -> Iterator[None]:
    """The frozen model builds a graph from its embeddings on; its weights take no part."""

    def begin_graph(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_().clone()  # of which a family may do with in place what it likes

    handle = model.get_input_embeddings().register_forward_hook(begin_graph)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


@torch.no_grad()
def _loss_gradient(teacher: Teacher, hidden_ND: Tensor, flat_n: Tensor, labels_n: Tensor, counted_n: Tensor) -> Tensor:
    """[N, D] float32: gradient of each counted token's own loss with respect to what the head reads; zero elsewhere."""
    assert teacher.head is not None
    gradient_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
    rows_n = flat_n[counted_n].to(hidden_ND.device)
    labels = labels_n[counted_n].to(hidden_ND.device)
    for part in range(0, len(rows_n), LOSS_ROWS):
        rows = rows_n[part : part + LOSS_ROWS]
        with torch.enable_grad():
            leaf = hidden_ND[rows].float().requires_grad_()
            loss = torch.nn.functional.cross_entropy(teacher.head.logits(leaf), labels[part : part + LOSS_ROWS], reduction="sum")
            (gradient_ND[rows],) = torch.autograd.grad(loss, leaf)
    return gradient_ND
