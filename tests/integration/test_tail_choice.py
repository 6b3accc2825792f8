"""The search for the distribution's codec: its fast measurement against the slow, obvious one, its bounds, its budget."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec
from signal_store.errors import InputError
from signal_store.signals import QUALITIES, DistributionSignal
from teacher_cache.signals.budget import budget, held_out
from teacher_cache.signals.tail.basis import TailFit
from teacher_cache.signals.tail.choice import choose_codec, encode_rows, interpolate
from teacher_cache.signals.tail.fidelity import SKETCH, Fidelity, fold, measure

WIDTH, VOCAB = 24, 2100


@pytest.fixture(scope="module")
def head() -> OutputHead:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * torch.logspace(0.3, -1.2, WIDTH) + common
    return OutputHead(weight, torch.randn(VOCAB, generator=generator), 1.0, None)


@pytest.fixture(scope="module")
def hidden() -> Tensor:
    return torch.randn(3000, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.fixture(scope="module")
def fit(head: OutputHead, hidden: Tensor) -> TailFit:
    return TailFit.of(hidden[:1800], head, DistributionSignal())


def slow_measure(codec: DistributionCodec, head: OutputHead, hidden_nD: Tensor) -> tuple[list[float], list[float], list[float]]:
    """T²·KL, angle and head mass by temperature: every number of both gradients, in float64, of one part."""
    kls, angles, masses = [], [], []
    codes = encode_rows(codec, head, hidden_nD)
    logits = head.logits(hidden_nD).double()
    for t in codec.temperatures:
        logp, logq = (logits / t).log_softmax(1), None
        shape = None if codec.rank else (logp.exp().mean(0).log().repeat(len(hidden_nD), 1)).float()
        logq = codec.logprobs(codes, t, shape).double()
        kls.append(t**2 * float((logp.exp() * (logp - logq)).sum(1).mean()))
        unigram = logp.exp().mean(0)
        true, cached = ((unigram - log.exp()).T @ hidden_nD.double() for log in (logp, logq))
        cosine = torch.nn.functional.cosine_similarity(true.flatten(), cached.flatten(), 0)
        angles.append(math.degrees(math.acos(min(1.0, float(cosine)))))
        masses.append(float(logp.exp().topk(codec.head, 1).values.sum(1).mean()))
    return kls, angles, masses


def test_the_fast_measurement_agrees_with_the_slow_one(head: OutputHead, hidden: Tensor, fit: TailFit) -> None:
    signals = [DistributionSignal(head=size) for size in (4, 16)]
    codecs = [fit.codec_of_step(step, signal, None) for signal in signals for step in (0.3, 1.0)]
    codecs.append(fit.codec(0, 1.0, signals[1].model_copy(update={"rank": 0}), None))
    held = hidden[1800:2600]
    for codec, found in zip(codecs, measure(codecs, head, held), strict=True):
        kls, angles, masses = slow_measure(codec, head, held)
        assert found.scaled_kl_nats == pytest.approx(kls, rel=1e-3, abs=2e-6)
        assert found.head_mass == pytest.approx(masses, rel=2e-3)
        assert found.angle_degrees == pytest.approx(angles, rel=0.1)  # the sketch's own 2 %, five times
        assert found.angle_error == ()


def test_a_sketch_keeps_squared_lengths_on_average() -> None:
    rows = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2)).double().exp()
    found = []
    for seed in range(200):
        signs = torch.randint(2, (VOCAB,), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).double()
        folded = fold(rows * signs)
        assert folded.shape == (4, SKETCH)
        found.append(folded.square().sum(1) / rows.square().sum(1))
    ratio = torch.stack(found)
    assert ratio.mean(0).tolist() == pytest.approx([1.0] * 4, abs=4 * math.sqrt(2 / SKETCH / 200))
    assert float(ratio.std(0).max()) < 1.5 * math.sqrt(2 / SKETCH)


def test_errors_are_those_of_the_parts(head: OutputHead, hidden: Tensor, fit: TailFit) -> None:
    codec = fit.codec_of_step(1.0, DistributionSignal(), None)
    held = hidden[:2048]
    (whole,) = measure([codec], head, held)
    parts = [measure([codec], head, held[:1024])[0], measure([codec], head, held[1024:])[0]]
    for name, error in (("scaled_kl_nats", whole.scaled_kl_error), ("angle_degrees", whole.angle_error)):
        first, second = (getattr(part, name) for part in parts)
        assert getattr(whole, name) == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
        assert error == pytest.approx([abs(a - b) / 2 for a, b in zip(first, second, strict=True)], rel=1e-6)


@pytest.mark.parametrize("kl, angle", [(0.1, 90.0), (3e-3, 1.0), (1.0, 0.5)])
def test_the_chosen_codec_is_within_its_bounds_and_not_far(
    head: OutputHead, hidden: Tensor, fit: TailFit, kl: float, angle: float
) -> None:
    signal = DistributionSignal(head="auto", max_scaled_kl_nats=kl, max_angle_degrees=angle)
    choice = choose_codec(fit, head, signal, hidden[1800:2600])
    worst = max(choice.fidelity.excess(kl, angle))
    assert 0.5 <= worst <= 1
    assert measure([choice.codec], head, hidden[1800:2600])[0] == choice.fidelity
    others = [choose_codec(fit, head, signal.model_copy(update={"head": size}), hidden[1800:2600]) for size in (8, 32)]
    assert choice.bytes_per_token <= 1.05 * min(other.bytes_per_token for other in others)


def test_looser_bounds_take_fewer_bytes(head: OutputHead, hidden: Tensor, fit: TailFit) -> None:
    sizes = [
        choose_codec(fit, head, DistributionSignal(quality=q), hidden[1800:2600]).bytes_per_token
        for q in ("lean", "standard", "exact")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.9 * sizes[2]


def test_a_head_that_cannot_meet_the_bounds_makes_room_for_a_larger_one(head: OutputHead, hidden: Tensor, fit: TailFit) -> None:
    signal = DistributionSignal(head=8, max_scaled_kl_nats=1e-3)
    with pytest.raises(InputError, match="no rank meets the bounds"):
        choose_codec(fit, head, signal, hidden[1800:2400])
    found = choose_codec(fit, head, signal.model_copy(update={"head": "auto", "head_bits": 16}), hidden[1800:2400])
    assert found.codec.head > 8
    assert max(found.fidelity.excess(*signal.bounds)) <= 1


def test_bounds_that_nothing_meets_are_refused(head: OutputHead, hidden: Tensor, fit: TailFit) -> None:
    with pytest.raises(InputError, match="no rank meets the bounds"):
        choose_codec(fit, head, DistributionSignal(max_scaled_kl_nats=1e-9), hidden[1800:2600])


def test_between_measurements_figures_are_powers() -> None:
    steps = [4.0, 2.0, 1.0]
    step, slopes = interpolate(steps, [(16 * 0.5, 4 * 0.1), (4 * 0.5, 2 * 0.1), (0.5, 0.1)])
    assert slopes == pytest.approx((2.0, 1.0))
    assert step == pytest.approx(math.sqrt(0.95 / 0.5))
    step, _ = interpolate(steps, [(16 * 0.1, 4 * 0.5), (4 * 0.1, 2 * 0.5), (0.1, 0.5)])
    assert step == pytest.approx(0.95 / 0.5)


def test_a_quality_is_written_out_and_can_be_overruled() -> None:
    lean = DistributionSignal(quality="lean")
    assert (lean.bounds, lean.head) == (QUALITIES["lean"], "auto")
    assert DistributionSignal.model_validate(lean.model_dump()) == lean
    assert DistributionSignal(quality="exact", head=16).bounds == DistributionSignal().bounds
    assert DistributionSignal(quality="lean", max_angle_degrees=1.0).bounds == (QUALITIES["lean"][0], 1.0)
    assert DistributionSignal.model_validate({"head": 16, "max_scaled_kl_nats": 4e-3}).quality is None
    for wrong in ({"quality": "lean", "rank": 8}, {"head": "auto", "rank": 8}, {"quality": "best"}):
        with pytest.raises(ValidationError):
            DistributionSignal.model_validate(wrong)


def test_one_budget_for_all_sources() -> None:
    many = budget(None, [10_000_000] * 5, 256)
    assert sum(many.by_source) == pytest.approx(16 * 256 + 4096, abs=5)
    small = budget(None, [50_000], 576)
    assert small.by_source[0] == pytest.approx(8 * 576 + 50_000 / 24, abs=2)
    uneven = budget(None, [300, 900_000, 100_000], 256)
    assert uneven.by_source[0] == 300
    assert uneven.by_source[2] > 1000
    assert sum(uneven.by_source) == pytest.approx(16 * 256 + 4096, abs=3)
    assert budget(500, [300, 9000], 256).by_source == (300, 500)
    assert sum(budget(None, [100, 100], 256).by_source) == 200


@pytest.mark.parametrize("share", [1 / 4, 1 / 3, 1 / 2])
def test_held_out_segments_are_a_share_of_the_tokens(share: float) -> None:
    lengths = [int(n) for n in torch.randint(10, 600, (60,), generator=torch.Generator().manual_seed(3))]
    held = held_out(lengths, share)
    assert sum(n for n, out in zip(lengths, held, strict=True) if out) == pytest.approx(share * sum(lengths), abs=300)
    assert any(held[:8])
    assert any(held[-8:])
    assert held_out([5], share) == [False]


def test_fidelity_compares_with_its_bounds() -> None:
    found = Fidelity((0.01, 0.02), (0.5, 0.1), (), (), ())
    assert found.excess(0.04, 0.25) == (0.5, 2.0)


def test_the_counted_products_are_those_that_run(head: OutputHead, hidden: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from teacher_cache.signals.tail.cost import fit_flops, search_flops

    with FlopCounterMode(display=False) as counted:
        fit = TailFit.of(hidden[:1800], head, DistributionSignal())
    cubes = 20.0 * WIDTH**3  # decompositions are not counted by torch
    assert counted.get_total_flops() == pytest.approx(fit_flops(WIDTH, VOCAB, 1800) - cubes, rel=0.1)
    signal = DistributionSignal(head=16, max_scaled_kl_nats=3e-2, max_angle_degrees=3.0)
    with FlopCounterMode(display=False) as counted:
        choose_codec(fit, head, signal, hidden[1800:2600])
    assert counted.get_total_flops() == pytest.approx(search_flops(WIDTH, VOCAB, 800), rel=0.35)  # of one or two rounds less
