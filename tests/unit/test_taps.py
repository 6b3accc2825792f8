"""What the taps read is what the model computes: attention rows, block outputs, the output head, packed rows."""

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from model_taps.attention import (
    RowQuery,
    captured_layers,
    enable_row_capture,
    softmax_attention_layers,
    tap_attention_rows,
)
from model_taps.attention_interface import own_kernel
from model_taps.blocks import layer_at_depth
from model_taps.head import final_hidden, head_error
from model_taps.neighbours import probe
from model_taps.packing import best_fit
from model_taps.slices import tap_states
from tests.tiny import make_model

VOCAB = 97
ROWS = RowQuery(torch.tensor([0, 0, 1]), torch.tensor([3, 29, 17]), torch.tensor([0, 0, 0]))


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma", "gemma2"])
def test_rows_and_states_equal_eager(family: str) -> None:
    model = make_model(family, VOCAB)
    eager = make_model(family, VOCAB)
    eager.config = copy.deepcopy(eager.config)
    eager.set_attn_implementation("eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = eager(ids(), output_attentions=True, output_hidden_states=True, use_cache=False)
    enable_row_capture(model)
    with (
        torch.no_grad(),
        tap_attention_rows(dict.fromkeys([2, 4], ROWS)) as rows,
        tap_states(model, [("block_output", n) for n in (1, 2, 3)]) as blocks,
    ):
        logits = model(ids(), use_cache=False).logits
    assert (logits - expected.logits).abs().max() <= 1e-5
    for layer, found in rows.items():
        for i, (b, q) in enumerate(zip(ROWS.batch.tolist(), ROWS.query.tolist(), strict=True)):
            assert (found[i, :, : q + 1] - expected.attentions[layer - 1][b, :, q, : q + 1]).abs().max() <= 1e-5
            assert (found[i, :, q + 1 :] == 0).all()
    assert set(rows) == {2, 4}
    for (_, layer), found in blocks.items():
        assert (found - expected.hidden_states[layer]).abs().max() <= 1e-5


@pytest.fixture
def hub_kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two kernels as transformers registers those of its hub, whose names differ in what a registered name cannot hold."""
    checked = PreTrainedModel._check_and_adjust_attn_implementation
    names = ("kernels-community/attention_a", "kernels-community_attention/a")

    def without_loading(model: PreTrainedModel, name: str, *rest: Any, **options: Any) -> str:
        return name if name in names else checked(model, name, *rest, **options)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", without_loading)
    for name in names:
        AttentionInterface.register(name, AttentionInterface()["sdpa"])
        AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    return names


def test_a_kernel_of_the_hub_is_captured_under_its_own_name(hub_kernels: tuple[str, str]) -> None:
    for name in (*hub_kernels, "sdpa", "eager"):
        model = make_model("llama", VOCAB)
        model.set_attn_implementation(name)
        for _ in range(2):
            assert own_kernel(model) == name
            assert captured_layers(model, VOCAB) == (1, 2, 3, 4)
        assert model.config._attn_implementation != name
        with torch.no_grad(), tap_attention_rows({2: ROWS}) as rows:
            final_hidden(model, ids(), None)
        assert set(rows) == {2}


def test_rows_carry_gradients_to_queries_and_keys() -> None:
    model = make_model("llama", VOCAB).train()
    enable_row_capture(model)
    with tap_attention_rows(dict.fromkeys([4], ROWS)) as rows:
        final_hidden(model, ids(), None)
    rows[4][:, :, 1].sum().backward()
    attention = model.model.layers[3].self_attn
    assert attention.q_proj.weight.grad.abs().sum() > 0
    assert attention.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("phi", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_head_gives_the_models_own_logits(family: str, changes: dict[str, Any]) -> None:
    from tests.tiny import COMMON, FAMILIES

    FAMILIES.setdefault(family, COMMON)
    assert head_error(make_model(family, VOCAB, **changes), ids()) <= 1e-5


@pytest.mark.parametrize(("family", "expected"), [("llama", "packed"), ("gpt2", "packed"), ("qwen3", "packed"), ("opt", "padded")])
def test_probe_finds_families_that_leak(family: str, expected: str) -> None:
    found = probe(make_model(family, VOCAB), VOCAB, 40, what="teacher")
    assert (found.forward, found.split_length) == (expected, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_ffn_tap_reads_the_input_of_the_down_projection(family: str) -> None:
    model = make_model(family, VOCAB)
    with torch.no_grad(), tap_states(model, [("ffn_activation", n) for n in range(1, 5)]) as taken:
        final_hidden(model, ids(), None)
    width = 128 if family == "gpt2" else 48
    assert {layer: tuple(a.shape) for (_, layer), a in taken.items()} == dict.fromkeys(range(1, 5), (2, 30, width))


def test_layers() -> None:
    assert [layer_at_depth(f, 48) for f in (0.25, 0.5, 0.75)] == [12, 24, 36]
    assert [layer_at_depth(f, 6) for f in (0.25, 0.5, 0.75)] == [2, 3, 5]
    assert softmax_attention_layers(make_model("llama", VOCAB)) == [1, 2, 3, 4]


def test_best_fit_packs_tightly() -> None:
    rows = best_fit([5, 3, 7, 2, 8, 1], 10)
    assert sorted(i for row in rows for i in row) == list(range(6))
    assert len(rows) == 3
