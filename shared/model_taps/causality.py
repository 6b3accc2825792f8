"""Whether a model sees only what came before. An encoder that is asked for the next token reads it, and its losses look wonderful.

The probe changes the second half of a short text and looks at the states of the first.
"""

import torch
from transformers import PreTrainedModel

from model_taps.evaluating import evaluating
from model_taps.head import final_hidden
from model_taps.loading import LOADING_ERRORS
from model_taps.neighbours import tolerance
from signal_store.errors import InputError, memory_error

_TOKENS = 16


@torch.no_grad()
def look_ahead(model: PreTrainedModel, vocab_size: int) -> float:
    """Largest difference that later tokens make to earlier final hidden states, relative to their spread."""
    ids = torch.randint(vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, _TOKENS // 2 :] = (other[:, _TOKENS // 2 :] + 1) % vocab_size
    device = next(model.parameters()).device
    with evaluating(model):
        one, two = (final_hidden(model, rows.to(device), None)[:, : _TOKENS // 2].float() for rows in (ids, other))
    return float((one - two).abs().max() / one.std().clamp(min=1e-6))


def refuse_look_ahead(model: PreTrainedModel, vocab_size: int, what: str) -> None:
    """InputError for a model whose rows see later tokens, and for one that cannot run at all."""
    kind = model.config.model_type
    try:
        found = look_ahead(model, vocab_size)
    except InputError:
        raise
    except (*LOADING_ERRORS, IndexError, AssertionError) as error:
        if memory_error(error) is not None:
            raise
        raise InputError(f"the {what} cannot run", found=f"{type(error).__name__}: {str(error)[:300]}", where=kind) from error
    if found > tolerance(model):
        raise InputError(
            f"the {what} looks ahead: it sees the token that it predicts",
            expected="a causal language model",
            found=f"{kind}, whose states change by {found:.2g} of their spread with later tokens",
            remedy="Some encoders have a decoder's setting, such as is_decoder: true.",
        )
