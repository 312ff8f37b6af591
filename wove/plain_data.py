"""Plain data that comes back exactly: None, bool, int, float, str, bytes, list, dict, and tagged types.

Tuples, sets, dates, decimals, UUIDs, large integers and mappings with unusual keys are
written as ``{"__wove__": tag, "v": ...}``, which msgpack and JSON both carry.
"""

from __future__ import annotations

import base64
import importlib
import sys
from datetime import date, datetime, time, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.errors import EncodeError, ProtocolError, raised_by_code, safe_text

if TYPE_CHECKING:
    from collections.abc import Callable

#: The key that marks a tagged value; mappings that use it themselves are tagged too.
TAG = "__wove__"
#: Limits of plain data: what is larger or deeper travels as a pickle.
MAX_DEPTH = 64
#: Deepest nesting that is taken from a peer which writes JSON.
MAX_NESTING = 2 * MAX_DEPTH + 64
MAX_SEQUENCE = 1_000_000
MAX_MAPPING = 100_000
#: Lists, mappings and tagged values in one value.
MAX_CONTAINERS = 1_000_000

#: What :func:`shape_of` returns.
PLAIN, TAGGED, OTHER = 0, 1, 2

SCALARS = frozenset({type(None), bool, int, float, str, bytes})
#: Types that are tagged, by where they are defined: looking them up in ``sys.modules``
#: spares a worker the import of modules that no value of its run comes from.
_TAGGED_SCALARS = {
    ("datetime", "datetime"): "datetime",
    ("datetime", "date"): "date",
    ("datetime", "time"): "time",
    ("datetime", "timedelta"): "timedelta",
    ("decimal", "Decimal"): "decimal",
    ("uuid", "UUID"): "uuid",
}


def shape_of(value: Any) -> int:
    """Tell how ``value`` can travel: PLAIN as it is, TAGGED after :func:`to_tagged`, OTHER not at all."""
    return _shape(value, 0, set())


def _shape(value: Any, depth: int, seen: set[int]) -> int:
    """Tell how ``value`` can travel.

    A container met twice is no tree any more: only a pickle gives the sharing back, and
    walking it again could take exponential time.
    """
    cls = type(value)
    if cls in SCALARS:
        return PLAIN
    if cls in (list, dict, tuple, set, frozenset):
        if depth > MAX_DEPTH or len(value) > (MAX_MAPPING if cls is dict else MAX_SEQUENCE):
            return OTHER
        if value or cls not in (tuple, frozenset):  # the empty ones of these are singletons
            if id(value) in seen:
                return OTHER
            seen.add(id(value))
        shape = _container_shape(cls, value, depth, seen)
        return shape if len(seen) <= MAX_CONTAINERS else OTHER
    if not is_plain_scalar(value):
        return OTHER
    seen.add(-len(seen) - 1)  # counted by a number that is no id: it becomes a mapping
    return TAGGED


def _container_shape(cls: type, value: Any, depth: int, seen: set[int]) -> int:
    shape = PLAIN if cls in (list, dict) else TAGGED
    members: Any = value
    if cls is dict:
        if TAG in value or not SCALARS.issuperset(map(type, value)):
            shape = TAGGED
            members = [*value, *value.values()]
            seen.update(range(-len(seen) - len(value), -len(seen)))  # each entry becomes a list
        else:
            members = value.values()
    # Large flat lists are the common large case; one pass in C settles them.
    if SCALARS.issuperset(map(type, members)):
        return shape
    for member in members:
        inner = _shape(member, depth + 1, seen)
        if inner == OTHER:
            return OTHER
        shape = max(shape, inner)
    return shape


def is_plain_scalar(value: Any) -> bool:
    """Tell whether ``value`` is a date, a time, a Decimal or a UUID that comes back exactly."""
    return _scalar_tag(value) is not None


def _scalar_tag(value: Any) -> str | None:
    cls = type(value)
    tag = _TAGGED_SCALARS.get((cls.__module__, cls.__qualname__))
    if tag is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return None
    if tag in ("datetime", "time") and (value.fold or not _plain_zone(value.tzinfo)):
        return None
    if tag == "uuid" and value.is_safe.value is not None:
        return None
    return tag


def _plain_zone(zone: Any) -> bool:
    if zone is None:
        return True
    if type(zone) is not timezone:
        return False
    # A named zone would come back as a bare offset, and one of microseconds as UTC.
    offset = zone.utcoffset(None)
    return not offset.microseconds and repr(zone) == repr(timezone(offset))


def to_tagged(value: Any, *, for_json: bool = False) -> Any:
    """Rewrite plain data so that msgpack (or JSON) gives it back exactly.

    Raises:
        EncodeError: a part of the value is not plain data.
    """
    cls = type(value)
    if cls in (str, bool, type(None)):
        return value
    if cls is int:
        limit = 2**53 if for_json else 2**63
        return value if -limit <= value < limit else {TAG: "int", "v": hex(value)}
    if cls is float:
        if for_json and (value != value or value in (float("inf"), float("-inf"))):
            return {TAG: "float", "v": repr(value)}
        return value
    if cls is bytes:
        return {TAG: "bytes", "v": base64.b64encode(value).decode("ascii")} if for_json else value
    again = partial(to_tagged, for_json=for_json)
    if cls is list:
        return [again(item) for item in value]
    if cls is dict:
        return _tag_mapping(value, again, for_json)
    if cls in (tuple, set, frozenset):
        return {TAG: cls.__name__, "v": [again(item) for item in value]}
    tag = _scalar_tag(value)
    if tag is None:
        raise EncodeError(f"a value of type {type_name(value)} is not plain data")
    return {TAG: tag, "v": _scalar_text(tag, value)}


def _tag_mapping(value: dict[Any, Any], again: Callable[[Any], Any], for_json: bool) -> Any:
    keys = {str} if for_json else SCALARS
    if TAG not in value and all(type(key) in keys for key in value):
        return {key: again(item) for key, item in value.items()}
    return {TAG: "dict", "v": [[again(key), again(item)] for key, item in value.items()]}


def _scalar_text(tag: str, value: Any) -> Any:
    if tag == "timedelta":
        return [value.days, value.seconds, value.microseconds]
    if tag in ("decimal", "uuid"):
        return str(value)
    return value.isoformat()


def from_tagged(value: Any) -> Any:
    """Undo :func:`to_tagged` on decoded JSON data.

    Raises:
        ProtocolError: an unknown tag, or a tag with a value that does not fit it.
    """
    return _from_tagged(value, 0)


def _from_tagged(value: Any, depth: int) -> Any:
    if depth > MAX_NESTING:
        raise ProtocolError(f"nested more than {MAX_NESTING} deep")
    if type(value) is list:
        return [_from_tagged(item, depth + 1) for item in value]
    if type(value) is dict:
        return untag({key: _from_tagged(item, depth + 1) for key, item in value.items()})
    return value


def untag(mapping: dict[Any, Any]) -> Any:
    """Rebuild one decoded mapping if it is tagged."""
    if TAG not in mapping:
        return mapping
    rebuild = _REBUILD.get(mapping[TAG]) if type(mapping[TAG]) is str else None
    if rebuild is None or len(mapping) != 2 or "v" not in mapping:
        raise ProtocolError(f"unknown tag {safe_text(mapping[TAG], 40)!r}")
    try:
        return rebuild(mapping["v"])
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        raise ProtocolError(f"malformed {mapping[TAG]}: {type(exc).__name__}") from exc


def _sequence(kind: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    def rebuild(value: Any) -> Any:
        if type(value) is not list:
            raise TypeError("not a list")
        return kind(value)

    return rebuild


def _pairs(value: list[Any]) -> dict[Any, Any]:
    if not all(type(pair) is list and len(pair) == 2 for pair in value):
        raise TypeError("not a list of pairs")
    return {key: item for key, item in value}  # noqa: C416 - a pair is a list here


def _timedelta(value: list[Any]) -> timedelta:
    days, seconds, microseconds = value
    return timedelta(days, seconds, microseconds)


def _text(module: str, name: str) -> Callable[[Any], Any]:
    def rebuild(value: Any) -> Any:
        if type(value) is not str:
            raise TypeError("not a string")
        return getattr(importlib.import_module(module), name)(value)

    return rebuild


_REBUILD: dict[str, Callable[[Any], Any]] = {
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "dict": _sequence(_pairs),
    "int": lambda text: int(text, 16),
    "float": _text("builtins", "float"),
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": _sequence(_timedelta),
    "decimal": _text("decimal", "Decimal"),
    "uuid": _text("uuid", "UUID"),
}


def type_name(value: Any) -> str:
    """Return the name of ``value``'s type, with its module unless it is built in."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
