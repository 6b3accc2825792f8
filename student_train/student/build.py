"""The student: built from a config or a checkpoint, and checked against the cache it will learn from."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from model_taps.adapters import adapter_of
from model_taps.attention_interface import refuse_unknown_kernel
from model_taps.blocks import refuse_no_blocks
from model_taps.loading import (
    LOADING_ERRORS,
    has_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
    tokenizer_digest,
    vocabulary_size,
)
from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError, SignalStoreError
from signal_store.nearest import nearest
from student_train.align.aligned_cache import longest_segment, student_tokenizer, student_tokenizer_digest, student_vocabulary
from student_train.student.sections import StudentSection
from student_train.student.transforms.lora import Lora
from student_train.student.transforms.transform import Origin, Transform


def build_student(
    section: StudentSection, cache: Cache, *, reads_text: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build the student that a section asks for, with its transforms.

    Args:
        reads_text: it is not given the cache's tokens but text, and its tokenizer may be any.
    Returns:
        (the model in float32 and in training mode, its tokenizer).
    Raises:
        InputError: if the config is wrong, or the checkpoint cannot be loaded.
        MismatchError: if tokenizer, vocabulary or context do not fit the cache.
    """
    quiet()
    if section.attn_implementation is not None and not section.trust_remote_code:  # whose code may bring its own
        refuse_unknown_kernel(section.attn_implementation, "student.attn_implementation")
    tokenizer = _tokenizer(section, cache, reads_text=reads_text)
    model, origin = _drawn(section, cache, tokenizer) if section.checkpoint is None else _loaded(section, section.checkpoint)
    _check(model, cache, tokenizer, reads_text=reads_text)
    for transform in transforms_of(section):
        model = transform(model, origin)
    return model.train(), tokenizer


def transforms_of(section: StudentSection) -> tuple[Transform, ...]:
    """What is done to the student once it is built, in order."""
    return () if section.lora is None else (Lora(section.lora),)


def _loaded(section: StudentSection, checkpoint: str) -> tuple[PreTrainedModel, Origin]:
    """Adapters that are not trained on are merged, and all of the student is trained."""
    adapter = None if section.lora is None else adapter_of(checkpoint)
    model = load_model(
        checkpoint if adapter is None else adapter.base,
        what="student",
        revision=None if adapter is None else adapter.base_revision,
        dtype=torch.float32,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )
    return model, Origin(checkpoint, adapter, section.seed)


def _drawn(section: StudentSection, cache: Cache, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Origin]:
    torch.manual_seed(section.seed)
    try:
        config = _config(section, cache, tokenizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element")  # which `_refuse_no_size` refuses
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=section.attn_implementation)
    except LOADING_ERRORS as error:
        if isinstance(error, SignalStoreError):
            raise
        raise InputError("the student's config is wrong", found=str(error)[:300], where="student.config") from error
    _refuse_no_size(model)
    return model, Origin(None, None, section.seed)


def _config(section: StudentSection, cache: Cache, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    if isinstance(section.config, str):
        return load_config(section.config, what="student", trust_remote_code=section.trust_remote_code)
    assert isinstance(section.config, Mapping)
    fields = dict(section.config)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise InputError("the student's config names no model_type", expected="such as llama or qwen3", where="student.config")
    if dtypes := sorted({"dtype", "torch_dtype"} & fields.keys()):
        raise InputError("a student's weights are float32", expected="precision: bfloat16", found=dtypes[0], where="student.config")
    fields.setdefault("vocab_size", student_vocabulary(cache))
    for name in ("bos_token_id", "eos_token_id"):  # a family's defaults are another tokenizer's; a padding id would freeze its row
        fields.setdefault(name, getattr(tokenizer, name))
    config: PretrainedConfig = AutoConfig.for_model(kind, **fields)
    _refuse_unknown_fields(config, fields)
    return config


def _refuse_unknown_fields(config: PretrainedConfig, fields: Mapping[str, object]) -> None:
    """transformers keeps a misspelt field as an attribute that no model reads, and takes the default: often billions of weights."""
    default = type(config)()
    for name in fields:
        if hasattr(config, name) and not hasattr(default, name):
            near = nearest(name, [*default.to_dict(), *default.attribute_map])
            raise InputError(f"a {config.model_type} config has no such field", expected=near, found=name, where="student.config")


def _refuse_no_size(model: PreTrainedModel) -> None:
    """InputError where a width of 0 makes weights without numbers, which learn nothing."""
    if empty := [name for name, weight in model.named_parameters() if not weight.numel()]:
        shown = ", ".join(empty[:3])
        raise InputError("the student's config gives weights no size", expected="1 or more", found=shown, where="student.config")


def own_tokenizer(section: StudentSection) -> str | None:
    """Where the student's own tokenizer is; None where it has none, and the cache's will do."""
    if section.tokenizer is not None or section.checkpoint is None:
        return section.tokenizer
    bare = Path(section.checkpoint).is_dir() and not has_tokenizer(section.checkpoint)
    return None if bare else section.checkpoint


def _tokenizer(section: StudentSection, cache: Cache, *, reads_text: bool) -> PreTrainedTokenizerFast:
    own = own_tokenizer(section)
    tokenizer = load_tokenizer(own) if own is not None else student_tokenizer(cache)
    expected, found = student_tokenizer_digest(cache), tokenizer_digest(tokenizer)
    if expected != found and not reads_text:
        raise MismatchError(
            "the student reads with another tokenizer than this cache is read with",
            expected=expected,
            found=f"{found} ({own or 'the copy in the cache'})",
            where=cache.uri,
            remedy="Open the cache with a view for this tokenizer: student-train align.",
        )
    return tokenizer


def _check(model: PreTrainedModel, cache: Cache, tokenizer: PreTrainedTokenizerFast, *, reads_text: bool) -> None:
    refuse_no_blocks(model.config)
    vocab_size = vocabulary_size(tokenizer) if reads_text else student_vocabulary(cache)
    rows = len(model.get_output_embeddings().weight)
    if rows < vocab_size:
        raise MismatchError(
            "the student's vocabulary is smaller than its texts'", expected=f"at least {vocab_size} rows", found=rows
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and not reads_text and positions < (longest := longest_segment(cache)):
        raise MismatchError(
            "the student's context is shorter than the cache's segments",
            expected=f"at least {longest} positions",
            found=positions,
            where="student.config.max_position_embeddings",
        )
