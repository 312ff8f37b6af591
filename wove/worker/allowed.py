"""The list of functions that a worker in no-pickle mode calls."""

from __future__ import annotations

import importlib
import inspect
import os
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError, PayloadRejectedError, safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable


class AllowList:
    """Which functions may be called: patterns such as ``"myapp.tasks:*"``.

    A function is called only where it was defined: what a listed module has imported from elsewhere is
    not on the list, nor is any name that begins with an underscore.
    """

    __slots__ = ("_patterns",)

    def __init__(self, patterns: Iterable[str]) -> None:
        """Read the patterns.

        Raises:
            ConfigurationError: one is not ``module:name``.
        """
        self._patterns = tuple(patterns)
        for pattern in self._patterns:
            module, colon, name = pattern.partition(":")
            if not module or not colon or not name or module.startswith("*"):
                raise ConfigurationError(
                    f'an allowed function is written module:name, as in "myapp.tasks:*"; got {pattern!r}'
                )

    @classmethod
    def from_environment(cls) -> AllowList | None:
        """Return the list in ``WOVE_ALLOW``, separated by commas; None where it is not set.

        Raises:
            ConfigurationError: it is set and holds nothing, or something that is not ``module:name``.
        """
        text = os.environ.get("WOVE_ALLOW")
        if text is None:
            return None
        patterns = [part.strip() for part in text.split(",") if part.strip()]
        if not patterns:
            raise ConfigurationError(
                'WOVE_ALLOW is set and allows no function: write module:name, as in "myapp.tasks:*", or unset it'
            )
        return cls(patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, as they were given."""
        return self._patterns

    def find(self, described: Any) -> Any:
        """Return the function of that name; imports its module only when the name is on the list.

        Raises:
            PayloadRejectedError: it is not on the list, or not a name.
        """
        if type(described) is not str:
            raise PayloadRejectedError(
                "this worker takes functions by name only (--allow, WOVE_ALLOW), and this one was sent by value: define it in a "
                "module that the worker can import",
                reason="function",
            )
        module, _, qualname = described.partition(":")
        parts = qualname.split(".")
        listed = any(fnmatchcase(described, pattern) for pattern in self._patterns)
        if not listed or not all(parts) or any(part.startswith("_") for part in parts):
            raise PayloadRejectedError(
                f"{safe_text(described, 200)} is not allowed on this worker: its list (--allow, WOVE_ALLOW) holds "
                f"{', '.join(self._patterns)}",
                reason="function",
            )
        found: Any = importlib.import_module(module)
        for part in parts:
            found = getattr(found, part)
        own = (
            getattr(found, "__module__", None) == module and getattr(found, "__qualname__", None) == qualname
        )
        if not own or not (inspect.isroutine(found) or callable(found)):
            raise PayloadRejectedError(
                f"{safe_text(described, 200)} is not a function that {module} defines", reason="function"
            )
        return found
