"""The work the demo sends out: plain functions that look at Python source files.

Nothing here imports Celery, RQ or a fleet's code; only the long-running function asks Wove something,
namely whether its caller still wants the answer.
"""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import threading
import time
import warnings
from typing import TypedDict

from wove.worker import current

_BLOCKS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


# Python 3.11 can lose count of its recursion depth when two threads build syntax trees at once, and raises
# SystemError; nor may two threads change the warning filters or the collector at once.
_parsing = threading.Lock()


class Facts(TypedDict):
    """What one or several source files contain; a plain dict, so it travels as plain data."""

    files: int
    unparsable: int
    lines: int
    functions: int
    classes: int
    nesting: int


class ClassNotFoundError(LookupError):
    """A module does not define the class that was asked for."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(module, name)
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return f"{self.module} defines no class {self.name!r}"


def standard_library() -> list[str]:
    """Return the paths of all modules of this Python's standard library, its own tests included."""
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        # What was installed on top is not the standard library.
        subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages", "__pycache__"})
        paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return paths


def analyse(path: str) -> Facts:
    """Count what one source file contains.

    The standard library carries files that are wrong on purpose, to test the parser with. They are counted
    as unparsable, with their lines and nothing else.
    """
    with open(path, "rb") as file:
        source = file.read()
    facts = Facts(files=1, unparsable=0, lines=len(source.splitlines()), functions=0, classes=0, nesting=0)
    try:
        tree = _parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        facts["unparsable"] = 1
    else:
        _count(tree, facts)
    return facts


def analyse_all(paths: list[str]) -> Facts:
    """Count what several source files contain together."""
    total = nothing()
    for path in paths:
        total = add(total, analyse(path))
    return total


def nothing() -> Facts:
    """Return the facts about no file at all."""
    return Facts(files=0, unparsable=0, lines=0, functions=0, classes=0, nesting=0)


def add(left: Facts, right: Facts) -> Facts:
    """Add up two counts; the deepest nesting is the deeper of both."""
    return Facts(
        files=left["files"] + right["files"],
        unparsable=left["unparsable"] + right["unparsable"],
        lines=left["lines"] + right["lines"],
        functions=left["functions"] + right["functions"],
        classes=left["classes"] + right["classes"],
        nesting=max(left["nesting"], right["nesting"]),
    )


def find_class(path: str, name: str) -> int:
    """Return the line on which a module defines a class; raises :class:`ClassNotFoundError`."""
    with open(path, "rb") as file:
        tree = _parse(file.read())
    lines = {node.name: node.lineno for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    try:
        return lines[name]
    except KeyError as exc:
        raise ClassNotFoundError(os.path.basename(path), name) from exc


def analyse_slowly(paths: list[str], seconds_each: float, journal: str) -> Facts:
    """Analyse files at a leisurely pace, saying how far it is and stopping when nobody waits any more.

    What became of it is written into the file ``journal``: the caller of a cancelled run hears no more
    from it, and may still want to know that its work ended.
    """
    task = current()
    total = nothing()
    for done, path in enumerate(paths, 1):
        if task.cancelled:
            _write(journal, f"stopped after {total['files']} of {len(paths)} files by process {os.getpid()}")
            return total
        total = add(total, analyse(path))
        task.progress(done / len(paths), os.path.basename(path))
        # The pace is the point of this function: it stands for work that takes its time.
        time.sleep(seconds_each)
    _write(journal, f"ran to its end by process {os.getpid()}")
    return total


def _write(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def _parse(source: bytes) -> ast.Module:
    with _parsing, warnings.catch_warnings():
        # Some test files hold invalid escapes on purpose.
        warnings.simplefilter("ignore")
        # A tree is many objects and no cycles: collecting meanwhile finds nothing and takes a third of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return ast.parse(source)
        finally:
            if collecting:
                gc.enable()


def _count(tree: ast.Module, facts: Facts) -> None:
    """Walk the statements; with a list instead of recursion, for generated code nests deeply."""
    waiting: list[tuple[ast.AST, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            facts["functions"] += 1
        elif isinstance(node, ast.ClassDef):
            facts["classes"] += 1
        if isinstance(node, _BLOCKS):
            depth += 1
            facts["nesting"] = max(facts["nesting"], depth)
        waiting += [(child, depth - _is_elif(child, node)) for child in _statements(node)]


def _statements(node: ast.AST) -> list[ast.AST]:
    """Return the statements directly inside one; expressions hold none, so they are left out."""
    inside: list[ast.AST] = []
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            inside += children
    return inside


def _is_elif(child: ast.AST, parent: ast.AST) -> bool:
    """Whether a statement is its parent's ``elif``, which the syntax tree nests and the source does not."""
    return (
        isinstance(child, ast.If)
        and isinstance(parent, ast.If)
        and child in parent.orelse
        and child.col_offset == parent.col_offset
    )
