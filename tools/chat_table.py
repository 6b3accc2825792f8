"""The table of docs/chats.md: each chat template that trl ships, each kind of chat, how it is cached or why it is refused."""

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from signal_store.errors import InputError
from teacher_cache.corpus.chat import render_chat
from teacher_cache.corpus.document import Document

PAGE = Path(__file__).parent.parent / "docs" / "chats.md"
BEGIN, END = "<!-- made by tools/chat_table -->", "<!-- end of the table -->"
SPECIAL = re.compile(r"<[|｜][^<>\s]+>|<[^<>\s]+[|｜]>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|</s>")
"""What the families' tokenizers have as special tokens, as templates spell it."""


def turn(role: str, content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}}]
ONE = [turn("user", "Why?"), turn("assistant", "Because.")]
CALLING = [
    turn("user", "Is it raining in Paris?"),
    turn("assistant", None, tool_calls=[CALL]),
    turn("tool", "Rain.", tool_call_id="call00001", name="weather"),
    turn("assistant", "Yes, it rains."),
]
CHATS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": (ONE, None),
    "two turns": ([*ONE, turn("user", "And then?"), turn("assistant", "Nothing more.")], None),
    "system": ([turn("system", "Be brief."), *ONE], None),
    "reasoning": (
        [
            turn("user", "Why?"),
            turn("assistant", "Because.", reasoning_content="Let me see."),
            turn("user", "And then?"),
            turn("assistant", "Nothing more.", reasoning_content="A hard one."),
        ],
        None,
    ),
    "white space": ([turn("user", "  Why? \n"), turn("assistant", "\n\n Because.  \n")], None),
    "parts": ([turn(m["role"], [{"type": "text", "text": m["content"]}]) for m in ONE], None),
    "tool call": (CALLING, None),
    "tools column": (CALLING, TOOLS),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a chat: its documents, or the reason why there are none."""

    documents: tuple[Document, ...]
    reason: str = ""

    @property
    def words(self) -> str:
        """What a cell of the table says of its documents."""
        parts = [document.chat for document in self.documents if document.chat is not None]
        unseen = " †" if any(part.unseen_reasoning for part in parts) else ""
        return ("whole" if parts[0].whole else f"{len(parts)} texts") + unseen


def template_files() -> list[Path]:
    """The templates of the installed trl, found without importing it."""
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        sys.exit("trl is not installed: pip install --no-deps trl==1.16.0")
    return sorted((Path(found.submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))


@functools.cache
def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that knows the special tokens which a template spells."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    return tokenizer


@functools.cache
def outcome(template: str, chat: str) -> Outcome:
    messages, tools = CHATS[chat]
    try:
        return Outcome(render_chat(tokenizer_for(template), messages, tools, where="the chat"))
    except InputError as error:
        return Outcome((), reason(error))


def reason(error: InputError) -> str:
    """In the words of a reader, without the place."""
    if "leaves out the tools" in error.what:
        return "the template never shows the schemas of tools (without the column the chat passes as in the column before)"
    if "leaves out what" in error.what:
        return "the template never shows the " + ("call of the tool" if "call" in str(error.found) else f"text: {error.found}")
    return f"{error.what}: “{error.found}”"


def table() -> str:
    """The table as Markdown, reasons below it."""
    reasons: list[str] = []
    rows, passed = [], dict.fromkeys(CHATS, 0)
    files = template_files()
    for path in files:
        cells = []
        for chat in CHATS:
            found = outcome(path.read_text(encoding="utf-8"), chat)
            if not found.documents and found.reason not in reasons:
                reasons.append(found.reason)
            passed[chat] += bool(found.documents)
            cells.append(found.words if found.documents else f"({reasons.index(found.reason) + 1})")
        rows.append(f"| {path.stem} | {' | '.join(cells)} |")
    lines = [
        BEGIN,
        "",
        f"| trl {version('trl')} | {' | '.join(CHATS)} |",
        f"|---|{'---|' * len(CHATS)}",
        f"| **pass, of {len(files)}** | {' | '.join(f'**{count}**' for count in passed.values())} |",
        *rows,
        "",
        *(f"({number}) {text}.  " for number, text in enumerate(reasons, start=1)),
        "",
        END,
    ]
    return "\n".join(lines)


def parts_of(page: str) -> Iterator[str]:
    """The page before its table, the table, and the page after."""
    before, rest = page.split(BEGIN)
    inside, after = rest.split(END)
    yield from (before, BEGIN + inside + END, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 where the page is not what would be written"
    )
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = parts_of(page)
    wanted = before + table() + after
    if parser.parse_args().check:
        sys.exit(int(wanted != page))
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
