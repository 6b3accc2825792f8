"""Every loss against its slow twin or a hand-made value; gradients in float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model_taps.head import OutputHead
from signal_store.codecs.attention import MAX_ERROR, decode_attention, encode_attention
from signal_store.codecs.bf16_units import two_halves
from student_train.data.unit import IGNORE
from student_train.losses.attention_rows import TeacherRows, attention_kl, match_heads
from student_train.losses.dense import teacher_logprobs
from student_train.losses.divergence import Divergence, Softened
from student_train.losses.features import make_projection
from student_train.losses.forward_kl import ForwardKl
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.jsd import JensenShannon
from student_train.losses.lhsm import lhsm_sum
from student_train.losses.output_head import Impl, output_loss
from student_train.losses.presets import PRESETS
from student_train.losses.reverse_kl import ReverseKl
from student_train.losses.section import Losses
from student_train.losses.total_variation import TotalVariation
from tests.codes import HEAD, RANK, WIDTH, made_codec, made_codes

DIVERGENCES = (ForwardKl(), ReverseKl(), JensenShannon(0.3), TotalVariation())
terms_of = st.lists(
    st.builds(
        OutputTerm, st.sampled_from((*DIVERGENCES, JensenShannon(0.1))), st.sampled_from([0.7, 2.0]), st.sampled_from([1.0, 2.0, 3.0]),
        st.booleans(),
    )
    | st.builds(OutputTerm, st.none(), st.sampled_from([0.3, 1.0]), weighted=st.booleans()),
    min_size=1,
    max_size=4,
)  # fmt: skip


def away_from_ties(head: OutputHead, hidden: torch.Tensor, targets: OutputTargets, terms: list[OutputTerm]) -> bool:
    """Total variation has a kink where p = q; two ways of rounding may differ there."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    for term in terms:
        if isinstance(term.divergence, TotalVariation) and len(hidden):
            p, q = teacher_logprobs(logits, targets, term.temperature).exp(), (logits / term.temperature).softmax(1)
            if (p - q)[:, : targets.codec.vocab_size if targets.codec else None].abs().min() < 1e-6:
                return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9), vocab=st.integers(6, 40), extra=st.integers(0, 3), bias=st.booleans(), terms=terms_of,
    softcap=st.sampled_from([None, 4.0]), scale=st.sampled_from([1.0, 0.5]), rank=st.sampled_from([0, RANK]), weighted=st.booleans(),
)  # fmt: skip
def test_chunked_equals_dense(
    rows: int, vocab: int, extra: int, bias: bool, softcap: float | None, scale: float, rank: int, weighted: bool,
    terms: list[OutputTerm],
) -> None:  # fmt: skip
    codec = made_codec(vocab, rank)
    codes = made_codes(codec, rows)
    g = torch.Generator().manual_seed(rows)
    labels = torch.randint(vocab, (rows,), generator=g)
    labels[::3] = IGNORE
    weights = torch.rand(rows, dtype=torch.float64, generator=g) if weighted else None
    targets = OutputTargets(labels, codes, codec, weights)
    found = []
    impls: tuple[Impl, ...] = ("torch", "dense")
    for impl in impls:
        g = torch.Generator().manual_seed(7)
        hidden = torch.randn(rows, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
        weight = torch.randn(vocab + extra, WIDTH, dtype=torch.float64, generator=g).requires_grad_()
        offset = torch.randn(vocab + extra, dtype=torch.float64, generator=g).requires_grad_() if bias else None
        head = OutputHead(weight, offset, scale, softcap)
        with torch.no_grad():
            assume(rank or away_from_ties(head, hidden, targets, terms))
        total, sums = output_loss(hidden, head, targets, terms, impl=impl)
        total.backward()
        grads = [p.grad for p in (hidden, weight, offset) if p is not None and p.grad is not None]
        found.append(([total.detach(), sums.detach()], grads))
    (losses, grads), (expected_losses, expected_grads) = found
    # The teacher's side is float32 in both.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_gradients_in_float64(divergence: Divergence | None) -> None:
    """Against finite differences. The codes are decoded in float32, so only the student's side moves."""
    codec = made_codec(9)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    targets = OutputTargets(torch.tensor([1, IGNORE, 5, 0]), made_codes(codec, 4), codec, torch.tensor([0.2, 1.0, 3.0, 0.5]))
    terms = [OutputTerm(divergence, 0.5, 1.0 if divergence is None else 2.0)]

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return output_loss(h, OutputHead(w, None, 1.0, None), targets, terms)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_no_divergence(divergence: Divergence) -> None:
    """log q = log p: every divergence and its gradient vanish."""
    log_p = torch.randn(5, 30, dtype=torch.float64).mul(3).log_softmax(1)
    rows, gradient = divergence.closed_form(Softened.of(log_p), Softened.of(log_p.clone()))
    assert rows.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_autocast_stays_within_bfloat16() -> None:
    codec = made_codec(40)
    codes, hidden, weight = made_codes(codec, 9), torch.randn(9, WIDTH), torch.randn(40, WIDTH)
    terms = [OutputTerm(ForwardKl(), 1.0, 2.0)]
    found = []
    for enabled in (False, True):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, _ = output_loss(leaf, OutputHead(head, None, 1.0, None), OutputTargets(torch.arange(9), codes, codec), terms)
        total.backward()
        found.append((total.detach(), leaf.grad, head.grad))
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
    for exact, low in zip(*found, strict=True):
        assert exact is not None
        assert low is not None
        assert (exact - low).norm() < 0.02 * exact.norm()


def test_the_scale_is_not_rounded_under_autocast() -> None:
    hidden, weight, labels = torch.randn(9, WIDTH), torch.randn(40, WIDTH), torch.arange(9)
    norms = []
    for scale in (1.0, 1 / 1021):  # a number that bfloat16 holds, and one that it rounds by 0.2 %
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            terms = [OutputTerm(None, scale)]
            total, _ = output_loss(leaf, OutputHead(weight, None, 1.0, None), OutputTargets(labels), terms)
        total.backward()
        assert leaf.grad is not None
        norms.append(float(leaf.grad.norm()) / scale)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_logprobs_by_hand() -> None:
    """Head and tail of one row, as the format chapter says: each part's shape times its mass."""
    for rank, head, cap in ((RANK, HEAD, None), (RANK, HEAD, 3.0), (RANK, 0, None), (RANK, 20, None)):
        codec = made_codec(20, rank, head, cap)
        codes = made_codes(codec, 7)
        for temperature in codec.temperatures:
            logp = codec.logprobs(codes, temperature)
            torch.testing.assert_close(logp.exp().sum(1), torch.ones(7))
            for row in range(7):
                ids = codes.head_ids[row].tolist()
                odds = float(codes.scalars[row, codec.mass_column(temperature)])
                mass = 1.0 if head == 20 else 1 / (1 + np.exp(-odds))
                distance = codec.head_range * (codes.head_codes[row].double().numpy() / codec.head_levels) ** 2
                shape = np.exp(-distance / temperature)
                z = (
                    codec.tail_basis.double().numpy() @ (codes.tail_codes[row].double() * codec.tail_step).numpy()
                    + codec.tail_bias.numpy()
                )
                z = z if cap is None else cap * np.tanh(z / cap)
                expected = np.exp(z / temperature)
                expected[ids] = 0
                expected *= (1 - mass) / max(expected.sum(), 1e-300)
                expected[ids] = mass * shape / shape.sum() if ids else []
                np.testing.assert_allclose(logp[row].exp().numpy(), expected, rtol=2e-4, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(sharpness=st.floats(0.1, 60), head=st.integers(0, 24), seed=st.integers(0, 99))
def test_head_and_masses_are_true_however_sharp(sharpness: float, head: int, seed: int) -> None:
    codec = made_codec(24, RANK, head)
    logits = sharpness * torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    codes, _ = codec.encode(torch.randn(5, WIDTH), logits.clone(), torch.full((5,), 3))
    assert torch.equal(codes.head_ids.long(), logits.topk(head).indices.sort(1).values)
    for temperature in codec.temperatures:
        p, q = (logits / temperature).softmax(1), codec.logprobs(codes, temperature).exp()
        ids = codes.head_ids.long()
        torch.testing.assert_close(q.gather(1, ids).sum(1), p.gather(1, ids).sum(1), rtol=5e-3, atol=2e-3)
        torch.testing.assert_close(q.sum(1), torch.ones(5))
    torch.testing.assert_close(codes.scalars[:, 1].float(), logits.log_softmax(1)[:, 3], rtol=2e-3, atol=2e-3)


def test_schedules_of_a_preset() -> None:
    losses = Losses.of(PRESETS["logits_hidden_attention"].losses)
    assert losses.forward_kl and losses.apc and losses.lhsm and losses.asr and losses.cross_entropy is None
    assert [round(losses.forward_kl.weight.at(p), 3) for p in (0, 0.2, 0.6, 1)] == [1, 0.86, 0.58, 0.3]
    assert [round(losses.apc.weight.at(p), 3) for p in (0, 0.2, 0.6, 1)] == [0, 0, 0.25, 0.5]
    assert losses.lhsm.weight.at(0.5) == 0.8
    assert losses.asr.weight.at(0.5) == 0.001
    assert losses.forward_kl.temperature == 3


def test_lhsm_is_zero_for_equal_states_and_ignores_scale() -> None:
    states = torch.randn(6, 8, requires_grad=True)
    projection = make_projection(8, 8)
    assert lhsm_sum(states, states.detach() * 5 + 2, projection) < 1e-6
    found = lhsm_sum(states, torch.randn(6, 8), projection)
    found.backward()
    assert found > 1
    assert projection.weight.grad is not None
    assert lhsm_sum(states[:0], torch.zeros(0, 8), projection) == 0


def test_apc_is_zero_for_equal_rows_and_matches_heads() -> None:
    student = torch.rand(5, 4, 7).softmax(-1)
    order = [2, 0, 3]
    teacher = TeacherRows(student[:, order].clone(), torch.arange(7).expand(5, 3, 7).contiguous(), None)
    assert match_heads(teacher, student) == list(enumerate(order))
    assert attention_kl(teacher, student[:, order]).abs().max() < 1e-6
    other = torch.rand(5, 3, 7).mul(9).softmax(-1)
    assert attention_kl(teacher, other).mean() > 0.1


def test_apc_with_heaviest_columns_bounds_the_full_divergence() -> None:
    student, full = torch.rand(5, 2, 9).mul(5).softmax(-1), torch.rand(5, 2, 9).mul(5).softmax(-1)
    values, columns = full.sort(-1, descending=True)
    kept = TeacherRows(values[..., :4], columns[..., :4].contiguous(), 1 - values[..., :4].sum(-1))
    whole = (full * (full.log() - student.log())).sum(-1)
    bucket = attention_kl(kept, student)
    assert (bucket <= whole + 1e-5).all()
    assert (bucket > 0).all()


def test_attention_codes_stay_within_their_bound() -> None:
    a = torch.from_numpy(np.linspace(0, 1, 5001, dtype=np.float32))
    codes = encode_attention(a)
    assert codes.max() == 254
    assert (decode_attention(codes) - a).abs().max() <= MAX_ERROR


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_softened_with_one_exponential_is_what_logprobs_gives(temperature: float) -> None:
    codec = made_codec(60)
    codes = made_codes(codec, 12)
    expected = codec.logprobs(codes, temperature)
    log_p, p = codec.known(codes, temperature).softened(codec.tail_logits(codes).div_(temperature))
    assert torch.allclose(log_p, expected, atol=1e-5, rtol=1e-6)
    assert torch.allclose(p, expected.exp(), atol=1e-7, rtol=1e-5)
    assert torch.allclose(p.sum(1), torch.ones(12), atol=1e-5)


def test_two_halves_hold_sixteen_bits() -> None:
    matrix = torch.randn(50, 8)
    halves = two_halves(matrix)
    assert torch.equal(halves, halves.to(torch.bfloat16).float())
    assert ((halves[:, :8] + halves[:, 8:] - matrix).abs() <= matrix.abs() * 2**-16).all()
