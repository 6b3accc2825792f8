"""The tools' own scripts: what they ask of their command line is there. Nobody runs the long ones here."""

import ast
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = sorted(path for path in TOOLS.rglob("*.py") if "add_argument" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_argument_that_a_script_reads_is_one_that_it_takes(script: Path) -> None:
    tree = ast.parse(script.read_text())
    taken = {"__dict__"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            named = next((k.value.value for k in call.keywords if k.arg == "dest" and isinstance(k.value, ast.Constant)), None)
            first = call.args[0]
            taken.add(str(named or (first.value if isinstance(first, ast.Constant) else "")).lstrip("-").replace("-", "_"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert read <= taken
