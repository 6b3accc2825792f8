"""Load a causal LM and its tokenizer from a folder or by hub name, and say what they are.

Nothing of theirs is executed unless asked for.
"""

import hashlib
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from model_taps.adapters import adapter_of, digest_of_both, is_path, merged
from signal_store.canonical import digest
from signal_store.errors import InputError, NotFoundError

LOADING_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, EOFError, ArithmeticError,
    UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a checkpoint or config that is not one."""
TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "spiece*", "tekken*", "*.tiktoken")


def _from_pretrained(auto: Any, name: str, what: str, **options: Any) -> Any:
    if is_path(name) and not Path(name).is_dir():
        raise NotFoundError(f"no such {what} folder", expected="a folder with config.json", found=name)
    try:
        return auto.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(
            f"cannot load the {what}", expected="a model folder or a hub name", found=f"{name}: {reason}"
        ) from error


def load_config(name: str, *, what: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model, of an adapter's that of its base; NotFoundError in one line if there is none."""
    if (adapter := adapter_of(name, revision)) is not None:
        return load_config(adapter.base, what=f"{what}'s base", revision=adapter.base_revision, trust_remote_code=trust_remote_code)
    config: PretrainedConfig = _from_pretrained(AutoConfig, name, what, revision=revision, trust_remote_code=trust_remote_code)
    return config


def load_model(name: str, *, what: str, **options: Any) -> PreTrainedModel:
    """A causal LM in evaluation mode, an adapter merged into its base; `options` go to `from_pretrained`. InputError where the
    checkpoint lacks weights, which would be random."""
    quiet()
    if (adapter := adapter_of(name, options.get("revision"))) is not None:
        base = load_model(adapter.base, what=f"{what}'s base", **{**options, "revision": adapter.base_revision})
        return merged(base, adapter, weights_digest(base))
    model: PreTrainedModel
    model, info = _from_pretrained(AutoModelForCausalLM, name, what, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"the {what}'s checkpoint lacks weights", expected="all of them", found=f"no {shown}", where=name)
    model.eval()
    return model


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a folder holds one. Without, transformers makes an empty one for some families."""
    return any(path for name in TOKENIZER_FILES for path in Path(folder).glob(name))


def quiet() -> None:
    """Silence transformers' own bars for reading and writing weights: ours say what takes long."""
    logging.disable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer (offsets are needed); InputError for a slow one, NotFoundError for a folder without one, whose base has none
    either, if it is an adapter's."""
    if Path(name).is_dir() and not has_tokenizer(name):
        if (adapter := adapter_of(name, revision)) is not None:
            return load_tokenizer(adapter.base, revision=adapter.base_revision, trust_remote_code=trust_remote_code)
        raise NotFoundError("the folder has no tokenizer", expected="tokenizer.json, or the files that its family has", where=name)
    tokenizer = _from_pretrained(AutoTokenizer, name, "tokenizer", revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError("the tokenizer gives no offsets", expected="a fast tokenizer", found=type(tokenizer).__name__, where=name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.no_truncation()  # settings of a past training, which would cut documents in silence
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Digest of what turns text into ids: vocabulary, merges, normaliser, pre-tokenizer, added tokens. Not the chat template."""
    return "sha256:" + hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id plus one. `len(tokenizer)` counts tokens: ids may have gaps, or lie beyond that count."""
    return 1 + max(tokenizer.get_vocab().values())


def config_digest(config: PretrainedConfig) -> str:
    """Digest of the architecture; where the files lay, dtypes and library versions are left out."""
    plain = {
        k: v for k, v in config.to_dict().items() if k not in {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    }
    return digest(_json_safe(plain))


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers, in order of name; of a merged adapter, over the
    digests of its base and itself."""
    if (both := digest_of_both(model)) is not None:
        return both
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + state.hexdigest()


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
