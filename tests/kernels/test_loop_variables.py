"""Variables that a loop hands on among each other (x0, x1 = x1, x2) must not begin as one value: of these Triton's
compiler sees no change, and leaves them as they were. Its interpreter runs Python, which knows better, so that without
a GPU nothing else would show it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def jitted(source: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(line) for line in node.decorator_list):
            yield node


def pairs(assignment: ast.AST) -> list[tuple[str, ast.expr]]:
    """Return the names that are assigned, each with what."""
    if not isinstance(assignment, ast.Assign):
        return []
    (target,), value = assignment.targets, assignment.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return [(name.id, part) for name, part in zip(target.elts, value.elts, strict=True)]
    return [(target.id, value)] if isinstance(target, ast.Name) else []


def aliases(function: ast.FunctionDef) -> set[tuple[str, str]]:
    """Return (a, b) for every a = b in a loop whose names began as one value before it."""
    begun: dict[str, str] = {}
    found = set()

    def walk(statements: list[ast.stmt]) -> None:
        for statement in statements:
            for name, value in pairs(statement):
                begun[name] = begun.get(value.id, value.id) if isinstance(value, ast.Name) else f"{name}, {id(value)}"
            if isinstance(statement, (ast.For, ast.While)):
                for name, value in (pair for inner in ast.walk(statement) for pair in pairs(inner)):
                    of_name = begun.get(name)
                    if isinstance(value, ast.Name) and of_name and of_name == begun.get(value.id, value.id):
                        found.add((name, value.id))
            for field in ("body", "orelse"):
                walk(getattr(statement, field, []))

    walk(function.body)
    return found


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_no_two_begin_as_one_value(path):
    assert {function.name: aliases(function) for function in jitted(path.read_text()) if aliases(function)} == {}


def test_what_does_is_found():
    source = """
@triton.jit
def kernel(at):
    x0 = tl.load(at)
    x1, x2 = x0, x0
    y = 0
    for step in range(3):
        x0, x1, x2 = x1, x2, tl.load(at)
        y = x2
"""
    assert [aliases(function) for function in jitted(source)] == [{("x0", "x1"), ("x1", "x2")}]
