"""Imports go downwards, and sympy and rich stay in their files; the check itself is shown to fail."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fxstream"
FLOORS = (
    ("errors", "box", "allocation"),
    ("units", "operators", "source", "device", "transfer"),
    ("receptive_field", "sink", "sharing"),
    ("interpolation",),
    ("rules", "functional", "sizes", "freeze", "zoo"),
    ("mode", "inputs"),
    ("export",),
    ("capture",),
    ("locality",),
    ("demand", "request", "algebra", "saved", "host_memory"),
    ("grid", "excerpt", "closed_form", "cost", "folding", "lowering", "padding"),
    ("segment_plan", "economy"),
    ("order", "passes"),
    ("prediction",),
    ("boundaries",),
    ("search",),
    ("planning", "tile_program"),
    ("stream",),
    ("reading", "sums"),
    ("runtime",),
    ("rewrite", "analysis", "findings"),
    ("strip",),
    ("poison", "tile_values"),
    ("probe",),
    ("progress",),
    ("compiler", "summary"),
    ("check", "bench", "target", "inference", "lsuv", "backend"),
    ("comparison",),
    ("report", "json_form"),
    ("page", "plot"),
    ("__main__",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
HOMES = {"sympy": {"closed_form"}, "rich": {"report", "progress", "__main__"}}


def imports(source: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names if node.module == "fxstream"}
    return found


def violations(name: str, source: str) -> list[str]:
    """What a file of the package imports and must not."""
    wrong = []
    for module in imports(source):
        parts = module.split(".")
        if parts[0] in HOMES and name not in HOMES[parts[0]]:
            wrong.append(f"{name} imports {parts[0]}")
        if parts[0] == "fxstream" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != name:
            below = FLOOR[parts[1]] < FLOOR[name]
            wrong += [] if below else [f"{name} imports {parts[1]}, which is not below it"]
    return wrong


def files() -> list[tuple[str, Path]]:
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem != "__init__"]
    return [(p.stem if p.parent == PACKAGE else p.parent.name, p) for p in paths]


def test_every_file_has_a_floor():
    assert {name for name, _ in files()} == set(FLOOR)


@pytest.mark.parametrize("name, path", files(), ids=lambda x: str(getattr(x, "stem", x)))
def test_imports_go_downwards(name, path):
    assert violations(name, path.read_text()) == []


def test_the_check_can_fail():
    assert violations("box", "from fxstream.runtime import stream_map") != []
    assert violations("capture", "def f():\n    import fxstream.compiler") != []
    assert violations("receptive_field", "import sympy") != []
    assert violations("grid", "from fxstream.grid import Grid") == []
