"""Tests of the package's structure: the imports between its rooms, and the length of its code.

A room is a folder of the package, or a file at its top.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_dist

PACKAGE = Path(lightning_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"checks", "files", "taps"}
LEAVES = {"data", "models"}
CORE = {
    "callback",
    "functional",
    "losses",
    "metrics",
    "module",
    "tasks",
    "teacher",
    "terms",
    "training",
}
WINGS = {"cache", "export", "report", "resume"}

# The rooms from the lowest to the highest: a room imports only from rooms that come before it.
FLOORS = (
    *("checks", "taps", "files", "losses", "functional", "metrics", "data", "models", "teacher"),
    *("terms", "training", "callback", "module", "tasks", "cache", "resume", "export", "report"),
    *("cli", "__main__", "__init__"),
)


def room(file: Path) -> str:
    """Return the room to which a file belongs."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> Iterator[str]:
    """Yield the rooms that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *rooms = name.split(".")
            if package == "lightning_dist" and rooms and not rooms[0].startswith("__"):
                yield rooms[0]


def arrows() -> set[tuple[str, str]]:
    """Return the pairs of rooms of which the first imports the second.

    The package's own ``__init__.py`` is left out, because it may import from every room.
    """
    files = [file for file in FILES if room(file) != "__init__"]
    pairs = {(room(file), imported) for file in files for imported in imported_rooms(file)}
    return {(first, second) for first, second in pairs if first != second}


def test_every_room_is_in_the_list_of_floors():
    assert {room(file) for file in FILES} == set(FLOORS)


def test_a_room_imports_only_from_rooms_below_it():
    upwards = [pair for pair in arrows() if FLOORS.index(pair[0]) < FLOORS.index(pair[1])]
    assert not upwards


@pytest.mark.parametrize(
    ("importers", "never"),
    [
        (CORE | GROUND | LEAVES, WINGS),
        (GROUND | LEAVES, CORE),
        (CORE - {"functional"}, LEAVES | {"cli"}),
        (WINGS, {"cli"}),
    ],
    ids=["core-wings", "leaves-core", "core-leaves", "wings-cli"],
)
def test_some_rooms_never_import_some_others(importers, never):
    assert not [pair for pair in arrows() if pair[0] in importers and pair[1] in never]


def test_the_rooms_have_few_arrows():
    """A room that imports another one for little makes both harder to read and to change.

    Before you raise the number, move what is imported to the room that uses it, or pass it in.
    """
    assert len(arrows()) <= 54


def test_wings_do_not_import_each_other():
    assert not [pair for pair in arrows() if set(pair) <= WINGS]


def test_the_callback_fits_in_350_lines():
    assert len((PACKAGE / "callback.py").read_text().splitlines()) <= 350


def test_every_function_fits_on_a_screen():
    """A function has at most 45 lines, without docstring, comments and signature."""
    long = []
    for file in FILES:
        lines = file.read_text().splitlines()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body:
                    code = lines[body[0].lineno - 1 : node.end_lineno]
                    code = [x for x in code if x.strip() and not x.strip().startswith("#")]
                    if len(code) > 45:
                        long.append(f"{file.relative_to(PACKAGE)}:{node.name} {len(code)}")
    assert not long
