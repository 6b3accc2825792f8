"""Where the keywords of a programming language stand in a text: by its lexer, never by token id (REQUIREMENTS 69).

Strings and comments hold none, `undefined` holds no `def`, and code that does not parse still has its keywords.
"""

import functools
from collections.abc import Iterator
from typing import Any

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Keyword, Operator
from pygments.util import ClassNotFound

from signal_store.errors import InputError


@functools.cache
def _lexer(name: str) -> Lexer:
    try:
        return get_lexer_by_name(name, stripnl=False, ensurenl=False)
    except ClassNotFound as error:
        raise InputError("no such lexer", expected="an alias that Pygments knows", found=name) from error


def _is_a(kind: Any, family: Any) -> bool:
    """Whether a Pygments token type belongs to a family of them."""
    return kind in family


def keyword_spans(text: str, lexer: str, words: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Character spans of the listed keywords, in order."""
    # Pygments turns \r\n into \n, which would shift every span after it.
    plain = text.replace("\r\n", "\n\n").replace("\r", "\n")
    for start, kind, value in _lexer(lexer).get_tokens_unprocessed(plain):
        if value in words and (_is_a(kind, Keyword) or _is_a(kind, Operator.Word)):
            yield start, start + len(value)
