"""align: tell a cache again in another tokenizer's tokens, for students that read with it."""

from typing import TYPE_CHECKING, Annotated

import typer

from student_train.options import AsJson, say

if TYPE_CHECKING:
    from student_train.align.view import View


def align(cache: str | tuple[str, ...], student: str, out: str, processes: int = 1) -> "View":
    """Make the view of a cache in a student's tokens, or go on with it; any number of processes may do so at a time.

    Args:
        student: a folder or hub name with the student's tokenizer.
        out: where the view goes: a folder of its own, or `s3://bucket/prefix`.
    Returns:
        the view.
    Raises:
        InputError: if the tokens of a tokenizer do not say their bytes.
        MismatchError: if too many texts cannot be told in the student's tokens, with the first place that differs; or if another
            view is there.
    """
    from model_taps.loading import load_tokenizer
    from signal_store.cache import open_cache
    from student_train.align.view_maker import make_view

    return make_view(open_cache(cache), load_tokenizer(student), out, processes=processes)


def command(
    cache: Annotated[list[str], typer.Argument(help="The cache, and its overlays.", metavar="CACHE...")],
    student: Annotated[str, typer.Option(help="Folder or hub name of the student, or of its tokenizer.")],
    out: Annotated[str, typer.Option(help="Where the view goes: a folder, or s3://bucket/prefix.")],
    processes: Annotated[int | None, typer.Option(min=1, help="All that this machine has, if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell a cache again in another tokenizer's tokens, for students that read with it. No teacher is needed."""
    from run_kit.cores import usable_cores

    found = align(tuple(cache), student, out, processes or usable_cores())
    facts = {"view": found.uri, "units": len(found.units), "longest": found.longest, **found.rows}
    say(facts, lambda shown: "  ".join(f"{name}: {value}" for name, value in shown.items()), as_json)
