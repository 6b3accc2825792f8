"""A chat as text, rendered by the tokenizer's own template, and the character spans that the assistant wrote."""

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from signal_store.errors import InputError

FIXED_DAY = datetime(2024, 1, 1)


def render_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], where: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The rendered text and the assistant's spans.

    A template with `{% generation %}` says itself what the assistant wrote. Otherwise the chat is rendered turn by turn: what
    an assistant's turn adds after the generation prompt is its span. InputError where a template rewrites earlier turns, and
    where no span is left: nothing of such a chat would count, and a role that is spelt otherwise is the usual reason.
    """
    template = tokenizer.chat_template
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise InputError("not a chat", expected="a list of messages with role and content", found=str(messages)[:80], where=where)
    if template is None:
        raise InputError("the tokenizer has no chat template", expected="one, for a source with messages", where=where)
    text, spans = _rendered(tokenizer, template, messages, where)
    if not spans:
        raise InputError(
            "a chat has no answer of the assistant",
            expected="a message whose role is assistant",
            found=f"roles {', '.join(dict.fromkeys(message['role'] for message in messages)) or 'none'}",
            where=where,
            remedy="Rename the roles, or leave out chats that nobody answers.",
        )
    return text, spans


def _rendered(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]], where: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        with _refusals():
            result: Any = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, strftime_now=_on_a_fixed_day, **special
            )
        (text,), (spans,) = result
        return str(text), tuple((int(a), int(b)) for a, b in spans)
    text = _render(tokenizer, messages)
    found = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        after = _render(tokenizer, messages[: number + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                "the chat template rewrites earlier turns",
                expected="each turn's text to stay",
                found=f"turn {number}",
                where=where,
                remedy="Mark the assistant's text in the template with {% generation %}.",
            )
        found.append((len(before), len(after)))
    return text, tuple(found)


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> str:
    if not messages and not options.get("add_generation_prompt"):
        return ""
    with _refusals():
        return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=_on_a_fixed_day, **options))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise InputError("the chat template refuses a chat", found=error, remedy="Mend the chat, or its roles' order.") from error


def _on_a_fixed_day(pattern: str) -> str:
    """What a template that tells the date is told: the same text every day."""
    return FIXED_DAY.strftime(pattern)
