"""How faithful a student is: each number against a hand-made one."""

import pytest
import torch

from model_taps.head import OutputHead
from student_train.data.unit import IGNORE
from student_train.evaluate import fidelity
from student_train.evaluate.evaluation import numbers
from tests.codes import WIDTH, made_codec, made_codes

VOCAB = 40


def test_each_number_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = made_codec(VOCAB)
    codes = made_codes(codec, 9)
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, WIDTH, generator=g), torch.randn(VOCAB + 2, WIDTH, generator=g)
    labels = torch.randint(VOCAB, (9,), generator=g)
    labels[4] = IGNORE
    monkeypatch.setitem(fidelity.CHUNK_BYTES, "cpu", 4 * (VOCAB + 2) * 4)  # several chunks
    losses, sums = fidelity.measure_rows(hidden, OutputHead(weight, None, 1.0, None), labels, codes, codec)
    found = numbers(fidelity.summary(sums))
    log_q = (hidden @ weight.T).log_softmax(1)
    log_p = codec.logprobs(codes, 1.0)
    for row in range(9):
        expected = 0.0 if labels[row] == IGNORE else float(-log_q[row, labels[row]])
        assert float(losses[row]) == pytest.approx(expected, abs=1e-5)
    agree = [int(log_p[row].argmax() == log_q[row].argmax()) for row in range(9)]
    shared = [
        len(set(log_p[row].topk(10).indices.tolist()) & set(log_q[row, :VOCAB].topk(10).indices.tolist())) / 10 for row in range(9)
    ]
    kl = [float((log_p[row].exp() * (log_p[row] - log_q[row, :VOCAB])).sum()) for row in range(9)]
    assert found["agreement"] == pytest.approx(sum(agree) / 9)
    assert found["overlap"] == pytest.approx(sum(shared) / 9)
    assert found["kl"] == pytest.approx(sum(kl) / 9, rel=1e-5)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in range(9):
        if labels[row] != IGNORE:
            confidence = float(log_q[row].max().exp())
            bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, bool(log_q[row].argmax() == labels[row])))
    gap = sum(abs(sum(c for c, _ in rows) - sum(r for _, r in rows)) for rows in bins.values()) / 8
    assert found["calibration_error"] == pytest.approx(gap, abs=1e-6)


def test_a_student_that_is_its_teacher() -> None:
    codec = made_codec(VOCAB)
    codes = made_codes(codec, 5)
    log_p = codec.logprobs(codes, 1.0)
    labels = torch.full((5,), IGNORE)
    _, sums = fidelity.measure_rows(log_p, OutputHead(torch.eye(VOCAB), None, 1.0, None), labels, codes, codec)
    found = numbers(fidelity.summary(sums))
    assert (found["agreement"], found["overlap"]) == (1, 1)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["entropy_gap"] == pytest.approx(0, abs=1e-5)
    assert "kl" not in fidelity.summary(fidelity.zero_sums(torch.device("cpu")))
