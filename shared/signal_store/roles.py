"""Roles of tokens in their sentence or program, as `tags/roles` stores them: one byte each of part of speech, dependency, semantic
role, and role in code. The byte is the name's place in its tuple; 0 is none.
"""

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
