"""fidelity: how much of its teacher a finished student has kept, from the cache's held-out split; no teacher is needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from student_train.options import AsJson, StudentFolder, say


def fidelity_report(
    student: Path, cache: str | tuple[str, ...], max_tokens: int | None = None, *, bf16: bool = False, view: str | None = None
) -> dict[str, Any]:
    """Evaluate a student's folder on the held-out split of a cache, or on its first `max_tokens` tokens.

    Args:
        view: of the cache, for a student with another tokenizer: its loss and its bits per byte are told then, and what can be
            compared of hidden states; not what goes token by token.
    Returns:
        numbers by name; `tokens`: how many labels they are of; `cka` by "<teacher's layer>/<student's layer>".
    Raises:
        MismatchError: if the cache has no validation split or no distribution.
    """
    from student_train.evaluate.fidelity_report import evaluated, facts_of

    return facts_of(evaluated(student, cache, max_tokens, bf16=bf16, view=view))


def command(
    student: StudentFolder,
    cache: Annotated[list[str], typer.Argument(help="A cache with a validation split, and its overlays.", metavar="CACHE...")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Look at so many tokens only.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the student under bfloat16 autocast.")] = False,
    view: Annotated[str | None, typer.Option(help="The cache's view, for a student with another tokenizer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how much of its teacher a student has kept, on held-out text: agreement, overlap, KL, entropy gap, calibration, CKA by
    depth."""
    from student_train.evaluate.fidelity_report import evaluated, facts_of, text_of

    found = evaluated(student, tuple(cache), max_tokens, bf16=bf16, view=view)
    say(found, text_of, as_json, facts_of)
