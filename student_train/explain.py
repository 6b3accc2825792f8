"""explain: what a run would optimise, against which cache; refuses what `run` would refuse at its start, without training."""

from typing import Any

from signal_store.cache import open_cache
from student_train.losses.objective import resolve
from student_train.recipe import RunRecipe
from student_train.stream.rows import Stream
from student_train.student import build_student
from student_train.validation import check_validation


def explain(recipe: RunRecipe) -> dict[str, Any]:
    """Terms with weight, formula, what they read of the cache and of the student; and how the stream is cut."""
    cache = open_cache(recipe.cache)
    student, _ = build_student(recipe.student, cache)
    objective = resolve(recipe.objective, cache, student, recipe.tail_rank)
    check_validation(recipe.validation, cache)
    Stream(cache, objective.needs, recipe.stream, packed=True)  # refuses what it cannot cut
    reads = {
        "cross_entropy": ["tokens"],
        **{name: ["distribution"] for name in objective.losses.divergences},
        "lhsm": [f"hidden/block_output/{p.teacher}" for p in objective.hidden_pairs],
        "apc": [f"attention/{p.teacher}" for p in objective.attention_pairs],
        "asr": [],
    }
    taps = {
        "cross_entropy": ["output head"],
        **{name: ["output head"] for name in objective.losses.divergences},
        "lhsm": [f"output of block {p.student}" for p in objective.hidden_pairs],
        "apc": [f"attention rows of block {p.student}" for p in objective.attention_pairs],
        "asr": ["input of every FFN down-projection"],
    }
    terms = [
        {
            "term": name,
            "weight": str(term.weight),
            "settings": term.model_dump(mode="json", exclude={"weight"}),
            "formula": " ".join((type(term).__doc__ or "").split()),
            "reads": reads[name],
            "taps": taps[name],
        }
        for name, term in objective.terms.items()
    ]
    tokens = sum(source.num_tokens for source in cache.sources if source.split == "train")
    per_step = recipe.stream.row_tokens * recipe.stream.rows_per_step
    return {
        "cache_id": cache.manifest.cache_id,
        "parameters": sum(p.numel() for p in student.parameters()),
        "terms": terms,
        "weights_at_progress": {str(p): objective.weights(p) for p in (0.0, 0.2, 0.6, 1.0)},
        "tokens_per_step": per_step,
        "train_tokens": tokens,
        "epochs": recipe.steps * per_step / max(1, tokens),
    }
