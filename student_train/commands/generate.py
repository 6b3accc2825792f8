"""generate: the student goes on from the beginnings of the cache's texts, and what it writes becomes a source.

A teacher that is not there cannot speak to what a student writes. So it is asked in rounds: the student writes, the spare node
scores the new texts (`teacher-cache extend`), the next run learns from old and new (generalised knowledge distillation in batches,
Agarwal et al. 2024; DAgger, Ross et al. 2011).
"""

from pathlib import Path
from typing import Annotated

import typer

from student_train.options import StudentFolder


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
    from student_train.student.generation import Sampling, write_texts

    sampling = Sampling(samples=samples, new_tokens=new_tokens, temperature=temperature, seed=seed, unfinished=unfinished)
    return write_texts(student, cache, out, sampling)


def command(
    student: StudentFolder,
    cache: Annotated[str, typer.Argument(help="The cache whose texts begin its own.", metavar="CACHE")],
    out: Annotated[Path, typer.Option(help="JSON lines of prompt and completion: a source for `teacher-cache extend`.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to begin.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the student while it writes.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Keep texts that were cut off.")] = False,
) -> None:
    """Let a student write, for its teacher to score: the next round's text."""
    found = generate(
        student, cache, out, samples=samples, new_tokens=new_tokens, temperature=temperature, seed=seed, unfinished=unfinished
    )
    typer.echo("  ".join(f"{name}: {count}" for name, count in found.items()))
    if found["special"]:
        typer.echo("some texts hold special tokens: give their source `special_tokens: tokens`", err=True)
