"""The messages of a row, in one form: text as strings, calls of tools as objects, nothing that a table format added.

What a template reads is another matter: `Dialect` says in which of the forms in use it is given the same chat.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from signal_store.errors import InputError

Message = dict[str, Any]
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; templates read the first, gpt-oss the second."""
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
ROLE = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class Dialect:
    """In which form a template is given a chat: texts as a string or a list of parts; a turn without text without the field, with
    null or with an empty one; the arguments of a call as an object or as its JSON."""

    content: Literal["string", "parts"]
    nothing: Literal["absent", "null", "empty"]
    arguments: Literal["object", "json"]

    def spoken(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in this form."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        found = dict(message)
        content = found.pop("content", None)
        if content is not None:
            found["content"] = self._form(content)
        elif self.nothing != "absent":
            found["content"] = None if self.nothing == "null" else self._form("")
        if "tool_calls" in found and self.arguments == "json":
            found["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
                }
                for call in found["tool_calls"]
            ]
        return found

    def _form(self, text: str) -> Any:
        return text if self.content == "string" else [{"type": "text", "text": text}]


def dialects(messages: Sequence[Message]) -> Iterator[Dialect]:
    """Those in which this chat is worth trying, the most common first."""
    calls = any("tool_calls" in message for message in messages)
    silent = any("content" not in message for message in messages)
    for content, arguments, nothing in product(
        ("string", "parts"), ("object", "json") if calls else ("object",), ("absent", "null", "empty") if silent else ("absent",)
    ):
        yield Dialect(content, nothing, arguments)  # type: ignore[arg-type]


def parse_messages(raw: Sequence[Any], where: str) -> list[Message]:
    """A row's messages: `role`, `content` (a string, or no such key), `reasoning_content` and `thinking`, `tool_calls` as
    {type, id, function: {name, arguments}}, and what else they hold. InputError for what is no chat."""
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in raw):
        raise InputError("not a chat", expected="a list of messages with role and content", found=str(raw)[:80], where=where)
    found = [_message(dict(message), f"{where}, turn {number}") for number, message in enumerate(raw)]
    if not any(message["role"] == "assistant" for message in found):
        raise InputError(
            "a chat has no answer of the assistant",
            expected="a message whose role is assistant",
            found=f"roles {', '.join(dict.fromkeys(message['role'] for message in found)) or 'none'}",
            where=where,
            remedy="Rename the roles, or leave out chats that nobody answers.",
        )
    return found


def parse_tools(raw: Any, where: str) -> list[Any] | None:
    """The `tools` of a row: a list of schemas, each an object or its JSON, or the JSON of them all; None where there are none."""
    tools = _from_json(raw, "tools", where) if isinstance(raw, str) and raw.strip() else raw
    if not tools:
        return None
    if not isinstance(tools, list):
        raise InputError("tools are not a list", expected="a list of schemas", found=type(tools).__name__, where=where)
    found = [without_nulls(_from_json(tool, "tools", where) if isinstance(tool, str) else tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in found):
        raise InputError("a tool is not a schema", expected="an object", found=str(found)[:80], where=where)
    return found


def without_nulls(value: Any) -> Any:
    """Less the fields of objects that hold null: tables add them where another row's object has a field. Maps become objects."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return without_nulls(dict(value))
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _message(raw: Message, where: str) -> Message:
    if not ROLE.fullmatch(raw["role"]):
        raise InputError("a role is not a word", expected="user, assistant, system, tool", found=raw["role"][:80], where=where)
    content, thought = _text(raw.pop("content", None), where)
    thoughts = [raw.pop(name, None) for name in REASONING_FIELDS]
    reasoning = next((text for text in (*thoughts, thought) if text), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise InputError("reasoning is not text", expected="a string", found=type(reasoning).__name__, where=where)
    calls = _calls(raw.pop("tool_calls", None), raw.pop("function_call", None), where)
    message: Message = {"role": raw.pop("role")}
    if content is not None and (content or not calls):
        message["content"] = content
    if reasoning is not None:
        message |= {"reasoning_content": reasoning, "thinking": reasoning}
    if calls:
        message["tool_calls"] = calls
    return {**message, **without_nulls(raw)}


def _text(content: Any, where: str) -> tuple[str | None, str | None]:
    """What a content says, and what it says of thoughts."""
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        raise InputError("a content is not text", expected="a string or a list of parts", found=type(content).__name__, where=where)
    said: list[str] = []
    thought: list[str] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else without_nulls(part)
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get(kind, part.get("content"))) if isinstance(part, dict) else None
        if kind not in TEXT_PARTS + THOUGHT_PARTS or not isinstance(text, str):
            raise InputError("a part of a content is not text", expected="parts of type text", found=str(part)[:80], where=where)
        (thought if kind in THOUGHT_PARTS else said).append(text)
    return "".join(said), "".join(thought) or None


def _calls(raw: Any, old: Any, where: str) -> list[dict[str, Any]]:
    calls = _from_json(raw, "tool_calls", where) if isinstance(raw, str) and raw.strip() else raw
    if old is not None:
        calls = [*(calls or []), old]
    if not calls:
        return []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = without_nulls(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError("a call of a tool has no name", expected="{name, arguments}", found=str(call)[:80], where=where)
        given = function.get("arguments", {})
        arguments = _from_json(given, "arguments", where) if isinstance(given, str) and given.strip() else given or {}
        if not isinstance(arguments, dict):
            raise InputError("arguments are not an object", expected="{...} or its JSON", found=str(given)[:80], where=where)
        rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
        found.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _from_json(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} are not JSON", found=error, where=where) from error
