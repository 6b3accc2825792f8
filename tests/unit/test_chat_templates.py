"""Every chat template that trl ships: what counts of each chat, the same text as transformers renders, and the table of the page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import chat_table
from chat_table import CHATS, Outcome, outcome, table, template_files, tokenizer_for, turn
from signal_store.errors import InputError
from teacher_cache.corpus.chat import render_chat
from teacher_cache.corpus.document import Document

FILES = template_files()
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}


def counted(found: Outcome) -> list[str]:
    return [document.text[a:b] for document in found.documents for a, b in document.counted or ()]


def words_of(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [text.strip()] * bool(text) + [word for call in calls for word in (call["name"], *map(str, call["arguments"].values()))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_counts_and_nothing_else(name: str) -> None:
    for chat, (messages, _) in CHATS.items():
        found = outcome(TEMPLATES[name], chat)
        assert found.documents or found.reason.startswith(("the template never shows", "the chat template refuses")), chat
        answers = "\n".join(counted(found))
        for message in messages if found.documents else ():
            for word in words_of(message):
                assert (word in answers) == (message["role"] == "assistant"), (chat, word)
        for document in found.documents:
            spans = [place for span in document.counted or () for place in span]
            assert spans == sorted(spans)
            assert document.text[: document.prefix].count("Why?") == 0


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "{% generation %}" not in TEMPLATES[name].replace("-", "")])
def test_no_turn_but_an_answer_counts_where_the_assistant_begins_or_goes_on(name: str) -> None:
    chat = [turn("assistant", "Hello."), turn("user", "Why?"), turn("assistant", "So."), turn("assistant", "Indeed.")]
    try:
        found = render_chat(tokenizer_for(TEMPLATES[name]), chat, where="the chat")
    except InputError:
        return
    for text in (document.text[a:b] for document in found for a, b in document.counted or ()):
        body = text.removesuffix("<|assistant|>")  # what begins the next turn, where nothing else ends one
        assert not re.search(r"helpful|system|assistant\b|<\|begin", body), text


def as_transformers_renders(template: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> set[str]:
    """Its renderings of the chat in the forms that are in use."""
    tokenizer, found = tokenizer_for(template), set()
    for parts in (False, True):
        for text_arguments in (False, True):
            given = json.loads(json.dumps(messages))
            for message in given:
                content = message.pop("content")
                text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
                if text or message["role"] != "assistant":
                    message["content"] = [{"type": "text", "text": text}] if parts else text
                for call in message.get("tool_calls", ()):
                    arguments = call["function"]["arguments"]
                    call["function"]["arguments"] = json.dumps(arguments) if text_arguments else arguments
            for nothing in ({}, {"content": ""}):
                silent = [message if "content" in message else {**message, **nothing} for message in given]
                try:
                    found.add(str(tokenizer.apply_chat_template(silent, tools, tokenize=False)))
                except Exception:  # noqa: BLE001, S112  # what a template does at a form that it does not read
                    continue
    return found


SAME = [name for name, template in TEMPLATES.items() if not name.endswith("_training") and "strftime_now" not in template][::3]


@pytest.mark.parametrize("name", SAME)
def test_the_text_is_what_transformers_renders(name: str) -> None:
    for chat in ("system", "white space", "tools column"):
        messages, tools = CHATS[chat]
        documents: tuple[Document, ...] = outcome(TEMPLATES[name], chat).documents
        if documents:
            assert documents[-1].text in as_transformers_renders(TEMPLATES[name], messages, tools), chat


def test_the_table_of_the_page_is_what_the_code_does() -> None:
    page = chat_table.PAGE.read_text(encoding="utf-8")
    _, written, _ = chat_table.parts_of(page)
    assert len(FILES) >= 72
    assert written == table(), "run ./tools/chat_table"


def test_every_plain_chat_passes_every_template() -> None:
    passing = re.search(r"\*\*pass, of 72\*\* \| (.*) \|$", table(), re.MULTILINE)
    assert passing is not None
    assert [int(count.strip("* ")) for count in passing[1].split("|")] == [72, 72, 70, 72, 72, 72, 48, 44]


def test_the_day_is_fixed_in_every_template_that_tells_it() -> None:
    dated = [name for name, template in TEMPLATES.items() if "strftime_now" in template]
    assert dated
    for name in dated:
        text = outcome(TEMPLATES[name], "one turn").documents[0].text
        assert "2024-01-01" in text or "01 Jan 2024" in text or Path(name).name.startswith("muse")
