"""``MATRIX.md`` says the truth: each row is there, and so are the tests that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

MATRIX = Path(__file__).with_name("MATRIX.md")
TESTS = MATRIX.parents[1]
ROWS = 42


def named() -> dict[str, list[str]]:
    """Return the test functions that are named, by file."""
    found: dict[str, list[str]] = {}
    file = ""
    for word in re.findall(r"`([^`]+)`", MATRIX.read_text()):
        if "/" in word:
            file = word
        elif word.startswith("test_") and word != Path(__file__).name:
            found.setdefault(file, []).append(word)
    return found


def functions(path: Path) -> set[str]:
    """Return the names of a file's test functions."""
    nodes = ast.walk(ast.parse(path.read_text()))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in nodes if isinstance(node, defined) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    missing = {
        file: sorted(set(names) - functions(TESTS / file))
        for file, names in named().items()
        if set(names) - functions(TESTS / file)
    }
    assert not missing


def test_every_row_is_there_once() -> None:
    rows = re.findall(r"^\| (\d+) \|", MATRIX.read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, ROWS + 1))


def test_every_test_that_has_a_rows_name_is_named_in_that_row() -> None:
    lines = {
        int(line.split("|")[1]): line for line in MATRIX.read_text().splitlines() if re.match(r"\| \d", line)
    }
    for path in sorted(MATRIX.parent.glob("test_*.py")):
        for name in functions(path):
            row = re.match(r"test_row_(\d+)_", name)
            if row is not None:
                assert f"`{name}`" in lines[int(row[1])], f"{path.name}: {name}"
