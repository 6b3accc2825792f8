"""What a training process on a CPU asks of its memory allocator."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Tell glibc to keep freed buffers: fresh pages for every chunk of logits made a CPU step a third slower (measured).

    It is a setting of the whole process, so no import and no function of this library makes it: our commands do, and a script or
    notebook that trains through Python may, once, at its start.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((m_mmap_threshold, 2**30), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**27)):
            libc.mallopt(option, value)
