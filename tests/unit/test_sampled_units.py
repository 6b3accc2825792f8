"""Which units calibration reads of a plan, against what each of them holds."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from signal_store.ledger.documents import Document
from signal_store.manifest import SourceIdentity, Split
from teacher_cache.builder.calibration_text import MAX_UNITS_READ, sampled_units
from teacher_cache.builder.plan import Plan
from teacher_cache.builder.unit_staging import SPLITS

Source = tuple[Split, int, int]
"""Its split, its segments, tokens of each."""
SOURCE = st.tuples(st.sampled_from(SPLITS), st.integers(0, 900), st.sampled_from([1, 2, 16]))


def plan_of(sources: list[Source], unit_tokens: int) -> tuple[Document, list[set[str]]]:
    """A plan, and whose segments each of its units holds. Half of a long segment is context, which its source's tokens do not
    count."""
    named = [(str(number), *source) for number, source in enumerate(sources)]
    in_order = [source for wanted in SPLITS for source in named if source[1] == wanted]
    laid = [(name, split, size) for name, split, count, size in in_order for _ in range(count)]
    units: list[dict[str, Any]] = []
    held: list[set[str]] = []
    for name, split, size in laid:
        if not units or units[-1]["split"] != split or units[-1]["tokens"] + size > unit_tokens:
            units.append({"split": split, "segments": 0, "tokens": 0})
            held.append(set())
        units[-1]["segments"] += 1
        units[-1]["tokens"] += size
        held[-1].add(name)
    read = [
        SourceIdentity(
            name=name,
            split=split,
            fingerprint="",
            num_documents=count,
            num_empty_documents=0,
            num_segments=count,
            num_tokens=count * -(-size // 2),
        )
        for name, split, count, size in named
    ]
    return Document({"sources": [source.model_dump(mode="json") for source in read], "units": units}, {}), held


@given(
    generations=st.lists(st.lists(SOURCE, min_size=1, max_size=6), min_size=1, max_size=2), unit_tokens=st.sampled_from([16, 64])
)
def test_every_source_with_tokens_is_met(generations: list[list[Source]], unit_tokens: int) -> None:
    made = [plan_of(sources, unit_tokens) for sources in generations]
    planned = Plan(made[0][0], tuple(document for document, _ in made[1:]))
    held = [{(number, name) for name in names} for number, (_, units) in enumerate(made) for names in units]
    if not held:
        return
    chosen = sampled_units(planned)
    assert set().union(*(held[unit] for unit in chosen)) == set().union(*held)
    assert set(planned.spread_units(MAX_UNITS_READ)) <= set(chosen)
    assert len(chosen) <= MAX_UNITS_READ + sum(map(len, generations))
    if len(held) <= MAX_UNITS_READ:
        assert chosen == list(range(len(held)))


def test_a_source_of_one_segment_between_long_ones_is_met() -> None:
    """Short texts beside windows that overlap: by its share of the tokens it would be looked for elsewhere."""
    document, held = plan_of([("train", 700, 16), ("train", 1, 2), ("train", 900, 1)], 16)
    (unit,) = (number for number, names in enumerate(held) if "1" in names)
    assert unit in sampled_units(Plan(document))
