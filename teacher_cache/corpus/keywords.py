"""Where the keywords of a programming language stand in a text: by its lexer, never by token id; and what stands
for them in prose.

Strings and comments hold none, `undefined` holds no `def`, and code that does not parse still has its keywords.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Literal, Name, Operator, Punctuation
from pygments.util import ClassNotFound

from signal_store.errors import InputError
from signal_store.format.roles import DEPENDENCY, POS, SEMANTIC


@functools.cache
def _lexer(name: str) -> Lexer:
    try:
        return get_lexer_by_name(name, stripnl=False, ensurenl=False)
    except ClassNotFound as error:
        raise InputError("no such lexer", expected="an alias that Pygments knows", found=name) from error


def _is_a(kind: Any, family: Any) -> bool:
    """Whether a Pygments token type belongs to a family of them."""
    return kind in family


def _plain(text: str) -> str:
    """Pygments turns \\r\\n into \\n, which would shift every span after it."""
    return text.replace("\r\n", "\n\n").replace("\r", "\n")


def code_kinds(text: str, lexer: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, role in code as `signal_store.format.roles.CODE` names it) of every piece of a program."""
    for start, kind, value in _lexer(lexer).get_tokens_unprocessed(_plain(text)):
        yield start, start + len(value), "whitespace" if value.isspace() else _role_of(kind)


def _role_of(kind: Any) -> str:
    definitions = (Name.Function, Name.Class, Name.Namespace)
    if _is_a(kind, Keyword) or _is_a(kind, Operator.Word):
        return "keyword"
    if any(_is_a(kind, family) for family in definitions) or _is_a(kind, Name.Decorator):
        return "definition"
    families = {"identifier": Name, "comment": Comment, "literal": Literal, "operator": Operator}
    found = next((role for role, family in families.items() if _is_a(kind, family)), None)
    return found or ("operator" if _is_a(kind, Punctuation) else "none")


def prose_keywords(roles: NDArray[np.uint8], begins_word: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [tokens]: first tokens of what prose hangs on, as code hangs on its keywords: connectives and predicates; where nobody
    says which verb is the predicate, verbs. Of a text without tags, none."""
    if not roles.size:
        return np.zeros(len(roles), bool)
    pos, dependency, semantic, _ = roles.T
    predicate = (dependency == DEPENDENCY.index("root")) | (semantic == SEMANTIC.index("predicate"))
    verb = pos == POS.index("verb")
    found: NDArray[np.bool_] = begins_word & ((pos == POS.index("connective")) | (predicate if predicate.any() else verb))
    return found


def keyword_spans(text: str, lexer: str, words: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Character spans of the listed keywords, in order."""
    for start, kind, value in _lexer(lexer).get_tokens_unprocessed(_plain(text)):
        if value in words and (_is_a(kind, Keyword) or _is_a(kind, Operator.Word)):
            yield start, start + len(value)
