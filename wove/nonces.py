"""Which signed requests were seen: bounded memory, constant time per request."""

from __future__ import annotations

import time

#: Milliseconds that a signed request stays acceptable, and that its clock may be ahead of the service's.
MAX_AGE_MS = 300_000
AHEAD_MS = 2_000
#: Nonces that are remembered at most; beyond it the oldest seconds are refused altogether.
MAX_NONCES = 200_000


class NonceStore:
    """The nonces of the last minutes, in constant time per request and bounded memory.

    They are kept by the second of their timestamp. When there are too many, the oldest second is given up
    and everything as old as it is refused from then on.
    """

    def __init__(self, *, capacity: int = MAX_NONCES) -> None:
        self._capacity = capacity
        self._seconds: dict[int, set[str]] = {}
        self._count = 0
        # What an earlier process of this service can have accepted is never accepted here.
        self._floor_ms = int(time.time() * 1000) + AHEAD_MS

    def __len__(self) -> int:
        return self._count

    def check(self, stamp_ms: int, nonce: str) -> str:
        """Remember a nonce; return "" when it is fresh, else "replayed", "old" or "ahead"."""
        now = int(time.time() * 1000)
        self._forget(now - MAX_AGE_MS)
        if stamp_ms > now + AHEAD_MS:
            return "ahead"
        if stamp_ms <= max(self._floor_ms, now - MAX_AGE_MS):
            return "old"
        seen = self._seconds.setdefault(stamp_ms // 1000, set())
        if nonce in seen:
            return "replayed"
        seen.add(nonce)
        self._count += 1
        if self._count > self._capacity:
            self._give_up(min(self._seconds))
        return ""

    def suggested_ms(self) -> int:
        """Return a time, in milliseconds, at which a request would be accepted now."""
        now = int(time.time() * 1000)
        return now if now > self._floor_ms + 1 else now + AHEAD_MS

    def _forget(self, before_ms: int) -> None:
        # A handful of seconds at a time: as many go as come.
        while self._seconds and (oldest := next(iter(self._seconds))) < before_ms // 1000:
            self._count -= len(self._seconds.pop(oldest))

    def _give_up(self, second: int) -> None:
        self._floor_ms = max(self._floor_ms, second * 1000 + 999)
        self._count -= len(self._seconds.pop(second))
