"""The tokenizer that a cache keeps."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model_taps.loading import load_tokenizer
from signal_store.cache import Cache


def cached_tokenizer(cache: Cache) -> PreTrainedTokenizerFast:
    """The copy that the cache keeps, which may lie in a bucket."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in cache.tokenizer_files().items():
            (Path(folder) / name).write_bytes(data)
        return load_tokenizer(folder)
