"""The one file that knows what accelerate keeps for a whole process, which it does not promise."""

from accelerate.state import AcceleratorState


def forget_precision() -> None:
    """Let the process have an accelerator of another precision than its last one's, as a notebook does: accelerate refuses that."""
    AcceleratorState._reset_state()  # noqa: SLF001  (accelerate has no other word for it)
