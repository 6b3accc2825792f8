"""Every tap of every family is what the family's own modules give, or is said to be absent."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model_taps.attention import RowQuery, enable_row_capture, softmax_attention_layers, tap_attention_rows
from model_taps.block_parts import Absent
from model_taps.blocks import decoder_blocks
from model_taps.head import final_hidden
from model_taps.slices import resolve, tap_states, tap_table
from signal_store.errors import MismatchError
from tests.tiny import COMMON, FAMILIES, make_model

VOCAB = 97
MOE: dict[str, Any] = {**COMMON, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MORE: dict[str, dict[str, Any]] = {
    "qwen2": COMMON,
    "mistral": {**COMMON, "head_dim": 8},
    "gemma3_text": {**COMMON, "head_dim": 8, "sliding_window": 16},
    "qwen3_moe": MOE,
    "qwen3_5_moe_text": {
        **MOE, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    },
    "deepseek_v4": {
        **COMMON, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
        "qk_rope_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "sliding_window": 64,
    },
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    FAMILIES.setdefault(family, MORE.get(family, COMMON))
    return make_model(family, VOCAB)


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_moe_text", "gpt2", "gemma2", "gemma3_text", "mistral", "deepseek_v4", "opt"],
)
def test_taps_of_a_family(family: str) -> None:
    model = model_of(family)
    table = tap_table(model)
    found = [(tap, layer) for layer, tap, place in table if not isinstance(place, Absent)]
    with torch.no_grad(), tap_states(model, found) as states:
        out = model.base_model(input_ids=ids(), use_cache=False, output_hidden_states=True)
    width = model.config.get_text_config().hidden_size
    for (tap, layer), state in states.items():
        flat = state.reshape(-1, state.shape[-1])
        assert len(flat) == 60, (tap, layer)
        assert torch.isfinite(flat).all()
        if tap not in ("ffn_gate", "ffn_activation"):
            assert flat.shape[1] == width, (tap, layer)
    hidden = [h.mean(-2) if h.dim() == 4 else h for h in out.hidden_states]
    for layer in range(1, len(decoder_blocks(model))):
        assert (states["block_output", layer] - hidden[layer]).abs().max() <= 1e-5
        assert (states["block_input", layer + 1] - states["block_output", layer]).abs().max() <= 1e-5
    if family in ("llama", "qwen2", "qwen3", "mistral", "gpt2"):
        for layer in range(1, 5):
            residual = states["block_input", layer] + states["attention_output", layer]
            block = decoder_blocks(model)[layer - 1]
            norm = block.get_submodule("ln_2" if family == "gpt2" else "post_attention_layernorm")
            assert (norm(residual) - states["ffn_input", layer]).abs().max() <= 1e-5
    absent = {(tap, layer) for layer, tap, place in table if isinstance(place, Absent)}
    experts = {("ffn_gate", n) for n in range(1, 5)} | {("ffn_activation", n) for n in range(1, 5)}
    assert absent == (experts if family == "qwen3_moe" else set())


def test_what_does_not_exist_is_refused_in_words() -> None:
    model = model_of("qwen3_moe")
    place = resolve(model, "ffn_gate", 2)
    assert isinstance(place, Absent)
    with pytest.raises(MismatchError, match=r"block 2 has no ffn_gate.*fused experts"), tap_states(model, [("ffn_gate", 2)]):
        pass


def test_linear_attention_layers_have_no_rows() -> None:
    model = model_of("qwen3_5_moe_text")
    assert softmax_attention_layers(model) == [4]
    enable_row_capture(model)
    query = RowQuery(torch.tensor([0]), torch.tensor([20]), torch.tensor([0]))
    with torch.no_grad(), tap_attention_rows(dict.fromkeys([4], query)) as rows:
        final_hidden(model, ids(), None)
    assert abs(float(rows[4].sum(-1).mean()) - 1) <= 1e-5


def test_compressed_keys_and_sinks_keep_the_mass_that_eager_gives() -> None:
    model = model_of("deepseek_v4")
    eager = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            eager[layer] = output[1]

        return hook

    for number, block in enumerate(decoder_blocks(model), start=1):
        block.get_submodule("self_attn").register_forward_hook(keep(number))
    enable_row_capture(model)
    places = torch.tensor([5, 17, 29])
    query = RowQuery(torch.zeros(3, dtype=torch.long), places, torch.zeros(3, dtype=torch.long))
    with torch.no_grad(), tap_attention_rows(dict.fromkeys([1, 2, 3, 4], query)) as rows:
        final_hidden(model, ids(), None)
    compressed = 0
    for layer, found in rows.items():
        weights = eager[layer][0]
        for i, t in enumerate(places.tolist()):
            assert torch.allclose(found[i].sum(-1), weights[:, t].sum(-1), atol=1e-5), layer
            assert float(found[i].sum(-1).max()) < 1
            if weights.shape[-1] > 30:
                compressed += 1
                assert (found[i, :, : t + 1] >= weights[:, t, : t + 1] - 1e-6).all()
            else:
                assert (found[i, :, : t + 1] - weights[:, t, : t + 1]).abs().max() <= 1e-5
    assert compressed
