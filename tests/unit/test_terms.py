"""Terms on states and attention, as functions of tensors: their zeros, their invariances, their gradients in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_taps.spread import Groups
from student_train.losses.activation_mmd import Kernel, squared_mmd
from student_train.losses.attention_evolution import tensor_nuclear_norm
from student_train.losses.cka import debiased_cka
from student_train.losses.direction import direction_rows
from student_train.losses.input_reconstruction import relative_l1
from student_train.losses.pairing import depth_weights
from student_train.losses.trajectory import moved


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(groups: int, tokens: int) -> Groups:
    index = torch.arange(groups * tokens).view(groups, tokens)
    return Groups(index, torch.ones(groups, tokens, dtype=torch.bool))


def test_directions_are_angles() -> None:
    a = draw(5, 8)
    assert direction_rows(a, 3 * a, 30, 1).abs().max() < 1e-9
    x, y = torch.eye(4, dtype=torch.float64)[:2].split(1)
    assert float(direction_rows(x, y, 30, 2.0)) == pytest.approx(1 + 2 * math.radians(60) ** 2)
    assert torch.allclose(direction_rows(a, draw(5, 8, seed=1), 30, 1), direction_rows(7 * a, draw(5, 8, seed=1), 30, 1))
    for opposite in (-a, torch.zeros_like(a)):
        leaf = opposite.clone().requires_grad_()
        direction_rows(leaf, a, 30, 1).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_cka_knows_rotations_and_is_not_fooled_by_noise() -> None:
    a = draw(2, 32, 16)
    turn = torch.linalg.qr(draw(16, 16, seed=2))[0]
    inside = torch.ones(2, 32, dtype=torch.bool)
    assert torch.allclose(debiased_cka(a, 3 * a @ turn + 5, inside), torch.ones(2, dtype=torch.float64))
    noise = torch.stack([debiased_cka(draw(1, 32, 400, seed=s), draw(1, 32, 300, seed=1000 + s), inside[:1])[0] for s in range(60)])
    assert abs(float(noise.mean())) < 4 * float(noise.std()) / 60**0.5 + 1e-3
    centred = [x - x.mean(0) for x in (draw(32, 400), draw(32, 300, seed=1))]
    gram = [x @ x.T for x in centred]
    biased = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert biased > 0.85  # what the usual estimator says of the same noise


def test_cka_of_part_of_a_group_is_that_parts() -> None:
    a, b = draw(1, 12, 5), draw(1, 12, 7, seed=3)
    inside = torch.arange(12)[None] < 9
    padded = debiased_cka(a * inside[..., None], b * inside[..., None], inside)
    assert torch.allclose(padded, debiased_cka(a[:, :9], b[:, :9], inside[:, :9]))


def test_mmd_is_of_sets() -> None:
    kernel = Kernel().double()
    a, b, groups = draw(2, 16, 6), draw(2, 16, 6, seed=4) + 0.5, whole(2, 16)
    assert squared_mmd(a, a, groups, kernel).abs().max() < 1e-12
    apart = squared_mmd(a, b, groups, kernel)
    assert (apart > 0.01).all()
    assert torch.allclose(apart, squared_mmd(a[:, torch.randperm(16)], b[:, torch.randperm(16)], groups, kernel))


def test_the_kernel_learns_to_see_not_to_look_away() -> None:
    a, b, groups = draw(1, 48, 6).float(), draw(1, 48, 6, seed=4).float() * 1.3, whole(1, 48)
    kernel = Kernel()
    before = float(squared_mmd(a, b, groups, kernel).detach())
    optimizer = torch.optim.Adam(kernel.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        squared_mmd(a, b, groups, kernel).sum().backward()
        optimizer.step()
    assert float(squared_mmd(a, b, groups, kernel).detach()) > 1.05 * before


def test_nuclear_norm_of_one_outer_product() -> None:
    parts = [draw(3, n, seed=n) for n in (2, 3, 4, 9)]
    tensor = torch.einsum("ka,kh,kt,kl->kahtl", *parts)
    numel = torch.full((3,), 2 * 3 * 4 * 9)
    length = torch.stack([part.norm(dim=1) for part in parts]).prod(0)
    found = tensor_nuclear_norm(tensor, numel, noise=0.0)
    assert torch.allclose(found, length / numel.sqrt())  # every unfolding has one singular value
    turn = torch.linalg.qr(draw(4, 4, seed=8))[0]
    full = draw(3, 2, 3, 4, 9)
    mixed = torch.einsum("kahtl,ts->kahsl", full, turn)
    assert torch.allclose(tensor_nuclear_norm(full, numel, 0.01), tensor_nuclear_norm(mixed, numel, 0.01))
    slow = sum(torch.linalg.svdvals(full.movedim(axis, 1).flatten(2)).sum(1) for axis in range(1, 5)) / 4
    assert torch.allclose(tensor_nuclear_norm(full, numel, 0.0), slow / numel.sqrt())


def test_nuclear_norm_rests_at_the_codecs_noise() -> None:
    zero = torch.zeros(1, 1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    found = tensor_nuclear_norm(zero, torch.tensor([48]), noise=0.004)
    found.sum().backward()
    assert found == 0
    assert zero.grad is not None
    assert zero.grad.abs().max() == 0


def test_smoothness_sees_steps_not_places() -> None:
    segment, follows = torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.bool)
    follows[0] = False
    states = draw(20, 5).cumsum(0)
    found = moved(states, segment, 1, follows)
    assert torch.allclose(found, moved(9 * states + 100, segment, 1, follows))  # neither scale nor a constant offset plays a part
    assert moved(torch.ones(20, 5, dtype=torch.float64), segment, 1, follows).abs().max() == 0
    assert float(moved(draw(20, 5), segment, 1, follows).mean()) > 4 * float(found.mean())


def test_depths_weigh_in_a_geometric_row() -> None:
    weights = depth_weights(4, 0.7, 0.0)
    assert sum(weights) == pytest.approx(1)
    assert [b / a for a, b in itertools.pairwise(weights)] == pytest.approx([0.7] * 3)
    assert depth_weights(4, 0.7, 1.0) == pytest.approx([0.25] * 4)


@settings(max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_gradients(seed: int) -> None:
    a, b = draw(2, 9, 4, seed=seed).requires_grad_(), draw(2, 9, 4, seed=seed + 1)
    groups, kernel = whole(2, 9), Kernel().double().requires_grad_(requires_grad=False)
    segment, follows = torch.arange(18) // 9, torch.arange(18) % 9 > 0
    checks = {
        "direction": lambda x: direction_rows(x.flatten(0, 1), b.flatten(0, 1), 30, 1),
        "cka": lambda x: debiased_cka(x, b, groups.inside),
        # the median carries no gradient: checked under a kernel whose widths do not follow the sample
        "mmd": lambda x: squared_mmd(x, b, groups, _Fixed(kernel)),  # type: ignore[arg-type]
        "moved": lambda x: moved(x.flatten(0, 1), segment, 2, follows),
        "l1": lambda x: relative_l1(x.flatten(0, 1), b.flatten(0, 1)),
        "nuclear": lambda x: tensor_nuclear_norm(x.view(2, 1, 3, 3, 4), torch.tensor([36, 36]), 0.01),
    }
    for name, function in checks.items():
        assert torch.autograd.gradcheck(function, (a,), atol=1e-5), name


class _Fixed:
    """A kernel at unit distance, whatever the sample."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(self, squared: Tensor, median: Tensor) -> Tensor:
        found: Tensor = self.kernel(squared, torch.ones_like(median))
        return found
