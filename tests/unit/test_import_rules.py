"""Who may import whom: DESIGN section 3, read from the sources and not from what happens to be loaded."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import wove

if TYPE_CHECKING:
    from collections.abc import Iterator

#: From the bottom up. A module may import what stands below it and what stands beside it.
LAYERS = (
    {"buffers", "eager", "errors", "frames", "nonces", "plain_data", "refusals", "threads"},
    {
        "deadlines",
        "decode_limits",
        "delivery",
        "exposure",
        "keyring",
        "network_security",
        "no_pickle",
        "policy",
        "remote_errors",
        "run_errors",
        "run_state",
        "security",
        "tables",
        "wire",
    },
    {"backend", "exchange", "shared_parts"},
    # These four are siblings, which know nothing of each other.
    {"adapters", "callback_server", "executors", "worker"},
    {
        "__main__",
        "alarm",
        "background",
        "cli",
        "commands",
        "demo",
        "dispatch",
        "doctor",
        "environment",
        "handle",
        "reception",
        "run_ids",
        "run_settings",
        "runtime",
        "sharing",
        "submission",
        "testing",
        "waiter",
    },
)
SIBLINGS = LAYERS[3]

#: What a sibling may know of another: who runs a payload in its own process, who brings two together, and who
#: guards a listener of its own as the callback server does.
EXCEPTIONS = {
    "wove.adapters.memory": {"worker"},
    "wove.executors.local": {"worker"},
    "wove.executors.adapter": {"adapters", "callback_server"},
    "wove.executors.stdio": {"worker"},
    "wove.worker.services.http": {"callback_server"},
    "wove.worker.services.listen": {"callback_server"},
}

#: Where a library may be imported with a module; everywhere else when it is needed, or not at all.
THIRD_PARTIES = {
    "aiohttp": ("wove.callback_server", "wove.worker.services.http", "wove.worker.services.websocket"),
    "billiard": ("wove.worker.celery",),
    "celery": ("wove.worker.celery", "wove.demo.celery_app"),
    "grpc": ("wove.worker.services.grpc",),
    "msgpack": ("wove.tables", "wove.wire"),
    "rich": ("wove.demo",),
}

#: What a forking RQ worker would pay for with every job.
TOO_DEAR = {"aiohttp", "asyncio", "celery", "cloudpickle", "redis", "rq"}


class Import(NamedTuple):
    """One import: what, and ``module``, ``function`` or ``type``, by when it is executed."""

    name: str
    when: str


def _sources() -> dict[str, Path]:
    # By the import system, not by the repository: these tests also run on an unpacked wheel.
    found = {}
    for package in ("wove", "wove.adapters", "wove.callback_server"):
        spec = find_spec(package)
        assert spec is not None
        for folder in map(Path, spec.submodule_search_locations or ()):
            for path in folder.rglob("*.py"):
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


SOURCES = _sources()


def _imports(tree: ast.AST, when: str = "module") -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (Import(_home(node.module or "", alias.name), when) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(ast.Module(node.body, []), "type")
            yield from _imports(ast.Module(node.orelse, []), when)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and when == "module":
            yield from _imports(node, "function")
        else:
            yield from _imports(node, when)


def _home(module: str, name: str) -> str:
    """Return the module that ``from module import name`` leads to."""
    if f"{module}.{name}" in SOURCES:
        return f"{module}.{name}"
    # `from wove import X` stands for the module that X is resolved from when it is used.
    return wove._HOME_OF.get(name, module) if module == "wove" else module


IMPORTS = {name: list(_imports(ast.parse(path.read_text("utf-8")))) for name, path in SOURCES.items()}


def _part(module: str) -> str:
    """Return the part of the house a module is in; "" for ``wove`` itself."""
    return f"{module}.".split(".")[1]


def _layer(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def _ours(module: str) -> set[str]:
    return {each.name for each in IMPORTS[module] if each.name.partition(".")[0] == "wove"}


def _at_once(module: str, seen: set[str] | None = None) -> set[str]:
    """Return everything that importing a module imports, as far as Wove's own modules lead."""
    seen = set() if seen is None else seen
    pending = [module, module.rpartition(".")[0]]
    for name in filter(None, pending):
        if name not in seen:
            seen.add(name)
            for each in IMPORTS.get(name, ()):
                if each.when == "module":
                    _at_once(each.name, seen)
    return seen


def test_every_module_is_found() -> None:
    # Otherwise the other tests would hold of nothing.
    assert {_part(name) for name in SOURCES} >= {"", *(SIBLINGS), "runtime", "errors"}
    assert {name for name in SOURCES if _part(name) == "callback_server"} > {"wove.callback_server"}
    assert _ours("wove.executors.adapter") > {"wove.adapters.registry", "wove.callback_server.hub"}
    assert {"wove", "wove.errors", "wove.wire", "msgpack"} < _at_once("wove.worker.execution")


def test_every_module_has_its_place() -> None:
    homeless = {_part(name) for name in SOURCES} - {""} - set().union(*LAYERS)
    assert not homeless, "new at the top of wove/: say in LAYERS, and in CONTRIBUTING.md, where it stands"


@pytest.mark.parametrize("module", [name for name in SOURCES if _part(name)])
def test_a_module_imports_what_is_below_it(module: str) -> None:
    own = _part(module)
    for imported in sorted(_ours(module)):
        part = _part(imported)
        if part in ("", own):
            continue
        if own in SIBLINGS and part in SIBLINGS:
            assert part in EXCEPTIONS.get(module, ()), f"{module} may not know {imported}"
        else:
            assert _layer(part) <= _layer(own), f"{module} may not import {imported}, which stands above it"


def test_one_module_brings_adapters_and_the_callback_server_together() -> None:
    both = [name for name in SOURCES if {"adapters", "callback_server"} <= {*map(_part, _ours(name))}]
    assert both == ["wove.executors.adapter"]


def test_import_wove_imports_nothing() -> None:
    assert _at_once("wove") - set(sys.stdlib_module_names) == {"wove"}
    assert "asyncio" not in _at_once("wove")


#: Processes of their own, which start once and not for every job.
SERVICES = "wove.worker.services"


@pytest.mark.parametrize(
    "module", [name for name in SOURCES if _part(name) == "worker" and SERVICES not in name]
)
def test_a_worker_pays_for_little(module: str) -> None:
    assert not {name for name in _at_once(module) if name.startswith(SERVICES)}
    allowed = {"celery"} if module == "wove.worker.celery" else set()
    found = {name.partition(".")[0] for name in _at_once(module)} & TOO_DEAR
    assert found <= allowed


@pytest.mark.parametrize("module", SOURCES)
def test_libraries_are_imported_when_they_are_needed(module: str) -> None:
    for each in IMPORTS[module]:
        library = each.name.partition(".")[0]
        if each.when != "module" or library == "wove" or library in sys.stdlib_module_names:
            continue
        allowed = THIRD_PARTIES.get(library, ())
        assert any(module == place or module.startswith(f"{place}.") for place in allowed), (
            f"{module} imports {library} with itself: import it where it is needed"
        )
