"""No-pickle mode: functions by name from a list, plain data only."""

from __future__ import annotations

import importlib
import inspect
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError, EncodeError, PayloadRejectedError, safe_text
from wove.plain_data import OTHER, shape_of, type_name
from wove.wire import decode_value, encode_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer


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
                "this worker takes functions by name only (--allow), and this one was sent by value: define it in a "
                "module that the worker can import"
            )
        module, _, qualname = described.partition(":")
        parts = qualname.split(".")
        listed = any(fnmatchcase(described, pattern) for pattern in self._patterns)
        if not listed or not all(parts) or any(part.startswith("_") for part in parts):
            raise PayloadRejectedError(
                f"{safe_text(described, 200)} is not allowed on this worker: its list (--allow) holds "
                f"{', '.join(self._patterns)}"
            )
        found: Any = importlib.import_module(module)
        for part in parts:
            found = getattr(found, part)
        own = (
            getattr(found, "__module__", None) == module and getattr(found, "__qualname__", None) == qualname
        )
        if not own or not (inspect.isroutine(found) or callable(found)):
            raise PayloadRejectedError(f"{safe_text(described, 200)} is not a function that {module} defines")
        return found


def decode_plain(descriptor: Any, attachments: Sequence[memoryview], what: str) -> Any:
    """Decode a value that is plain data.

    Raises:
        PayloadRejectedError: it is a pickle.
    """
    if type(descriptor) is not list or not descriptor or descriptor[0] not in ("data", "tagged"):
        raise PayloadRejectedError(
            f"{what}: this worker takes plain data only (--allow): None, bool, numbers, text, bytes, lists, "
            "dictionaries, tuples, sets, dates, Decimal and UUID"
        )
    return decode_value(descriptor, attachments)


def encode_plain(value: Any, attachments: list[Buffer]) -> list[Any]:
    """Encode a value that is plain data; as :func:`wove.wire.encode_value`.

    Raises:
        EncodeError: it is not; names its type.
    """
    if shape_of(value) != OTHER:
        trial: list[Buffer] = []
        codec, first, count = encode_value(value, trial)
        if codec != "pickle":
            attachments.extend(trial)
            return [codec, first + len(attachments) - len(trial), count]
    raise EncodeError(
        f"the result is of type {type_name(value)}, and this worker returns plain data only (--allow)"
    )
