"""Finds adapters by name: the shipped ones and those of the entry-point group ``wove.adapters``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING

from wove.adapters.base import BackendAdapter
from wove.errors import ConfigurationError, MissingDispatchFeatureError

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP = "wove.adapters"

# Named here as well as in the entry points, so that they are found in a source tree that
# was never installed.
_SHIPPED = {
    "celery": "wove.adapters.celery:CeleryAdapter",
    "memory": "wove.adapters.memory:MemoryAdapter",
    "rq": "wove.adapters.rq:RqAdapter",
}


def adapter_names() -> list[str]:
    """Return the names of all adapters that can be asked for."""
    return sorted({*_SHIPPED, *(entry.name for entry in entry_points(group=GROUP))})


def is_adapter(name: str) -> bool:
    """Tell whether an adapter has that name. The shipped ones are known without a look at what is installed."""
    return name in _SHIPPED or name in adapter_names()


def load_adapter(name: str) -> type[BackendAdapter]:
    """Return the adapter class of that name; imports no backend library.

    Raises:
        ValueError: no adapter has that name.
        ConfigurationError: its entry point does not lead to a BackendAdapter.
    """
    reference = _SHIPPED.get(name)
    if reference is None:
        found = next((entry for entry in entry_points(group=GROUP) if entry.name == name), None)
        if found is None:
            raise ValueError(f"unknown adapter {name!r}; known: {', '.join(adapter_names())}")
        reference = found.value
    module, _, attribute = reference.partition(":")
    try:
        adapter = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(f"the adapter {name!r} ({reference}) cannot be loaded: {exc}") from exc
    if not (isinstance(adapter, type) and issubclass(adapter, BackendAdapter)):
        raise ConfigurationError(f"the adapter {name!r} ({reference}) is not a BackendAdapter class")
    return adapter


def check_modules(name: str, modules: Iterable[str], install_hint: str) -> None:
    """Make sure that the libraries an adapter needs are installed.

    Raises:
        MissingDispatchFeatureError: names the missing ones and the install command.
    """
    missing = [module for module in modules if not _installed(module)]
    if missing:
        command = install_hint or f"pip install {' '.join(missing)}"
        raise MissingDispatchFeatureError(f"the {name} executor needs {', '.join(missing)}: {command}")


#: Modules that were found: what is installed stays so while this process runs.
_found: set[str] = set()


def _installed(module: str) -> bool:
    if module in _found:
        return True
    try:
        if find_spec(module) is None:
            return False
    except (ImportError, ValueError):
        return False
    _found.add(module)
    return True
