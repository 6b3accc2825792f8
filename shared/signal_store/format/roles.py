"""Roles of tokens in their sentence or program, as `tags/roles` stores them: one byte each of part of speech, dependency, semantic
role, and role in code. The byte is the name's place in its tuple; 0 is none.
"""

import numpy as np
from numpy.typing import NDArray

POS = (
    "none",
    "entity_noun",
    "noun",
    "verb",
    "adjective",
    "adverb",
    "pronoun",
    "connective",
    "function",
    "number",
    "punctuation",
    "other",
)
DEPENDENCY = ("none", "root", "subject", "object", "complement", "oblique", "modifier", "conjunct", "function", "other")
SEMANTIC = ("none", "predicate", "arg0", "arg1", "arg2", "modifier", "other")
CODE = ("none", "keyword", "definition", "identifier", "literal", "operator", "comment", "whitespace")
LEVELS: dict[str, tuple[str, ...]] = {"pos": POS, "dependency": DEPENDENCY, "semantic": SEMANTIC, "code": CODE}
"""By column of `tags/roles`, the names of its values."""
TOKEN_TYPES = ("other", "function", "anchor", "code")
"""What a token is, at the coarsest: a function word or punctuation; a noun, verb or connective, on which the sentence hangs;
code."""
_FUNCTION, _ANCHOR = ("function", "punctuation"), ("entity_noun", "noun", "verb", "connective")


def token_types(roles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n], places in TOKEN_TYPES, of roles [n, 4]."""
    by_pos = np.asarray([1 if name in _FUNCTION else 2 if name in _ANCHOR else 0 for name in POS], np.uint8)
    found: NDArray[np.uint8] = np.where(roles[:, 3] > 0, np.uint8(TOKEN_TYPES.index("code")), by_pos[roles[:, 0]])
    return found
