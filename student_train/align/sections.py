"""How a recipe says where the view of a cache lies, for a student with another tokenizer. This file does not import torch."""

from pydantic import Field

from signal_store.format.section import Section


class AlignSection(Section):
    """Read the cache through a view in the student's own tokens; where the tokenizers differ, it is so without this section too."""

    view: str | None = None
    """Where the view is, or is to be: a folder or `s3://bucket/prefix`; None: `view` in the run's folder."""
    least_share: float = Field(0.3, ge=0, le=1)
    """A term is refused that says something of a smaller share of the student's rows."""
