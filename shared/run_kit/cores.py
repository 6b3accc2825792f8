"""The cores of this machine that this process may use."""

import os


def usable_cores() -> int:
    """Cores that this process may use: not all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
