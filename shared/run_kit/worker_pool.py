"""Processes that work on pieces of one job, and end with the process that began it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def worker_pool(processes: int, begin: Callable[..., None], arguments: tuple[Any, ...]) -> ProcessPoolExecutor:
    """So many processes, each of which begins with `begin(*arguments)`; its module is imported once, for all. All but
    `if __name__ == "__main__":` of a script of your own runs in each."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["__main__", begin.__module__])
    return ProcessPoolExecutor(processes, context, _begin, (begin, arguments))


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    begin(*arguments)


def _end_with_the_first() -> None:
    """A process whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
