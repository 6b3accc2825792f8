"""What is a setting of the whole process stays as the user has it."""

import contextlib
import threading

import pytest
import torch
from numcodecs import blosc
from transformers import PreTrainedModel

from model_taps import slices
from model_taps.attention import _open, tap_attention_rows
from model_taps.block_parts import Absent, Resolved
from signal_store.codecs.bf16_units import bf16_units
from signal_store.errors import MismatchError
from signal_store.format.arrays import ArraySpec
from signal_store.io.shard_writer import encode_chunk
from signal_store.signals import Tap
from student_train.model.distiller import Distiller
from tests.tiny import make_model

SPEC = ArraySpec.of("v", "uint8", 64, "row")


@pytest.mark.parametrize("setting", [None, True, False])
def test_blosc_is_left_as_it_was(setting: bool | None) -> None:
    before = blosc.use_threads
    try:
        blosc.use_threads = setting
        encode_chunk(torch.zeros(64, dtype=torch.uint8).numpy(), SPEC)
        assert blosc.use_threads is setting
    finally:
        blosc.use_threads = before


def test_precision_of_products_is_put_back_whoever_leaves_first() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with bf16_units():
            inside.set()
            leave.wait(10)

    def second() -> None:
        with bf16_units():
            pass

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert matmul.fp32_precision == before


def test_no_hook_is_left_where_a_tap_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", 40)
    real = slices.resolve

    def without_a_gate(model: PreTrainedModel, tap: Tap, layer: int) -> Resolved | Absent:
        return Absent("no gate") if tap == "ffn_gate" else real(model, tap, layer)

    monkeypatch.setattr(slices, "resolve", without_a_gate)
    wanted: list[slices.State] = [("block_output", 1), ("ffn_gate", 1)]
    with pytest.raises(MismatchError, match="has no ffn_gate"), slices.tap_states(model, wanted):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_step_leaves_no_tap_open(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = Distiller.__new__(Distiller)
    torch.nn.Module.__init__(distiller)
    distiller._open_taps = contextlib.ExitStack()

    def runs_out(*_arguments: object) -> None:
        distiller._open_taps.enter_context(tap_attention_rows({}))
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(distiller, "_losses", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        distiller.forward(None, {})  # type: ignore[arg-type]
    assert not _open
