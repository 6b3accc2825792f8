"""What part each word plays: spans of characters with roles, by jieba, a spaCy pipeline, or a Pygments lexer.

jieba (Chinese) gives parts of speech. spaCy gives parts of speech and dependencies; semantic roles come from a token-classification
checkpoint with BIO labels, or from the dependencies. Code gets roles from its lexer. Words become tokens by overlap of characters.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signal_store.canonical import sha256
from signal_store.errors import InputError, NotFoundError
from signal_store.format.roles import CODE, DEPENDENCY, LEVELS, POS, SEMANTIC
from signal_store.manifest import TaggerIdentity
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.keywords import code_kinds
from teacher_cache.recipe import TaggerSection


@dataclass(frozen=True, slots=True)
class Word:
    """Characters start..stop and their roles, by name; "none" where a parser does not say."""

    start: int
    stop: int
    pos: str = "none"
    dependency: str = "none"
    semantic: str = "none"
    code: str = "none"


Tagger = Callable[[Document], Iterable[Word]]

_JIEBA: tuple[tuple[tuple[str, ...], str], ...] = (
    (("nr", "ns", "nt", "nz"), "entity_noun"),
    (("n", "s", "t", "vn", "an", "i", "l", "j", "b"), "noun"),
    (("v",), "verb"),
    (("a", "z"), "adjective"),
    (("d",), "adverb"),
    (("r",), "pronoun"),
    (("c",), "connective"),
    (("m", "q"), "number"),
    (("w", "x"), "punctuation"),
    (("u", "p", "y", "e", "o", "f", "h", "k"), "function"),
)
"""Longest flags first: `vn` is a noun before `v` is a verb."""
_UNIVERSAL = {
    "PROPN": "entity_noun",
    "NOUN": "noun",
    "VERB": "verb",
    "ADJ": "adjective",
    "ADV": "adverb",
    "PRON": "pronoun",
    "CCONJ": "connective",
    "SCONJ": "connective",
    "NUM": "number",
    "PUNCT": "punctuation",
    "SYM": "punctuation",
    "ADP": "function",
    "AUX": "function",
    "DET": "function",
    "PART": "function",
    "INTJ": "function",
}
_DEPENDENCY = {
    "root": "root",
    "nsubj": "subject",
    "nsubjpass": "subject",
    "csubj": "subject",
    "dobj": "object",
    "obj": "object",
    "iobj": "object",
    "dative": "object",
    "pobj": "oblique",
    "obl": "oblique",
    "ccomp": "complement",
    "xcomp": "complement",
    "attr": "complement",
    "acomp": "complement",
    "amod": "modifier",
    "advmod": "modifier",
    "nmod": "modifier",
    "npadvmod": "modifier",
    "appos": "modifier",
    "compound": "modifier",
    "nummod": "modifier",
    "advcl": "modifier",
    "relcl": "modifier",
    "acl": "modifier",
    "conj": "conjunct",
    "det": "function",
    "case": "function",
    "prep": "function",
    "aux": "function",
    "auxpass": "function",
    "mark": "function",
    "cc": "function",
    "cop": "function",
    "punct": "function",
}
_SEMANTIC_OF = {"root": "predicate", "subject": "arg0", "object": "arg1", "oblique": "modifier", "complement": "arg2"}
"""Semantic roles where no model says them: the root verb, who does, what is done to, where and when."""


def make_tagger(section: TaggerSection) -> tuple[Tagger, TaggerIdentity]:
    """A source's tagger, and what its words came from."""
    if section.parser == "jieba":
        return _jieba_words, TaggerIdentity(parser="jieba", version=_version("jieba"), digest=None, semantic_digest=None)
    if section.parser == "pygments":
        return _code_words, TaggerIdentity(parser="pygments", version=_version("pygments"), digest=None, semantic_digest=None)
    assert section.model is not None
    pipeline = _spacy_pipeline(section.model)
    semantic = None if section.semantic_model is None else _semantic_model(section.semantic_model)
    identity = TaggerIdentity(
        parser="spacy",
        version=_version("spacy"),
        digest=_folder_digest(section.model),
        semantic_digest=None if section.semantic_model is None else _folder_digest(section.semantic_model),
    )
    return functools.partial(_spacy_words, pipeline, semantic), identity


def no_words(_document: Document) -> Iterator[Word]:
    """Of a source without a tagger, in a cache that has tags."""
    return iter(())


def token_roles(tagger: Tagger, document: Document, spans: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """uint8 [tokens, 4]: each token has the roles of the word that it shares most characters with; bool [tokens]: whether it is the
    first of a word. `spans` [tokens, 2]."""
    roles = np.zeros((len(spans), len(LEVELS)), np.uint8)
    begins = np.zeros(len(spans), bool)
    best = np.zeros(len(spans), np.int64)
    ends = np.maximum.accumulate(spans[:, 1]) if len(spans) else spans[:, 0]
    for word in tagger(document):
        first = int(np.searchsorted(ends, word.start, side="right"))
        code = [names.index(getattr(word, level)) for level, names in LEVELS.items()]
        is_first = True
        for token in range(first, len(spans)):
            if spans[token, 0] >= word.stop:
                break
            shared = min(int(spans[token, 1]), word.stop) - max(int(spans[token, 0]), word.start)
            if shared > best[token]:
                best[token], roles[token], begins[token] = shared, code, is_first
                is_first = False
    return roles, begins


def _jieba_words(document: Document) -> Iterator[Word]:
    position = 0
    for pair in _jieba().cut(document.text):
        stop = position + len(pair.word)
        if not pair.word.isspace():
            yield Word(position, stop, pos=_jieba_pos(pair.word, pair.flag))
        position = stop


@functools.cache
def _jieba() -> Any:
    try:
        import jieba
        import jieba.posseg
    except ImportError as error:
        raise _missing("jieba") from error
    jieba.setLogLevel(logging.WARNING)
    return jieba.posseg


def _jieba_pos(word: str, flag: str) -> str:
    if flag in ("x", "eng") and any(c.isalnum() for c in word):
        return "noun"
    for length in (2, 1):
        for flags, name in _JIEBA:
            if flag[:length] in flags:
                return name
    return "other"


def _code_words(document: Document) -> Iterator[Word]:
    if document.lexer is None:
        return
    for start, stop, kind in code_kinds(document.text, document.lexer):
        assert kind in CODE
        yield Word(start, stop, code=kind)


def _spacy_words(pipeline: Any, semantic: Any, document: Document) -> Iterator[Word]:
    pipeline.max_length = max(pipeline.max_length, len(document.text) + 1)
    said = {} if semantic is None else dict(_semantic_spans(semantic, document.text))
    for token in pipeline(document.text):
        if token.is_space:
            continue
        said_pos = _UNIVERSAL.get(token.pos_, "other") if token.pos_ else "none"
        pos = "entity_noun" if token.ent_type_ and said_pos in ("noun", "none") else said_pos
        dependency = _DEPENDENCY.get(token.dep_.lower().split(":")[0], "other" if token.dep_ else "none")
        start, stop = token.idx, token.idx + len(token.text)
        if semantic is None:
            role = _SEMANTIC_OF.get(dependency, "none")
        else:
            role = next((said[place] for place in range(start, stop) if place in said), "none")
        assert pos in POS
        assert dependency in DEPENDENCY
        yield Word(start, stop, pos=pos, dependency=dependency, semantic=role)


def _spacy_pipeline(folder: Path) -> Any:
    from model_taps.loading import LOADING_ERRORS  # brings torch

    try:
        import spacy
    except ImportError as error:
        raise _missing("spacy") from error
    try:
        return spacy.load(folder)
    except (*LOADING_ERRORS, ImportError, KeyError) as error:
        raise NotFoundError("no spaCy pipeline here", found=_reason(error), where=folder) from error


def _semantic_model(folder: Path) -> Any:
    from transformers import pipeline

    from model_taps.loading import LOADING_ERRORS

    if not folder.is_dir():
        raise NotFoundError("no such folder", found=folder, where="sources.tagger.semantic_model")
    options: dict[str, Any] = {"aggregation_strategy": "simple", "stride": 64}  # long texts in windows that overlap
    try:
        found = pipeline("token-classification", model=str(folder), tokenizer=str(folder), **options)
    except (*LOADING_ERRORS, KeyError) as error:
        raise NotFoundError("no token-classification model here", found=_reason(error), where=folder) from error
    if not getattr(found.tokenizer, "is_fast", False):
        raise InputError("the semantic model's tokenizer gives no offsets", expected="a fast one", where=folder)
    return found


def _reason(error: Exception) -> str:
    """Its first line that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _semantic_spans(model: Any, text: str) -> Iterator[tuple[int, str]]:
    """(character, role) of every character that the model gives one."""
    for found in model(text):
        label = str(found["entity_group"]).upper().removeprefix("B-").removeprefix("I-")
        if label in ("V", "PRED", "PREDICATE"):
            role = "predicate"
        elif label in ("ARG0", "ARG1", "ARG2", "A0", "A1", "A2"):
            role = f"arg{label[-1]}"
        else:
            role = "modifier" if label.startswith(("ARGM", "AM")) else "other"
        assert role in SEMANTIC
        for place in range(int(found["start"]), int(found["end"])):
            yield place, role


def _folder_digest(folder: Path) -> str:
    """Of the names and bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256("".join(f"{path.relative_to(folder)} {sha256(path.read_bytes())}\n" for path in files).encode())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise _missing(package) from error


def _missing(package: str) -> InputError:
    return InputError(f"{package} is not installed", expected='pip install "teacher-cache[nlp]"', where="sources.tagger")
