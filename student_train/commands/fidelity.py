"""fidelity: how much of its teacher a finished student has kept, from the cache's held-out split; no teacher is needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from student_train.options import AsJson, StudentFolder, say


def fidelity_report(
    student: Path, cache: str | tuple[str, ...], max_tokens: int | None = None, *, bf16: bool = False
) -> dict[str, Any]:
    """Evaluate a student's folder on the held-out split of a cache, or on its first `max_tokens` tokens.

    Returns:
        numbers by name; `tokens`: how many labels they are of; `cka` by "<teacher's layer>/<student's layer>".
    Raises:
        MismatchError: if the cache has no validation split or no distribution.
    """
    from student_train.evaluate.fidelity_report import evaluated, facts_of

    return facts_of(evaluated(student, cache, max_tokens, bf16=bf16))


def command(
    student: StudentFolder,
    cache: Annotated[list[str], typer.Argument(help="A cache with a validation split, and its overlays.", metavar="CACHE...")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Look at so many tokens only.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the student under bfloat16 autocast.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how much of its teacher a student has kept, on held-out text: agreement, overlap, KL, entropy gap, calibration, CKA by
    depth."""
    from student_train.evaluate.fidelity_report import evaluated, facts_of, text_of

    found = evaluated(student, tuple(cache), max_tokens, bf16=bf16)
    say(found, text_of, as_json, facts_of)
