"""A cache with every signal, from the demo's teacher: modules of the standard library, questions about its functions, and docstrings as
their summaries. For `tools/sweeps/full_000_ablation.yaml` and the cost of each term. Left in `runs/full`.
"""

import ast
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_taps.loading import load_tokenizer
from run_kit.command_line import guarded, keep_freed_memory
from stdlib_corpus import Module, Split, modules
from teacher_cache.commands.build import build
from teacher_cache.recipe import CacheRecipe

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tools" / "demo_teacher"
OUT = ROOT / "runs" / "full"
CONTEXT = 256
TOKENS: dict[Split, dict[str, int]] = {
    "train": {"code": 240_000, "qa": 40_000, "summary": 40_000},
    "validation": {"code": 24_000, "qa": 4_000, "summary": 4_000},
}


def functions(module: Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module with arguments and a docstring."""
    try:
        tree = ast.parse(module.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.args.args and ast.get_docstring(node):
            yield node


def plain_source(node: ast.FunctionDef) -> str:
    """A function without its docstring."""
    bare = copy.copy(node)
    bare.body, bare.decorator_list = node.body[1:] or [ast.Pass()], []
    return ast.unparse(ast.fix_missing_locations(bare))


def first_line(node: ast.FunctionDef) -> str:
    """Of its docstring."""
    return (ast.get_docstring(node) or "").strip().splitlines()[0]


def questions(module: Module, draw: random.Random) -> Iterator[dict[str, str]]:
    """Heads of three functions with what they do; what does one of them take?"""
    known = list(functions(module))
    draw.shuffle(known)
    for three in zip(known[::3], known[1::3], known[2::3], strict=False):
        heads = "".join(f"def {n.name}({ast.unparse(n.args)}):  # {first_line(n)}\n" for n in three)
        asked = draw.choice(three)
        arguments = ", ".join(a.arg for a in asked.args.args)
        yield {"prompt": f"{heads}# What does {asked.name} take?\n", "completion": f"# {asked.name} takes {arguments}.\n"}


def summaries(module: Module, _draw: random.Random) -> Iterator[dict[str, str]]:
    """A function, and the first line of its docstring."""
    for node in functions(module):
        source = plain_source(node)
        if len(source) < 1500:
            yield {"prompt": f"{source}\n# In short: ", "completion": first_line(node) + "\n"}


def code(module: Module, _draw: random.Random) -> Iterator[dict[str, str]]:
    """Its text."""
    yield {"text": module.text}


MAKERS = {"code": code, "qa": questions, "summary": summaries}


def write_corpus() -> None:
    tokenizer = load_tokenizer(str(TEACHER)).backend_tokenizer
    draw = random.Random(0)
    chosen = [m for m in modules() if not m.is_test]
    draw.shuffle(chosen)
    for split, wanted in TOKENS.items():
        for name, tokens in wanted.items():
            found = 0
            with (OUT / f"{name}-{split}.jsonl").open("w", encoding="utf-8") as file:
                for row in (row for m in chosen if m.split == split for row in MAKERS[name](m, draw)):
                    length = len(tokenizer.encode("".join(row.values())).ids)
                    if found < tokens and (name == "code" or length < CONTEXT):
                        found += length
                        file.write(json.dumps(row) + "\n")


def recipe() -> CacheRecipe:
    sources: list[dict[str, Any]] = []
    for split, wanted in TOKENS.items():
        for name in wanted:
            part = {"name": f"{name}-{split}", "split": split, "jsonl": str(OUT / f"{name}-{split}.jsonl"), "lexer": "python"}
            task = {} if name == "code" else {"task": name, "prompt": "prompt", "completion": "completion"}
            sources.append({**part, **task, "tagger": {"parser": "pygments"}})
    taps = ["block_input", "attention_output", "ffn_input", "ffn_gate", "block_output"]
    return CacheRecipe.model_validate(
        {
            "cache": str(OUT / "cache.zarr"),
            "teacher": {"model": str(TEACHER)},
            "context": CONTEXT,
            "sources": sources,
            "signals": {
                "distribution": {},
                "hidden": {"taps": taps, "rank": 32},
                "attention": {"previous_steps": 3},
                "stats": {},
                "replay": {},
                "evidence": {},
                "coverage": {},
            },
        }
    )


def main() -> None:
    keep_freed_memory()
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "cache.zarr").exists():
        write_corpus()
    print(build(recipe()))


if __name__ == "__main__":
    guarded(main)
