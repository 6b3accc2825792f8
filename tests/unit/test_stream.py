"""The stream: a permutation, the same for any number of ranks, resumed exactly; batches hold what the cache holds."""

from hypothesis import given
from hypothesis import strategies as st

from model_taps.slices import State
from student_train.data.order import key_of, permuted, shuffled
from student_train.data.request import TOKENS_ONLY, SignalRequest
from student_train.data.signals.attention import AttentionRequest
from student_train.data.signals.hidden import HiddenRequest
from student_train.data.signals.stats import StatsRequest


@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_order_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))
    assert sorted(shuffled(size, key)) == list(range(size))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(permuted(i, 50, key_of(seed, epoch)) for i in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_requests_join_and_ask_for_no_signal_twice() -> None:
    state: State = ("block_output", 1)
    one = SignalRequest.of(HiddenRequest((state,)), AttentionRequest((4,)), StatsRequest(()))
    other = SignalRequest.of(HiddenRequest((state, ("block_output", 2))), AttentionRequest((2,), steps=True))
    both = one | other
    assert both.get(HiddenRequest) == HiddenRequest((state, ("block_output", 2)))
    assert both.get(AttentionRequest) == AttentionRequest((4, 2), steps=True)
    assert both.get(StatsRequest) is None  # it asked for nothing
    assert one | TOKENS_ONLY == one
    assert [what for request in both for what in request.described()] == [
        "hidden/block_output/1",
        "hidden/block_output/2",
        "attention/4",
        "attention/2",
    ]
