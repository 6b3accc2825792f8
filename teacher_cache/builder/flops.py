"""What a cache costs in multiplications and additions of matrix products, before anything is run."""

from transformers import PretrainedConfig

from model_taps.loading import load_config
from teacher_cache.builder.plan import Plan
from teacher_cache.recipe import CacheRecipe
from teacher_cache.signals.budget import budget
from teacher_cache.signals.registry import extractors_of


def forward_flops(recipe: CacheRecipe, tokens: int) -> float:
    """Of the teacher's forward passes: 2 for each weight that a token meets, the output head too, and 4·L·context·D/2 for
    attention."""
    config = teacher_config(recipe)
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = getattr(config, "num_attention_heads", None) or 0  # none without attention
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads else 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    moe = getattr(config, "moe_intermediate_size", None)
    ffn = 3 * width * (experts * moe if moe else inner)
    per_token = 2 * (layers * (attention + ffn) + width * config.vocab_size) + 2 * layers * recipe.context * heads * head_dim
    return float(per_token) * tokens


def calibration_flops(recipe: CacheRecipe, planned: Plan) -> float:
    """Forward passes of the calibration's share, and the fits of the signals. `recipe` is settled."""
    width = teacher_config(recipe).hidden_size
    shared = budget(recipe.calibration.tokens_per_source, [source.num_tokens for source in planned.sources], width)
    tokens = sum(shared.by_source)
    fits = (
        extractor.calibration_flops(width, planned.vocab_size, tokens, shared.held_out_share)
        for extractor in extractors_of(recipe.signals, recipe.context)
    )
    return sum(fits, start=forward_flops(recipe, tokens))


def teacher_config(recipe: CacheRecipe) -> PretrainedConfig:
    """Of the part that reads text."""
    teacher = recipe.teacher
    config = load_config(teacher.model, what="teacher", revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    return config.get_text_config()
