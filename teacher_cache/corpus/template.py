"""Chat templates, rendered in an environment of our own: the one file that knows how transformers renders them.

The same functions and filters as transformers gives a template, but the day is fixed, so that a plan does not depend on when it was
made, and what `{% generation %}` holds is marked in the text itself.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError

FIXED_DAY = datetime(2024, 1, 1)
"""What a template that tells the date is told."""
GENERATION = ("\U0010fff0", "\U0010fff1")
"""Characters around what a template says the assistant wrote."""
REFUSALS = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
"""What a template raises at a chat that it was not made for."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template and the special tokens that it may write."""

    source: str
    special_tokens: tuple[tuple[str, str], ...]

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself, with `{% generation %}`, what the assistant wrote."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
        marked: bool = True,
    ) -> str:
        """The text of a chat; if `marked`, with `GENERATION` around what the template says the assistant wrote. Raises one of
        `REFUSALS`."""
        text: str = _compiled(self.source, marked and self.marks_answers).render(
            messages=list(messages),
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **dict(self.special_tokens),
        )
        return text


def template_of(tokenizer: PreTrainedTokenizerFast, name: str | None, *, tools: bool, where: str) -> ChatTemplate:
    """The tokenizer's template; of several, the one that the recipe names, else `tool_use` for chats with tools, else `default`."""
    found: Any = tokenizer.chat_template
    if not found:
        raise InputError("the tokenizer has no chat template", expected="one, for a source with messages", where=where)
    named: dict[str, str] = dict(found) if isinstance(found, Mapping) else {"default": str(found)}
    wanted = [name] if name is not None else [*(["tool_use"] if tools else []), "default"]
    chosen = next((key for key in wanted if key in named), None)
    if chosen is None:
        raise InputError(
            "the tokenizer has no such chat template",
            expected=wanted[-1],
            found=", ".join(sorted(named)),
            where=where,
            remedy="Name one of them: `chat_template:` of the source.",
        )
    return ChatTemplate(named[chosen], tuple(sorted((key, str(token)) for key, token in tokenizer.special_tokens_map.items())))


class _Generation(Extension):
    """`{% generation %}`: its body between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return GENERATION[0] + str(caller()) + GENERATION[1]


class _Unmarked(_Generation):
    def _marked(self, caller: Macro) -> str:
        return str(caller())


@functools.lru_cache(maxsize=128)
def _compiled(source: str, marked: bool) -> Any:
    generation = _Generation if marked else _Unmarked
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FIXED_DAY.strftime
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
