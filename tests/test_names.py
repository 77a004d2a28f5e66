"""Names say what a value is: words that only say where it came from are no names."""

import ast
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fxstream"
EMPTY_WORDS = {
    "asked", "data", "found", "given", "gone", "held", "info", "known", "own", "stuff", "there", "thing", "told",
    "tmp", "wanted",
}  # fmt: skip


def empty_names(source: str) -> list[str]:
    """The variables, arguments, functions, classes and fields of a file that are named by an empty word."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append(node.attr)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
    return [name for name in names if name.strip("_") in EMPTY_WORDS]


@pytest.mark.parametrize("path", [str(p.relative_to(PACKAGE)) for p in sorted(PACKAGE.rglob("*.py"))])
def test_names_say_what_a_value_is(path):
    assert empty_names((PACKAGE / path).read_text(encoding="utf-8")) == []


def test_empty_names_are_seen():
    source = inspect.cleandoc("""
        class Thing:
            known: int = 0

            def told(self, given, *held, **wanted):
                found = self.fields = [own for own in given]
                self._there = found
    """)
    assert sorted(empty_names(source)) == ["_there", "found", "given", "held", "known", "own", "told", "wanted"]
