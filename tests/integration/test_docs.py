"""Every command and every block of code of the documentation is run here, page by page, in the order in which it stands.

A fenced block with a title is a file of that name. Without one, `bash` is run line by line (our own commands in this process, which
spares importing torch for each), `python` in one namespace a page. A line that ends in `# exit code 2` must end so. The page
on extending is run in a copy of the source.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from typer.testing import CliRunner

from signal_store.errors import SignalStoreError
from signal_view.extras import pyplot
from student_train.cli import app as student_app
from student_train.losses import registry
from teacher_cache.cli import app as teacher_app
from tests.processes import run_copy
from tests.tiny import CODE, PROSE, make_model, make_tokenizer, write_jsonl

mpl.use("agg")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
APPS = {"teacher-cache": teacher_app, "student-train": student_app}
MODULES = {"teacher-cache": "teacher_cache.cli", "student-train": "student_train.cli"}
ON_A_CACHE = (
    "many-students",
    "another-tokenizer",
    "looking",
    "choosing",
    "losses",
    "troubleshooting",
    "format",
    "extending",
    "comparison",
)
ON_A_COPY = {"extending"}
PACKAGES = ("teacher_cache", "student_train", "shared")
SHIM = '#!/bin/sh\nexec "{python}" -m {module} "$@"\n'
SBATCH = '#!/bin/sh\nfor i in 0 1; do SLURM_ARRAY_TASK_ID=$i bash "$1" || exit 1; done\n'
"""What stands for Slurm: the array's tasks, one after the other."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    title: str
    text: str


def blocks_of(page: str) -> Iterator[Block]:
    text = (DOCS / f"{page}.md").read_text()
    for match in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", match[3])


PAGES = sorted(str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a model, texts."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    make_model("llama", len(tokenizer), scale=8.0, max_position_embeddings=256).save_pretrained(folder / "my-teacher")
    tokenizer.save_pretrained(folder / "my-teacher")
    (folder / "src").mkdir()
    for number in range(12):
        (folder / "src" / f"part_{number}.py").write_text(f"# part {number}\n" + "\n\n".join(CODE) * 2)
    write_jsonl(folder / "held-out.jsonl", [f"# held out {n}\n{text}" for n in range(4) for text in (*CODE, PROSE[1])])
    return folder


@pytest.fixture(scope="module")
def after_quick_start(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cache, its recipes, its run: what other pages go on from."""
    folder = tmp_path_factory.mktemp("begun") / "work"
    shutil.copytree(material, folder)
    wanted = ("cache.yaml", "run.yaml", "teacher-cache build", "student-train run")
    run_page("quick-start", folder, only=wanted)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not any(True for _ in blocks_of(page)):
        assert page.startswith("decisions/") or page in ("index", "api", "families", "results")
        return
    begun = request.getfixturevalue("after_quick_start" if page in ON_A_CACHE else "material")
    folder = tmp_path / "work"
    shutil.copytree(begun, folder)
    if page == "extending":
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(folder / "runs")
    run_page(page, folder, here=page not in ON_A_COPY)


def run_page(page: str, folder: Path, *, only: tuple[str, ...] = (), here: bool = True) -> None:
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks_of(page):
            if block.title:
                if not only or block.title in only:
                    Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.title).write_text(block.text)
            elif block.kind == "bash":
                for line in block.text.splitlines():
                    if not only or line.startswith(only):
                        run_line(line, block, folder, here=here)
            elif block.kind == "python" and not only:
                exec(compile(block.text, f"{page}.md, line {block.line}", "exec"), names)
                pyplot().close("all")
            elif block.kind != "text":
                assert only, f"{page}.md, line {block.line}: nobody runs a block of {block.kind}"
    finally:
        os.chdir(before)


def run_line(line: str, block: Block, folder: Path, *, here: bool) -> None:
    expected = int(found[1]) if (found := re.search(r"# exit code (\d)$", line)) else 0
    words = shlex.split(line, comments=True)
    said: Any
    if not here and words and words[0] in APPS:
        code, said = run_copy(folder, MODULES[words[0]].partition(".")[0], words[1:])
    elif words and words[0] in APPS:
        result = CliRunner().invoke(APPS[words[0]], words[1:])
        code = 2 if isinstance(result.exception, SignalStoreError) else result.exit_code
        said = result.output if result.exception is None or code == expected else (result.output, result.exception)
    else:
        done = subprocess.run(
            ["bash", "-c", line], check=False, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=250
        )
        code, said = done.returncode, done.stdout + done.stderr
    assert code == expected, f"{block.page}.md, line {block.line}: {line}\n{said}"


def environment(folder: Path) -> dict[str, str]:
    """Commands of this checkout, or of the copy in the folder; and what stands for Slurm."""
    tools = folder / ".bin"
    tools.mkdir(exist_ok=True)
    scripts = {name: SHIM.format(python=sys.executable, module=module) for name, module in MODULES.items()} | {"sbatch": SBATCH}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    here = folder if (folder / "teacher_cache").is_dir() else ROOT
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": f"{here}{os.pathsep}{here / 'shared'}", "OMP_NUM_THREADS": "1"}


def test_every_term_has_its_line() -> None:
    text = (DOCS / "losses.md").read_text()
    for name in registry.terms():
        assert f"`{name}`" in text, name


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "plot_top" in (tmp_path / "site" / "api" / "index.html").read_text()
