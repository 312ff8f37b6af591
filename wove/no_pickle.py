"""No-pickle mode: plain data only, whoever sends it; what is none is refused by its place and its type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import EncodeError, PayloadRejectedError, safe_text
from wove.plain_data import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_MAPPING,
    MAX_SEQUENCE,
    OTHER,
    SCALARS,
    TAGGED,
    is_plain_scalar,
    shape_of,
    type_name,
)
from wove.wire import callable_name, decode_value, importable_reference, pack_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

#: What plain data is, for messages.
KINDS = (
    "None, bool, numbers, text, bytes, lists, dictionaries, tuples, sets, dates, Decimal and UUID, of exactly "
    "these types"
)
_CONTAINERS = (list, dict, tuple, set, frozenset)


def decode_plain(
    descriptor: Any, attachments: Sequence[memoryview], what: str, who: str = "this worker takes"
) -> Any:
    """Decode a value that is plain data.

    Args:
        descriptor: the value's descriptor.
        attachments: those of its message.
        what: what it is, for the message.
        who: who takes nothing else, and by which setting.

    Raises:
        PayloadRejectedError: it is a pickle; nothing of it was read.
    """
    if type(descriptor) is not list or not descriptor or descriptor[0] not in ("data", "tagged"):
        raise PayloadRejectedError(f"{what}: {who} plain data only: {KINDS}", reason="pickle")
    return decode_value(descriptor, attachments)


def encode_plain(
    value: Any, attachments: list[Buffer], what: str = "the result", setting: str = "--allow, WOVE_ALLOW"
) -> list[Any]:
    """Encode a value that is plain data; as :func:`wove.wire.encode_value`, and never as a pickle.

    Args:
        value: the value.
        attachments: those of its message so far.
        what: what it is, for the message.
        setting: what asks for plain data, for the message.

    Raises:
        EncodeError: it is not; says which part of it, and why.
    """
    shape = shape_of(value)
    if shape == OTHER:
        problem = problem_of(value)
        if problem is not None:
            raise EncodeError(f"{what}: {problem}, and only plain data travels here ({setting}): {KINDS}")
        shape = TAGGED  # a list that is met twice, say: it arrives as two
    try:
        codec, data = pack_plain(value, shape)
    except (ValueError, OverflowError, TypeError, RecursionError) as exc:
        raise EncodeError(
            f"{what} cannot be written as plain data ({setting}): {safe_text(exc, 200)}"
        ) from exc
    attachments.append(data)
    return [codec, len(attachments) - 1, 1]


def encode_plain_arguments(
    positional: list[Any], keywords: Mapping[str, Any], attachments: list[Buffer], setting: str
) -> list[Any]:
    """Encode arguments as one value of plain data.

    Raises:
        EncodeError: one of them is not; names it, and says which part of it and why.
    """
    for name, value in [*((f"argument {i}", v) for i, v in enumerate(positional)), *keywords.items()]:
        if shape_of(value) == OTHER:
            encode_plain(value, [], name, setting)
    return encode_plain([positional, dict(keywords)], attachments, "the arguments", setting)


def plain_reference(func: Any, setting: str) -> str:
    """Return ``"module:qualname"`` of a function that its worker can import.

    Raises:
        EncodeError: it has no such name.
    """
    reference = importable_reference(func, only_names=True)
    if reference is None:
        raise EncodeError(
            f"{callable_name(func)} cannot be sent: functions go by name only here ({setting}), and importing this one "
            "by its name does not give it. Define it at the top of a module that the worker can import, not in "
            "__main__, and neither as a lambda nor inside a function"
        )
    return reference


def problem_of(value: Any) -> str | None:
    """Say which part of ``value`` is no plain data, and why; None when it is plain all through."""
    return _Search().look(value, "", 0)


class _Search:
    def __init__(self) -> None:
        self._left = MAX_CONTAINERS
        self._path: set[int] = set()

    def look(self, value: Any, place: str, depth: int) -> str | None:
        cls = type(value)
        if cls in SCALARS or is_plain_scalar(value):
            return None
        if cls not in _CONTAINERS:
            return f"{_at(place)} is of type {type_name(value)}"
        self._left -= 1
        if id(value) in self._path:
            return f"{_at(place)} contains itself"
        if depth > MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} deep"
        if len(value) > (MAX_MAPPING if cls is dict else MAX_SEQUENCE):
            return f"{_at(place)} has {len(value)} entries"
        if self._left < 0:
            return f"it has more than {MAX_CONTAINERS} lists and mappings"
        self._path.add(id(value))
        found = self._look_into(cls, value, place, depth + 1)
        self._path.discard(id(value))
        return found

    def _look_into(self, cls: type, value: Any, place: str, depth: int) -> str | None:
        if cls is dict:
            for key, item in value.items():
                name = f"{place}[{safe_text(key, 40)!r}]"
                found = self.look(key, f"the key {name}", depth) or self.look(item, name, depth)
                if found:
                    return found
            return None
        for index, item in enumerate(value):
            found = self.look(item, f"{place}[{index}]" if cls in (list, tuple) else f"{place}{{...}}", depth)
            if found:
                return found
        return None


def _at(place: str) -> str:
    return place or "it"
