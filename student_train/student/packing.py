"""Whether several segments of a cache may share a row of a student's: probed on the student itself, never assumed."""

from transformers import PreTrainedModel

from model_taps.neighbours import probe
from signal_store.cache import Cache
from signal_store.errors import InputError
from student_train.align.aligned_cache import longest_segment, student_vocabulary


def packs_rows(student: PreTrainedModel, cache: Cache, sequence_length: int, micro_batch_rows: int) -> bool:
    """Whether a segment gets the same states in a row with others as alone.

    Args:
        student: on the device that it will run on.
        sequence_length: tokens of a row.
        micro_batch_rows: rows of the largest forward pass.
    Returns:
        True: rows may hold several segments; False: one each.
    Raises:
        InputError: if neither gives a segment what it gets alone.
    """
    found = probe(
        student,
        student_vocabulary(cache),
        min(longest_segment(cache), sequence_length),  # the stream refuses what is longer
        what="student",
        width=sequence_length,
        most_tokens=sequence_length * micro_batch_rows,
        allowed=("packed", "padded"),
    )
    if found.split_length is not None:
        raise InputError(
            "the student's states depend on the longest segment of a batch",
            expected=f"segments of at most {found.split_length} tokens, or a student without such a rule",
            found=f"segments of up to {longest_segment(cache)} tokens",
            where=f"{student.config.model_type}, its rope_parameters",
            remedy="Give the student's config other rope_parameters, or build the cache with a shorter context.",
        )
    return found.forward == "packed"
