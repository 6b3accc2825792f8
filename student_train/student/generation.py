"""The texts that a student writes from the beginnings of a cache's."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model_taps.loading import tokenizer_digest
from run_kit.command_line import check_target
from run_kit.progress import progress_bar
from signal_store.cache import Cache, open_cache
from signal_store.errors import InputError
from signal_store.io.local import LocalObjects
from student_train.align.tokenizers import cached_tokenizer
from student_train.student.build import build_student
from student_train.student.exact_text import Beginning, ExactText
from student_train.student.sections import StudentSection

BEGINNING = 0.25
"""Share of a plain text that is a prompt."""
LEAST_TOKENS = 4
ROWS = 16


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many texts are begun, how long a completion may be, and how it is drawn; `unfinished`: whether those cut off are kept."""

    samples: int
    new_tokens: int
    temperature: float
    seed: int
    unfinished: bool


def write_texts(student: Path, cache: str | tuple[str, ...], out: Path, sampling: Sampling) -> dict[str, int]:
    """Write the lines, and count. See `student_train.commands.generate`."""
    check_target(out)
    if out.exists():
        raise InputError("there is something at this place", expected="a new file", found=out, where="--out")
    opened = open_cache(cache)
    model, tokenizer = build_student(StudentSection(checkpoint=str(student)), opened, reads_text=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no end-of-text token", expected="one, to know where a text ends", where=student)
    texts = ExactText(tokenizer)
    same = tokenizer_digest(tokenizer) == opened.manifest.tokenizer.digest
    spoken = texts if same else ExactText(cached_tokenizer(opened))
    prompts, counts = _prompts(opened, spoken, sampling, model.config.get_text_config())
    if not same:
        prompts = _told_again(prompts, texts, _room(opened, sampling, model.config.get_text_config()), counts)
    torch.manual_seed(sampling.seed)
    lines: list[str] = []
    with progress_bar() as progress:
        bar = progress.add_task("generate", total=len(prompts), unit="texts")
        for first in range(0, len(prompts), ROWS):
            some = prompts[first : first + ROWS]
            for prompt, written in zip(some, _written(model, [p.ids for p in some], sampling, eos), strict=True):
                finished = written[-1] == eos
                counts["unfinished"] += not finished
                if finished or sampling.unfinished:
                    ids = written[:-1] if finished else written
                    lines += _line(texts, spoken, prompt, ids, counts, unfinished=sampling.unfinished)
            progress.advance(bar, len(some))
    if not lines:
        raise _nothing_written(counts, sampling.new_tokens, student)
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


def _line(
    texts: ExactText, spoken: ExactText, prompt: Beginning, ids: list[int], counts: dict[str, int], *, unfinished: bool
) -> list[str]:
    """The line of what was written behind a prompt; none where it is no text. `spoken`: of the cache's tokenizer, which will read
    it."""
    text, cut_off = texts.written(prompt, ids)
    if (cut_off and not unfinished) or not text:
        counts["refused"] += 1
        return []
    counts["shifted"] += prompt.shifted or cut_off
    counts["special"] += spoken.spells_special(prompt.text + text)
    return [json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False) + "\n"]


def _prompts(cache: Cache, texts: ExactText, sampling: Sampling, config: object) -> tuple[list[Beginning], dict[str, int]]:
    """The beginnings, and the counts of `write_texts` with what could not be one."""
    samples = sampling.samples
    room = _room(cache, sampling, config)
    units = cache.units("train")
    upto = np.cumsum(cache.segments_per_unit[units])
    if not len(upto):
        raise InputError("the cache has no train split", expected="a source with split: train", where=cache.uri)
    places = np.random.default_rng(sampling.seed).choice(int(upto[-1]), size=min(samples, int(upto[-1])), replace=False)
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


def _room(cache: Cache, sampling: Sampling, config: object) -> int:
    """Tokens that a prompt may have."""
    whole = min(getattr(config, "max_position_embeddings", None) or 2**31, cache.manifest.plan.context)
    if whole - sampling.new_tokens < LEAST_TOKENS:
        raise InputError(
            "no room for a prompt", expected=f"new_tokens of at most {whole - LEAST_TOKENS}", found=sampling.new_tokens
        )
    return whole - sampling.new_tokens


def _told_again(prompts: list[Beginning], texts: ExactText, room: int, counts: dict[str, int]) -> list[Beginning]:
    """The same texts in the student's tokens; those that take more than there is room for are refused, and counted."""
    found = [
        beginning for prompt in prompts if (beginning := texts.of_text(prompt.text, prompt.shifted)) and len(beginning.ids) <= room
    ]
    counts["refused"] += len(prompts) - len(found)
    return found


@torch.no_grad()
def _written(model: torch.nn.Module, prompts: list[list[int]], sampling: Sampling, eos: int) -> list[list[int]]:
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
        max_new_tokens=sampling.new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=eos,
    )[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in found]
