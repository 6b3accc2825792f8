"""Each extra is enough for its half: its modules import, and its commands run, where what the others bring is not to be found."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.golden.archive import VERSIONS, unpack
from tests.tiny import needs_torch

ROOT = Path(__file__).resolve().parents[2]
BROUGHT_ALONG = {"teacher": {"tokenizers"}, "student": {"tokenizers"}, "base": set[str]()}
"""What an extra does not list, and has by what it lists: transformers needs its tokenizers."""
OF_THE_BASE = {"pygments"}
"""Which rich needs: it is everywhere, though an extra lists it."""

HIDE = """
import importlib, pkgutil, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", lambda context: ())
        return () if (context.name or "").lower().replace("-", "_") in HIDDEN else find(context)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
IMPORT_ALL = """
for name in PACKAGES:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name not in APART:
            importlib.import_module(module.name)
print(len([name for name in sys.modules if name.partition(".")[0] in PACKAGES]))
"""
CALL = """
from importlib import import_module
main = import_module(f"{COMMAND[0]}.cli").main
sys.argv = [COMMAND[0].replace("_", "-"), *COMMAND[1:]]
main()
"""


def packages_of(extra: str) -> set[str]:
    """Modules of the packages that an extra, or of `base` the project itself, lists in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if extra == "base" else project["optional-dependencies"][extra]
    names = {line.partition(">")[0].partition("[")[0].strip().lower().replace("-", "_") for line in lines}
    return names - {"teacher_cache"}


def hidden(extra: str) -> set[str]:
    """Modules that an installation with this extra alone does not have."""
    extras = ("teacher", "student", "inspect", "gpu", "lora", "nlp", "remote", "tensorboard")
    own = BROUGHT_ALONG[extra] | OF_THE_BASE | (packages_of(extra) if extra != "base" else set())
    return {name for other in extras for name in packages_of(other)} - own


def without(names: set[str], code: str, **values: object) -> subprocess.CompletedProcess[str]:
    """A process in which these packages are not to be found, by whoever asks."""
    settings = "".join(f"{name} = {value!r}\n" for name, value in {"HIDDEN": names, **values}.items())
    paths = [str(ROOT), str(ROOT / "shared"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", settings + HIDE + code]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=280, check=False)


def test_the_halves_are_apart() -> None:
    assert {"datasets", "pyarrow", "spacy", "matplotlib", "jinja2"} <= hidden("student")
    assert {"accelerate", "torchdata", "scipy", "spacy", "matplotlib"} <= hidden("teacher")
    assert {"torch", "transformers", "safetensors", "tokenizers"} <= hidden("base")
    assert packages_of("base").isdisjoint(hidden("base"))


@needs_torch
@pytest.mark.parametrize(("extra", "half"), [("teacher", "teacher_cache"), ("student", "student_train")])
def test_every_module_of_a_half_imports_with_its_extra_alone(extra: str, half: str) -> None:
    packages = (half, "signal_store", "signal_view", "model_taps", "run_kit")
    done = without(hidden(extra), IMPORT_ALL, PACKAGES=packages, APART={"signal_view.lazy_array"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80


def test_without_an_extra_a_cache_is_verified(tmp_path: Path) -> None:
    unpack(VERSIONS[-1], tmp_path / "cache.zarr")
    done = without(hidden("base"), CALL, COMMAND=("teacher_cache", "verify", str(tmp_path / "cache.zarr")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "damaged: 0" in done.stdout


@pytest.mark.parametrize(("half", "verb", "extra"), [("teacher_cache", "plan", "teacher"), ("student_train", "explain", "student")])
def test_a_command_says_which_extra_it_lacks(half: str, verb: str, extra: str) -> None:
    recipe = ROOT / "tools/examples/code" / {"teacher": "cache.yaml", "student": "run.yaml"}[extra]
    done = without(hidden("base"), CALL, COMMAND=(half, verb, str(recipe)))
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = done.stderr.splitlines()
    assert "is not installed" in line
    assert f'expected pip install "teacher-cache[{extra}]"' in line


def test_doctor_works_without_an_extra(tmp_path: Path) -> None:
    done = without(hidden("base"), CALL, COMMAND=("teacher_cache", "doctor", "--folder", str(tmp_path), "--json"))
    assert '"name": "commit"' in done.stdout, done.stderr[-2000:]


def test_another_missing_module_is_a_fault_of_ours() -> None:
    code = "from run_kit.command_line import guarded\ndef command():\n    import nothing_of_this_name\nguarded(command)"
    done = without(set(), code)
    assert done.returncode == 1
    assert "No module named 'nothing_of_this_name'" in done.stderr
