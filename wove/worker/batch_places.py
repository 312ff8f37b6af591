"""Which runs of a batch are still to be begun, and which of them nobody wants any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Places:
    """The places of a batch's runs, in their order. Without a lock: those who draw see to that.

    Attributes:
        heard: how many withdrawals the callback server has told us of.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._next = self._end = 0
        self._withdrawn: set[int] = set()
        #: Places that must not be started, and whose runs have ended: nothing is to be said of them.
        self._over: set[int] = set()

    def expect(self, count: int) -> None:
        """The batch has that many runs."""
        self._end = count

    @property
    def are_left(self) -> bool:
        """Whether any may be drawn."""
        return self._next < self._end

    def draw(self) -> Iterator[tuple[int, bool]]:
        """Yield those that are left, each for good, and whether its run is still wanted."""
        while self._next < self._end:
            place = self._next
            self._next += 1
            if place not in self._over:
                yield place, place not in self._withdrawn

    def withdraw(self, text: str) -> None:
        """Take in which runs are not wanted any more: their number so far, and places."""
        heard, *places = map(int, text.split())
        self.heard = max(self.heard, heard)
        self._withdrawn.update(places)

    def is_withdrawn(self, place: int) -> bool:
        """Tell whether the run there is not wanted any more."""
        return place in self._withdrawn

    def settle(self) -> None:
        """What has been withdrawn so far has ended, too."""
        self._over, self._withdrawn = self._withdrawn, set()
