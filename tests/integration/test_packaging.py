"""The wheel ships exactly the six import packages, each typed; and nothing named `shared`, `tests` or `tools`."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_six_typed_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"teacher_cache", "student_train", "signal_store", "signal_view", "model_taps", "run_kit"}
    assert {name for name in names if name.endswith("py.typed")} == {f"{package}/py.typed" for package in packages}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_project_never_names_a_machine() -> None:
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    words = ("/root/", "/home/", "/work/")
    guilty = [
        n for n in tracked if n.endswith((".py", ".md", ".toml", ".yaml")) and any(w in (ROOT / n).read_text() for w in words)
    ]
    assert [name for name in guilty if not name.endswith("test_packaging.py")] == []
