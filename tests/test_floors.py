"""Imports go downwards, and sympy and rich stay in their files; the check itself is shown to fail."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fxstream"
FLOORS = (
    ("errors",),
    ("geometry", "machine"),
    ("rules",),
    ("graph",),
    ("capture",),
    ("lowering",),
    ("io",),
    ("tiling",),
    ("planning",),
    ("runtime",),
    ("probe",),
    ("compiler",),
    ("backend", "tools"),
    ("prediction",),
    ("report",),
    ("__main__",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
HOMES = {
    "sympy": {"report/closed_form.py"},
    "rich": {"report/terminal.py", "report/commands.py", "machine/progress.py"},
}


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


def floor_of(path: str) -> str:
    """The package of a file, or the file itself at the top."""
    return path.split("/")[0].removesuffix(".py")


def violations(path: str, source: str) -> list[str]:
    """What a file of the package, by its path in it, imports and must not."""
    wrong, name = [], floor_of(path)
    for module in imports(source):
        parts = module.split(".")
        if parts[0] in HOMES and path not in HOMES[parts[0]]:
            wrong.append(f"{path} imports {parts[0]}")
        if parts[0] == "fxstream" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != name:
            below = FLOOR[parts[1]] < FLOOR[name]
            wrong += [] if below else [f"{path} imports {parts[1]}, which is not below it"]
    return wrong


def files() -> list[str]:
    paths = (path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py")))
    return [path for path in paths if path != "__init__.py"]


def test_every_package_has_a_floor():
    assert {floor_of(path) for path in files()} == set(FLOOR)


@pytest.mark.parametrize("path", files())
def test_imports_go_downwards(path):
    assert violations(path, (PACKAGE / path).read_text()) == []


def test_the_floors_are_those_of_the_page():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    floors = " < ".join(", ".join(f"`{name}`" for name in names) for names in FLOORS)
    assert floors in page.replace("\n", " ")
    assert not re.search(r"^(<{7}|={7}|>{7})", page, re.MULTILINE), "a merge was left open"


def test_no_package_is_crowded():
    packages = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {
        path.name: len(list(path.glob("*.py"))) for path in packages if len(list(path.glob("*.py"))) > 14
    } == {}
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 20


def test_the_check_can_fail():
    assert violations("geometry/box.py", "from fxstream.runtime.tile_loop import stream_map") != []
    assert violations("capture/capture.py", "def f():\n    import fxstream.compiler.module") != []
    assert violations("geometry/receptive_field.py", "import sympy") != []
    assert violations("tiling/grid.py", "from fxstream.tiling.axes.bounds import AxisWalk") == []
