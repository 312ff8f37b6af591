"""Bounds on what decoded plain data may become: how deep it is nested, how many containers it has.

A decoder's own limits follow from the length of its input, and an empty container costs one byte on the wire
and seventy in memory. These bounds are checked while a value is being built, by msgpack's hooks, so that what
goes beyond them is never whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import ProtocolError
from wove.plain_data import MAX_CONTAINERS, MAX_NESTING, SCALARS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Containers of one value, in the tagged form, in which one of ours may be three.
MAX_DECODED = 3 * MAX_CONTAINERS

_CONTAINERS = frozenset({list, dict, tuple, set, frozenset})


class Bounds:
    """Counts the containers of one value, and how deep they are; use a new one for each.

    Args:
        rebuild: makes a tagged mapping what it stands for; None to leave mappings as they are.
    """

    __slots__ = ("_depths", "_left", "_rebuild")

    def __init__(self, rebuild: Callable[[dict[Any, Any]], Any] | None = None) -> None:
        self._rebuild = rebuild
        self._left = MAX_DECODED
        # Of containers that hold others and have no parent yet; values are built from the inside.
        self._depths: dict[int, int] = {}

    def sequence(self, value: list[Any]) -> list[Any]:
        """Take a list that is complete (msgpack's ``list_hook``)."""
        depth = self._depth(value)
        if depth > 1:
            self._depths[id(value)] = depth
        return value

    def mapping(self, value: dict[Any, Any]) -> Any:
        """Take a mapping that is complete (msgpack's ``object_hook``)."""
        depth = self._depth(value.values())
        result = value if self._rebuild is None else self._rebuild(value)
        if depth > 1 and type(result) in _CONTAINERS:
            self._depths[id(result)] = depth
        return result

    def _depth(self, members: Iterable[Any]) -> int:
        self._left -= 1
        if self._left < 0:
            raise ProtocolError(f"more than {MAX_DECODED} lists and mappings in one value")
        if SCALARS.issuperset(map(type, members)):  # one pass in C settles most
            return 1
        pop = self._depths.pop
        depth = 1 + max((pop(id(member), 1) for member in members if type(member) in _CONTAINERS), default=0)
        if depth > MAX_NESTING:
            raise ProtocolError(f"nested more than {MAX_NESTING} deep")
        return depth
