"""generate: the student goes on from the beginnings of the cache's texts, and what it writes becomes a source.

A teacher that is not there cannot speak to what a student writes. So it is asked in rounds: the student writes, the spare node
scores the new texts (`teacher-cache extend`), the next run learns from old and new (generalised knowledge distillation in batches,
Agarwal et al. 2024; DAgger, Ross et al. 2011).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from run_kit.command_line import check_target
from run_kit.progress import progress_bar
from signal_store.cache import Cache, open_cache
from signal_store.errors import InputError
from signal_store.io.local import LocalObjects
from student_train.student.build import build_student
from student_train.student.exact_text import Beginning, ExactText
from student_train.student.sections import StudentSection

BEGINNING = 0.25
"""Share of a plain text that is a prompt."""
LEAST_TOKENS = 4
ROWS = 16


def generate(
    student: Path,
    cache: str | tuple[str, ...],
    out: Path,
    *,
    samples: int = 256,
    new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    unfinished: bool = False,
) -> dict[str, int]:
    """Let a student's folder go on from texts of a cache's train split.

    Prompts: of segments drawn by the seed, the rows before the first that counts, or the first quarter. A completion that does not
    end by itself within `new_tokens` is left out, and counted, unless `unfinished`.

    Args:
        out: JSON lines of prompt and completion; a new file.
        temperature: of the student's distribution, which is drawn from as it is otherwise.
    Returns:
        how many texts were `written`, how many were `unfinished`, `shifted` (cut at a whole character, not where it was asked for),
        `refused` (empty, no text but bytes that are not characters, or a chat's later window) and how many hold `special` tokens:
        their source needs `special_tokens: tokens`.
    Raises:
        InputError: if no text could be written, and for a tokenizer without an end-of-text token.
    Source: Agarwal et al. 2024, section 3, in batches.
    """
    check_target(out)
    if out.exists():
        raise InputError("there is something at this place", expected="a new file", found=out, where="--out")
    opened = open_cache(cache)
    model, tokenizer = build_student(StudentSection(checkpoint=str(student)), opened)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no end-of-text token", expected="one, to know where a text ends", where=student)
    texts = ExactText(tokenizer)
    prompts, counts = _prompts(opened, texts, samples, seed, new_tokens, model.config.get_text_config())
    torch.manual_seed(seed)
    lines: list[str] = []
    with progress_bar() as progress:
        bar = progress.add_task("generate", total=len(prompts), unit="texts")
        for first in range(0, len(prompts), ROWS):
            some = prompts[first : first + ROWS]
            for prompt, written in zip(some, _written(model, [p.ids for p in some], new_tokens, temperature, eos), strict=True):
                finished = written[-1] == eos
                counts["unfinished"] += not finished
                if finished or unfinished:
                    ids = written[:-1] if finished else written
                    lines += _line(texts, prompt, ids, counts, unfinished=unfinished)
            progress.advance(bar, len(some))
    if not lines:
        raise _nothing_written(counts, new_tokens, student)
    LocalObjects(out.parent, scratch=".").put(out.name, "".join(lines).encode())
    return {"written": len(lines), **counts}


def _nothing_written(counts: dict[str, int], new_tokens: int, student: Path) -> InputError:
    return InputError(
        "no text ended by itself" if counts["unfinished"] else "no text could be had byte for byte",
        expected=f"one within {new_tokens} tokens",
        found=", ".join(f"{count} {name}" for name, count in counts.items()),
        where=student,
        remedy="Raise --new-tokens, or keep --unfinished.",
    )


def _line(texts: ExactText, prompt: Beginning, ids: list[int], counts: dict[str, int], *, unfinished: bool) -> list[str]:
    """The line of what was written behind a prompt; none where it is no text."""
    text, cut_off = texts.written(prompt, ids)
    if (cut_off and not unfinished) or not text:
        counts["refused"] += 1
        return []
    counts["shifted"] += prompt.shifted or cut_off
    counts["special"] += texts.spells_special(prompt.text + text)
    return [json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False) + "\n"]


def text_of(found: Mapping[str, int]) -> str:
    """For a terminal: the counts."""
    return "  ".join(f"{name}: {count}" for name, count in found.items())


def hint_of(found: Mapping[str, int]) -> str | None:
    """What follows from them for who goes on, if anything."""
    return "some texts hold special tokens: give their source `special_tokens: tokens`" if found["special"] else None


def _prompts(
    cache: Cache, texts: ExactText, samples: int, seed: int, new_tokens: int, config: object
) -> tuple[list[Beginning], dict[str, int]]:
    """The beginnings, and the counts of `generate` with what could not be one."""
    room = min(getattr(config, "max_position_embeddings", None) or 2**31, cache.manifest.plan.context) - new_tokens
    if room < LEAST_TOKENS:
        raise InputError(
            "no room for a prompt", expected=f"new_tokens of at most {room + new_tokens - LEAST_TOKENS}", found=new_tokens
        )
    units = cache.units("train")
    upto = np.cumsum(cache.segments_per_unit[units])
    if not len(upto):
        raise InputError("the cache has no train split", expected="a source with split: train", where=cache.uri)
    places = np.random.default_rng(seed).choice(int(upto[-1]), size=min(samples, int(upto[-1])), replace=False)
    owner = np.searchsorted(upto, places, side="right")
    starts = [cache.first_segment(int(units[u])) - int(upto[u] - cache.segments_per_unit[units[u]]) for u in range(len(units))]
    drawn = np.asarray([starts[u] + int(place) for u, place in zip(owner, places, strict=True)])
    found: list[Beginning] = []
    refused = 0
    for number in drawn.tolist():
        segment = cache[number]
        rows = slice(segment.token_start, segment.token_start + len(segment))
        counts = np.flatnonzero(cache.read("tokens/loss_mask", rows.start, rows.stop))
        first = segment.context_only  # what stands before is of another place of the document
        if texts.has_marks(segment.input_ids[:first].tolist()):
            refused += 1  # a chat's later window: its system turn, and then the middle of a turn
            continue
        asked = int(counts[0]) + 1 if len(counts) and counts[0] > first else 0
        length = asked or first + max(LEAST_TOKENS, round(BEGINNING * (len(segment) - first)))
        byte_end = cache.read("tokens/byte_end", rows.start, rows.stop)
        # of a long prompt the end, where the question is
        beginning = texts.begin(segment.input_ids.tolist(), byte_end.tolist(), length, room)
        refused += beginning is None
        found += [] if beginning is None else [beginning]
    return found, {"unfinished": 0, "shifted": 0, "refused": refused, "special": 0}


@torch.no_grad()
def _written(model: torch.nn.Module, prompts: list[list[int]], new_tokens: int, temperature: float, eos: int) -> list[list[int]]:
    """Of each prompt, the ids that follow, the end-of-text token last where it came."""
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), eos, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    found = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=eos,
    )[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in found]
