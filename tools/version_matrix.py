"""The storage tests (`pytest -m storage`) with the lowest and the newest versions that pyproject.toml admits, on each Python.

Policy: an environment has what these tests need and no more; it lies in .matrix/ and is made anew where its list of versions changes,
`newest` once a day. `lowest` must hold the very floors of pyproject.toml, or it fails: a floor that nothing can install is no floor.
torch is taken only as a build for CPUs: the floor (or the newest) from `--torch-index`, else the one of tools/constraints.txt; where
there is none, tests that build caches are left out, and the table says so. Only the standard library is imported here.
"""

import argparse
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
RESULT = ROOT / "tools" / "matrix-result"
PYTHONS = ("3.11", "3.12", "3.13")
SETS = ("lowest", "newest")
TEST_TOOLS = {
    "diskcache",
    "flask",
    "flask-cors",
    "hypothesis",
    "moto",
    "obstore",
    "pandas",
    "pytest",
    "pytest-timeout",
    "tensorstore",
}
INSPECTED = {"tokenizers", "xarray"}
"""Of the extra `inspect`, what these tests need."""
NEED_TORCH = {"torch", "torchdata", "accelerate"}
SHOWN = (
    "torch",
    "transformers",
    "tokenizers",
    "zarr",
    "numcodecs",
    "numpy",
    "pydantic",
    "pyarrow",
    "xarray",
    "obstore",
    "tensorstore",
)
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Result:
    """One environment: what was installed, and what its tests said. `seconds` of the tests, `install_seconds` before them."""

    environment: str
    python: str
    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int
    seconds: float
    install_seconds: float
    failures: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Tests ran, and none failed."""
        return self.passed > 0 and not self.failures


def requirements() -> dict[str, str]:
    """By name, what the storage tests need of pyproject.toml, as it is written there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    others = [line for lines in extras.values() for line in lines if name_of(line) in TEST_TOOLS | INSPECTED]
    return {name_of(line): line for line in (*project["dependencies"], *extras["teacher"], *extras["student"], *others)}


def name_of(requirement: str) -> str:
    """`moto[s3]>=5.1` is `moto`."""
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0]


def floor_of(requirement: str) -> str | None:
    """The lowest version that a requirement admits."""
    found = re.search(r">=\s*([0-9.]+)", requirement)
    return found and found[1]


def same_version(one: str, other: str) -> bool:
    """Whether two versions differ by trailing zeros or a build's label only."""

    def plain(version: str) -> str:
        return re.sub(r"(\.0)+$", "", version.partition("+")[0])

    return plain(one) == plain(other)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """A command whose words are kept."""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)  # type: ignore[call-overload,no-any-return]


def find_python(version: str) -> str | None:
    """An interpreter of this version: on the path, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, kept.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        if candidate and run([candidate, "-c", "import venv"]).returncode == 0:
            return candidate
    return None


def uv() -> str:
    """The installer: it finds lowest versions too, and environments share the files of its cache."""
    program = FOLDER / "uv" / "bin" / "uv"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "uv"], check=True)
        subprocess.run([FOLDER / "uv" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(program)


def install_torch(python: str, which: str, index: str | None) -> bool:
    """Install a torch for CPUs: of the index at the floor or the newest, else the pinned one; False where there is none."""
    pinned = re.search(r"^torch==([0-9.]+)", (ROOT / "tools" / "constraints.txt").read_text(), re.MULTILINE)
    floor = floor_of(requirements()["torch"])
    wanted = [["--index-url", index, "torch" if which == "newest" else f"torch=={floor}"]] if index else []
    wanted += [[f"torch=={pinned[1]}+cpu"]] if pinned else []  # a build that is labelled so never asks for CUDA
    return any(run([python, "-m", "pip", "install", "--quiet", "--no-deps", *words]).returncode == 0 for words in wanted)


def make_environment(environment: str, base: str, which: str, index: str | None) -> str:
    """The environment's Python, with all installed; RuntimeError with the installer's words where that fails."""
    needed = requirements()
    day = dt.date.today().isoformat() if which == "newest" else ""
    key = zlib.crc32(json.dumps([needed, index, day, base]).encode())
    folder = FOLDER / environment
    python, stamp = str(folder / "bin" / "python"), folder / f".installed-{key:08x}"
    if stamp.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    if (made := run([base, "-m", "venv", str(folder)])).returncode:
        raise RuntimeError(made.stderr)
    if install_torch(python, which, index):
        needed["torch"] = f"torch=={versions_in(python)['torch'].partition('+')[0]}"
    else:
        needed = {name: line for name, line in needed.items() if name not in NEED_TORCH}
    words = ["--resolution", "lowest-direct" if which == "lowest" else "highest", "--only-binary", ":all:"]
    environ = {**os.environ, "UV_CACHE_DIR": str(FOLDER / "uv-cache")}
    done = run([uv(), "pip", "install", "--quiet", "--python", python, *words, *needed.values()], env=environ)
    if done.returncode == 0:  # the project itself: its records name its version
        done = run([uv(), "pip", "install", "--quiet", "--python", python, "--no-deps", "--editable", "."], env=environ)
    if done.returncode:
        raise RuntimeError(done.stderr)
    stamp.touch()
    return python


def versions_in(python: str) -> dict[str, str]:
    """Installed versions by name, lower case."""
    code = "import json; from importlib.metadata import distributions as d; print(json.dumps({x.name.lower(): x.version for x in d()}))"
    found: dict[str, str] = json.loads(run([python, "-c", code]).stdout)
    return dict(sorted(found.items()))


def storage_files(*, with_torch: bool) -> tuple[list[str], tuple[str, ...]]:
    """Test files marked `storage`, and those among them that are left out: all their tests need torch."""
    found: list[str] = []
    left_out: list[str] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "pytest.mark.storage" not in text:
            continue
        is_without = not with_torch and re.search(r"^pytestmark = .*\bneeds_torch\b", text, re.MULTILINE)
        (left_out if is_without else found).append(str(path.relative_to(ROOT)))
    return found, tuple(left_out)


def missed_floors(versions: dict[str, str]) -> list[str]:
    """Floors that the lowest environment does not hold; torch's is the index's affair and the table says which it was."""
    missed = []
    for name, line in requirements().items():
        floor, found = floor_of(line), versions.get(name.lower())
        if name != "torch" and floor and found and not same_version(floor, found):
            missed.append(f"the floor of {name} is {floor}; the lowest that installs is {found}")
    return missed


def try_environment(environment: str, which: str, base: str, index: str | None) -> Result:
    """Make the environment if need be, run its tests, read what they said."""
    start = time.monotonic()
    python_version = environment.partition("-")[0]
    try:
        python = make_environment(environment, base, which, index)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:600]
        return Result(environment, python_version, {}, 0, 1, 0, 0.0, time.monotonic() - start, (f"not installed: {words}",), ())
    versions = versions_in(python)
    files, left_out = storage_files(with_torch="torch" in versions)
    installed = time.monotonic()
    report = FOLDER / f"{environment}.xml"
    report.unlink(missing_ok=True)
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'shared'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "-m", "storage", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    done = run(command, env=environ, timeout=TIMEOUT_SECONDS)
    (FOLDER / f"{environment}.log").write_text(done.stdout + done.stderr)
    passed, skipped, failures = outcomes(report)
    if done.returncode and not failures:
        failures = [f"pytest ended with {done.returncode}: {done.stderr.strip()[-600:] or done.stdout.strip()[-600:]}"]
    if which == "lowest":
        failures += missed_floors(versions)
    seconds, install = time.monotonic() - installed, installed - start
    interpreter = run([python, "-c", "import platform; print(platform.python_version())"]).stdout.strip()
    return Result(environment, interpreter, versions, passed, len(failures), skipped, seconds, install, tuple(failures), left_out)


def outcomes(report: Path) -> tuple[int, int, list[str]]:
    """Passed, skipped, and the failed tests' names with their first line."""
    if not report.exists():
        return 0, 0, []
    passed, skipped, failures = 0, 0, []
    for case in ET.parse(report).iter("testcase"):
        wrong = [part for part in case if part.tag in ("failure", "error")]
        if wrong:
            first = (wrong[0].get("message") or "").splitlines() or [""]
            failures.append(f"{case.get('classname')}.{case.get('name')}: {first[0][:200]}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def table(results: list[Result], absent: list[str]) -> str:
    """The results as text: counts first, then versions, then what failed and what was left out."""
    width = max(len(r.environment) for r in results)
    head = f"{'environment':{width}}  {'Python':8} {'passed':>6} {'failed':>6} {'skipped':>7} {'s':>5}"
    lines = [head]
    for r in results:
        counts = f"{r.passed:6} {r.failed:6} {r.skipped:7} {r.seconds:5.0f}"
        lines.append(f"{r.environment:{width}}  {r.python:8} {counts}")
    lines.append("")
    lines += [f"{name:12}" + "".join(f" {r.versions.get(name, '-'):>11}" for r in results) for name in SHOWN]
    lines.append(f"{'':12}" + "".join(f" {r.environment:>11}" for r in results))
    for r in results:
        lines += [f"{r.environment}: FAILED {failure}" for failure in r.failures]
        if r.left_out:
            lines.append(f"{r.environment}: no torch for CPUs on this Python here; left out: {', '.join(r.left_out)}")
    lines += [f"Python {version}: no interpreter here" for version in absent]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this Python; may be repeated")
    parser.add_argument("--set", action="append", choices=SETS, dest="sets", help="only these versions; may be repeated")
    parser.add_argument("--torch-index", help="index that has torch for CPUs at the floor and the newest")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}.txt and .json")
    chosen = parser.parse_args()
    wanted = {version: find_python(version) for version in chosen.python or PYTHONS}
    pairs: list[tuple[str, str, str]] = [
        (f"{v}-{which}", which, base) for v, base in wanted.items() if base for which in chosen.sets or SETS
    ]
    absent = [version for version, base in wanted.items() if base is None]
    if not pairs:
        print(f"no Python of {', '.join(absent)} is here", file=sys.stderr)
        return 2
    uv()
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda of: try_environment(of[0], of[1], of[2], chosen.torch_index), pairs))
    text = table(results, absent)
    print(text, end="")
    if chosen.write:
        day = dt.date.today().isoformat()
        RESULT.with_suffix(".txt").write_text(f"{day}, {os.cpu_count()} cores, {sys.platform}\n\n{text}")
        RESULT.with_suffix(".json").write_text(json.dumps({"date": day, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    good = sum(r.passed for r in results), sum(r.failed for r in results), sum(r.skipped for r in results)
    print(f"matrix: {good[0]} passed, {good[1]} failed, {good[2]} skipped")
    return 0 if all(r.is_good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
