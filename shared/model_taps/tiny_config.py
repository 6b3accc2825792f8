"""A config made small: the same class of model, a few thousand weights.

Sizes are found by the names that families give them, in the config and in the configs inside it. What is a list of one entry per
layer is cut to the layers that are left, every kind of layer first. Nothing else is changed: the small model runs the family's
own code.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from model_taps.loading import LOADING_ERRORS
from signal_store.errors import InputError

WIDTH, LAYERS, HEADS, HEAD_DIM = 32, 4, 4, 8
MOST_PARAMETERS = 20_000_000

_SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim dim embedding_dim attention_hidden_size word_embed_proj_dim lru_width "
        "embedding_size input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim "
        "linear_attn_hidden_size ple_embed_dim",
    ),
    (
        48,
        "intermediate_size ffn_dim dff dim_ff d_inner feed_forward_size encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "n_inner moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks num_encoder_layers "
        "num_decoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads "
        "linear_num_value_heads linear_num_heads mamba_num_heads num_query_groups",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k attn_layer_period expert_layer_period "
        "layer_group_size no_rope_layer_interval sliding_window_pattern global_attn_every_n_layers o_groups hc_mult "
        "mamba_n_groups n_groups topk_group n_group num_expert_group moe_num_shared_experts max_window_layers "
        "index_topk_blocks num_kv_shared_layers d_rel time_step_rank mamba_dt_rank hc_lowrank",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim dim_head d_head attention_head_dim attention_head_size kv_channels v_head_dim "
        "qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim laurel_rank "
        "gated_norm_rank adapter_rank router_hidden_size o_lora_rank state_size ssm_state_size mamba_d_state "
        "hidden_size_per_layer_input index_block_size chunk_size mamba_chunk_size index_topk prompt_length block_size",
    ),
    (
        16,
        "qk_head_dim index_head_dim q_lora_rank kv_lora_rank mamba_head_dim mamba_d_head mamba_headdim sliding_window "
        "sliding_window_size local_attention window_size attention_window_size attention_chunk_size "
        "local_attn_chunk_length lsh_attn_chunk_length local_attention_window_len keep_window_size",
    ),
    (
        4,
        "num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim mamba_n_heads num_codebooks "
        "mamba_num_heads zero_expert_num",
    ),
    (
        1,
        "n_shared_experts num_shared_experts attn_layer_offset expert_layer_offset first_k_dense_replace "
        "num_dense_layers num_nextn_predict_layers num_random_blocks",
    ),
    (
        64,
        "mamba_d_ssm encoder_hash_byte_group_vocab ngram_vocab_size_base",
    ),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_source_positions "
        "max_target_positions rel_extent max_position",
    ),
)
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
_LAYER_COUNTS = tuple(_SIZES[2][1].split())
_DEMANDED: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}
"""What a family's sizes must be to each other."""
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "n_vocab")


def architectures() -> tuple[str, ...]:
    """The model types that transformers' causal LM mapping lists."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(config: PretrainedConfig | str, vocab_size: int) -> PretrainedConfig:
    """A small config of the same class, or of a model type's default. InputError where the class takes none."""
    try:
        whole = CONFIG_MAPPING[config]() if isinstance(config, str) else config
        plain = whole.to_dict()
        small = _shrunk(
            {k: v for k, v in plain.items() if k not in ("dtype", "quantization_config", "transformers_version")}, vocab_size
        )
        if isinstance(config, str) and "is_decoder" in small:
            small["is_decoder"] = True  # by default some families are encoders
        small |= _DEMANDED.get(whole.model_type, {})
        made: PretrainedConfig = type(whole).from_dict(small)
    except LOADING_ERRORS as error:
        kind = config if isinstance(config, str) else config.model_type
        raise InputError("no small config of this architecture", found=_first_line(error), where=kind) from error
    return made


def tiny_model(config: PretrainedConfig, *, seed: int = 0, trust_remote_code: bool = False) -> PreTrainedModel:
    """A random float32 model in evaluation mode; InputError where it cannot be built or is not small."""
    try:
        with torch.device("meta"):
            size = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).parameters()
            )
        if size > MOST_PARAMETERS:
            raise InputError("the architecture does not get small", found=f"{size:,} parameters", where=config.model_type)
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (*LOADING_ERRORS, IndexError, AssertionError) as error:
        raise InputError("cannot be built from a config", found=_first_line(error), where=config.model_type) from error
    model.eval()
    return model


def _shrunk(plain: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    layers = next((plain[name] for name in _LAYER_COUNTS if isinstance(plain.get(name), int)), None)
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            inside = {k: v for k, v in value.items() if not (isinstance(k, int) or str(k).isdigit()) or int(k) < LAYERS}
            found[name] = _shrunk(inside, vocab_size)
        elif isinstance(value, list) and layers is not None and len(value) == layers > LAYERS:
            found[name] = [_small(name, value[i], vocab_size) for i in _kept_layers(plain, layers)]
        elif isinstance(value, list) and value and all(isinstance(v, int) for v in value) and "layer" in name:
            found[name] = [v for v in value if v < LAYERS]
        else:
            found[name] = _small(name, value, vocab_size)
    if "num_attention_heads" in plain:
        every_head = plain.get("num_key_value_heads") in (None, plain["num_attention_heads"])
        found |= {name: HEADS for name in ("num_key_value_heads",) if name in plain and every_head}
        found |= {name: HEAD_DIM for name in ("head_dim",) if name in plain and plain[name] is None}
    return found


def _kept_layers(plain: dict[str, Any], layers: int) -> list[int]:
    """Which layers stay: the first of every kind, then the first others; in order."""
    kinds = next((v for v in plain.values() if isinstance(v, list) and len(v) == layers and _are_kinds(v)), [""] * layers)
    first = list({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return sorted(_first(dict.fromkeys([*sorted(first)[:LAYERS], *range(layers)]), LAYERS))


def _are_kinds(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str) for v in values)


def _first(values: Iterable[int], count: int) -> list[int]:
    return list(values)[:count]


def _small(name: str, value: Any, vocab_size: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _VOCABULARIES:
        return vocab_size
    if name.endswith(("_token_id", "_token_index")) and value >= vocab_size:
        return vocab_size - 1
    return min(value, _SMALL[name]) if name in _SMALL and value > 0 else value


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__
