"""The student: built from a config or a checkpoint, and checked against the cache it will learn from."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from model_taps.adapters import Adapter, adapter_of
from model_taps.attention_interface import refuse_unknown_kernel
from model_taps.blocks import refuse_no_blocks
from model_taps.loading import LOADING_ERRORS, has_tokenizer, load_config, load_model, load_tokenizer, quiet, tokenizer_digest
from model_taps.neighbours import probe
from signal_store.cache import Cache
from signal_store.errors import InputError, MismatchError, SignalStoreError
from signal_store.nearest import nearest
from student_train.recipe import LoraSection, StreamSection, StudentSection


def build_student(section: StudentSection, cache: Cache) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32, ready to train, and its tokenizer."""
    quiet()
    if section.attn_implementation is not None and not section.trust_remote_code:  # whose code may bring its own
        refuse_unknown_kernel(section.attn_implementation, "student.attn_implementation")
    tokenizer = _tokenizer(section, cache)
    adapter = None if section.checkpoint is None or section.lora is None else adapter_of(section.checkpoint)
    if section.checkpoint is not None:  # adapters that are not trained on are merged, and all of the student is trained
        model = load_model(
            section.checkpoint if adapter is None else adapter.base,
            what="student",
            revision=None if adapter is None else adapter.base_revision,
            dtype=torch.float32,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
        )
    else:
        torch.manual_seed(section.seed)
        try:
            config = _config(section, cache, tokenizer)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Initializing zero-element")  # which `_refuse_no_size` refuses
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation=section.attn_implementation
                )
        except LOADING_ERRORS as error:
            if isinstance(error, SignalStoreError):
                raise
            raise InputError("the student's config is wrong", found=str(error)[:300], where="student.config") from error
        _refuse_no_size(model)
    _check(model, cache)
    if section.lora is not None:
        torch.manual_seed(section.seed)
        if adapter is None:
            _add_adapters(model, section.lora)
        else:
            _go_on_with(model, adapter, section.lora)
        _name_base(model, section.checkpoint if adapter is None else adapter.base)
    return model.train(), tokenizer


def _add_adapters(model: PreTrainedModel, section: LoraSection) -> None:
    """Low-rank adapters in place; all else is frozen."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("peft is not installed", expected='pip install "teacher-cache[lora]"', where="student.lora") from error
    targets = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if isinstance(targets, list) and (lost := [target for target in targets if target.rpartition(".")[2] not in modules]):
        where = "student.lora.target_modules"
        raise InputError("the student has no such module", expected=nearest(lost[0], modules), found=lost[0], where=where)
    model.add_adapter(
        LoraConfig(
            r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )
    )


def _go_on_with(model: PreTrainedModel, adapter: Adapter, section: LoraSection) -> None:
    """The checkpoint's own adapters, which train on. InputError where the section asks for others."""
    asked: dict[str, Any] = {"r": section.rank, "lora_alpha": section.alpha, "lora_dropout": section.dropout, "peft_type": "LORA"}
    if not isinstance(section.target_modules, str):
        asked["target_modules"] = sorted(section.target_modules)
    held: dict[str, Any] = {key: adapter.config.get(key) for key in asked}
    if isinstance(held.get("target_modules"), list):
        held["target_modules"] = sorted(held["target_modules"])
    if differ := {key for key in asked if held[key] != asked[key]}:
        raise InputError(
            "the checkpoint's adapters are others than student.lora asks for",
            expected={key: held[key] for key in sorted(differ)},
            found={key: asked[key] for key in sorted(differ)},
            where=adapter.name,
            remedy="Ask for the same, to train them on; or leave student.lora out, to train all of the merged student.",
        )
    model.load_adapter(adapter.name, is_trainable=True)


def _name_base(model: PreTrainedModel, base: str | None) -> None:
    """An exported adapter's base is found wherever it is read from: a folder by its absolute path."""
    assert base is not None, "adapters are trained on a checkpoint"
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base


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
    fields.setdefault("vocab_size", cache.manifest.tokenizer.vocab_size)
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


def _tokenizer(section: StudentSection, cache: Cache) -> PreTrainedTokenizerFast:
    own = section.tokenizer or section.checkpoint
    if section.tokenizer is None and own is not None and Path(own).is_dir() and not has_tokenizer(own):
        own = None  # the cache's will do
    tokenizer = load_tokenizer(own) if own is not None else cached_tokenizer(cache)
    expected, found = cache.manifest.tokenizer.digest, tokenizer_digest(tokenizer)
    if expected != found:
        raise MismatchError(
            "teacher and student have different tokenizers",
            expected=expected,
            found=f"{found} ({own or 'the copy in the cache'})",
            where=cache.uri,
            remedy="Train a student that uses the teacher's tokenizer.",
        )
    return tokenizer


def cached_tokenizer(cache: Cache) -> PreTrainedTokenizerFast:
    """The copy that the cache keeps, which may lie in a bucket."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in cache.tokenizer_files().items():
            (Path(folder) / name).write_bytes(data)
        return load_tokenizer(folder)


def _check(model: PreTrainedModel, cache: Cache) -> None:
    refuse_no_blocks(model.config)
    vocab_size = cache.manifest.tokenizer.vocab_size
    rows = len(model.get_output_embeddings().weight)
    if rows < vocab_size:
        raise MismatchError(
            "the student's vocabulary is smaller than the cache's", expected=f"at least {vocab_size} rows", found=rows
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < cache.manifest.plan.context:
        raise MismatchError(
            "the student's context is shorter than the cache's segments",
            expected=f"at least {cache.manifest.plan.context} positions",
            found=positions,
            where="student.config.max_position_embeddings",
        )


def packs_rows(student: PreTrainedModel, cache: Cache, stream: StreamSection) -> bool:
    """Whether several segments of the cache may share a row of the student's. InputError where neither that nor one a row gives a
    segment what it gets alone."""
    found = probe(
        student,
        cache.manifest.tokenizer.vocab_size,
        min(cache.manifest.plan.context, stream.row_tokens),  # the stream refuses what is longer
        what="student",
        width=stream.row_tokens,
        most_tokens=stream.row_tokens * (stream.micro_rows or stream.rows_per_step),
        allowed=("packed", "padded"),
    )
    if found.split_length is not None:
        raise InputError(
            "the student's states depend on the longest segment of a batch",
            expected=f"segments of at most {found.split_length} tokens, or a student without such a rule",
            found=f"segments of up to {cache.manifest.plan.context} tokens",
            where=f"{student.config.model_type}, its rope_parameters",
            remedy="Give the student's config other rope_parameters, or build the cache with a shorter context.",
        )
    return found.forward == "packed"
