"""Adapters (peft), such as low-rank ones: which base they belong to, how they are merged into it, what both are together.

A model that is a base and an adapter is identified by the digests of both: merged weights differ in their last bits between
versions and devices.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from signal_store.canonical import canonical_json, digest
from signal_store.errors import InputError, NotFoundError

CONFIG = "adapter_config.json"
_PLACES = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
"""Fields of an adapter's config that do not say what it computes."""
_DIGESTS = "_base_and_adapter"
"""The attribute of a merged model that holds both digests."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """`name`: its folder or hub name. `base`: an absolute folder, or a hub name, with the base's `base_revision`."""

    name: str
    revision: str | None
    base: str
    base_revision: str | None
    config: dict[str, Any]


def adapter_of(name: str, revision: str | None = None) -> Adapter | None:
    """The adapter in a folder or under a hub name, or None where it is a model. NotFoundError where its base is not to be found;
    InputError where it names none, or where a model lies beside it."""
    if not Path(name).is_dir() and is_path(name):
        return None  # no such folder: whoever loads the model says so
    path = find_adapter_config_file(name, revision=revision)
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("an adapter's config names no base", expected="base_model_name_or_path", where=path) from error
    if not isinstance(base, str) or not base:
        raise InputError("an adapter's config names no base", expected="base_model_name_or_path", found=base, where=path)
    if (Path(name) / "config.json").is_file():
        raise InputError(
            "the folder holds a model and an adapter", expected="one of them", where=name, remedy="Give each a folder of its own."
        )
    return Adapter(name, revision, _resolved(base, Path(path).parent), config.get("revision"), config)


def is_path(name: str) -> bool:
    """Whether a name is a folder's, there or not, and no hub's."""
    return Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _resolved(base: str, folder: Path) -> str:
    """A relative path counts from here, as transformers reads it, or from the adapter's folder."""
    found = next((place for place in (Path(base), folder / base) if place.is_dir()), None)
    if found is not None:
        return str(found.resolve())
    if is_path(base):
        raise NotFoundError("the adapter's base is not there", expected=base, where=folder / CONFIG, remedy="Write its path there.")
    return base


def merged(base: PreTrainedModel, adapter: Adapter, base_digest: str) -> PreTrainedModel:
    """The base with the adapter's weights in its own, nothing of peft left in it. InputError for a kind of adapter that cannot be
    merged, such as a learned prompt."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError("peft is not installed", expected='pip install "teacher-cache[lora]"', where=adapter.name) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 on transformers 5.23
        adapted = PeftModel.from_pretrained(base, adapter.name, revision=adapter.revision)
    identity = {"base": base_digest, "adapter": _adapter_digest(adapted, adapter)}
    try:
        model: PreTrainedModel = adapted.merge_and_unload()
    except AttributeError as error:
        kind = adapter.config.get("peft_type")
        raise InputError("an adapter that cannot be merged into its base", found=kind, where=adapter.name) from error
    model.requires_grad_(True)
    setattr(model, _DIGESTS, identity)
    return model


def _adapter_digest(adapted: Any, adapter: Adapter) -> str:
    """sha256 over what the adapter's config says it computes, and the names, dtypes, shapes and bytes of its tensors."""
    from peft import get_peft_model_state_dict

    state = hashlib.sha256(canonical_json({key: value for key, value in adapter.config.items() if key not in _PLACES}))
    for name, tensor in sorted(get_peft_model_state_dict(adapted).items()):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return "sha256:" + state.hexdigest()


def digest_of_both(model: PreTrainedModel) -> str | None:
    """Of a model that was merged: one digest of the base's and the adapter's; None for any other."""
    parts = getattr(model, _DIGESTS, None)
    return None if parts is None else digest(parts)
