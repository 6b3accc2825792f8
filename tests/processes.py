"""Processes of their own for tests that need them, without importing torch and the rest anew in each, which takes seconds."""

import importlib
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["student_train.session.training", "teacher_cache.builder.session", "teacher_cache.builder.seal"]
OURS = ("teacher_cache", "student_train", "signal_store", "signal_view", "model_taps", "run_kit")


def fresh() -> ForkServerContext:
    """Processes that share with this one only what is pickled, as spawned ones do: forks of a server that has imported our packages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def say_into(log: Path) -> None:
    """In a fork: all that it says from now on goes into a file."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # pytest has put its own in their places
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def run_copy(sources: Path, module: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and words of a command whose source lies in a folder: a fork of this process that forgets our packages, and imports
    them from there."""
    log = sources / f".log-{module}"
    child = multiprocessing.get_context("fork").Process(target=_command, args=(sources, module, arguments, log))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode, log.read_text()


def _command(sources: Path, module: str, arguments: list[str], log: Path) -> None:
    say_into(log)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:0] = [str(sources), str(sources / "shared")]
    importlib.invalidate_caches()
    sys.argv = [module, *arguments]
    command = importlib.import_module(f"{module}.cli")
    assert str(command.__file__).startswith(str(sources)), command.__file__
    os.chdir(sources)
    command.main()
