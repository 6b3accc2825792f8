"""Tiny models, tokenizers and texts, made on the spot; no model hub is ever reached."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HAS_TORCH = find_spec("torch") is not None
"""Some environments of tools/matrix are without: their tests read caches that lie here, and build none."""
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
if HAS_TORCH:
    import torch

    torch.set_num_threads(1)

WIDTH, LAYERS, HEADS, CONTEXT = 32, 4, 4, 48
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen3": {**COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "gemma": {**COMMON, "head_dim": 8},
    "gemma2": {**COMMON, "head_dim": 8, "sliding_window": 16},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "bos_token_id": None, "eos_token_id": 0},
    "opt": {
        "hidden_size": WIDTH, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64,
        "word_embed_proj_dim": WIDTH, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
    },
}  # fmt: skip

CODE = [
    "def add(a, b):\n    # if this is a comment, for is no keyword\n    return a + b\n\n\nfor i in range(3):\n    if i > 1:\n        print('while', i)\n",
    "class Undefined:\n    def __init__(self, size):\n        self.size = size\n\n    def grow(self):\n        while self.size < 9:\n            self.size += 1\n",
    "try:\n    with open('x') as f:\n        data = f.read()\nexcept OSError as error:\n    data = ''\nelse:\n    print(len(data))\n",
]
PROSE = [
    "The teacher speaks once, and the cache remembers what it thought about every word.",
    "今天天气很好,我们一起去公园散步吧。学生从缓存里学习,老师已经不在了。",
    "A student may be small; what it hears must still be faithful.",
    "Rows of tokens are packed so that no step is wasted.",
]

NAMES = ("add", "grow", "read", "print", "open", "self", "size", "data", "error", "range", "len", "init")
QUESTIONS = [
    {"prompt": f"def {a}(x):\n    return x\nfor {b} in x:\n    pass\n# {c}?\n", "completion": f"{a}({b})"}
    for a, b, c in zip(NAMES * 2, NAMES[5:] + NAMES * 2, NAMES[3:] + NAMES * 2, strict=False)
]
SUMMARIES = [
    {"prompt": f"def {a}({b}, x):\n    return {c}\n", "completion": f" # {a} of {c}\n"}
    for a, b, c in zip(NAMES * 2, NAMES[4:] + NAMES * 2, NAMES[7:] + NAMES * 2, strict=False)
]


def make_other_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level as well, with other tokens and another name for the end of a text, and a beginning that it puts before each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*PROSE, *PROSE, CODE[0]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|bos|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CODE + PROSE, trainer)
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    options = {"bos_token": "<|bos|>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=template, **options
    )


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's: ▁ for a space, one before the text, and unknown characters in bytes."""
    pieces = ["<unk>", "</s>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghimnorstuwy", "▁the", "▁cache"]
    tokenizer = Tokenizer(
        models.BPE({p: n for n, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def make_model(family: str, vocab_size: int, *, seed: int = 0, scale: float = 1.0, **changes: Any) -> PreTrainedModel:
    """A tiny random model; `scale` sharpens its distributions by scaling the output head."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "vocab_size": vocab_size, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if scale != 1:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
    model.eval()
    return model


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
