"""What several runs of one ``map`` share, kept for the next of them: each process fetches it once.

Bytes are kept, and never what was made of them: each run decodes objects of its own, from a copy of its own, so
that no task sees what another has changed. A process that is forked for each job, as RQ's are, has nothing of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from wove.buffers import Original
from wove.security import part_tag
from wove.worker.fetching import claimed, fetch

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.worker.assignment import Assignment

    # Who knows the digest only has not got what it stands for: the secret and the environment are part of the name.
    _Name = tuple[str, str, bytes]

logger = logging.getLogger("wove.worker")

#: Bytes that a process keeps at most, unless ``WOVE_CACHE_BYTES`` says otherwise.
CACHE_BYTES = 256 * 1024 * 1024
#: Seconds after which what nobody has asked for is dropped.
IDLE_SECONDS = 60.0
#: Seconds that a thread waits for another one that fetches the same; then it fetches it as well.
WAIT_SECONDS = 30.0


def cache_bytes() -> int:
    """Return how much is kept: ``WOVE_CACHE_BYTES`` or 256 MiB; 0 for nothing."""
    text = os.environ.get("WOVE_CACHE_BYTES", "")
    try:
        return max(0, int(text)) if text else CACHE_BYTES
    except ValueError:
        logger.warning("WOVE_CACHE_BYTES is a whole number of bytes, not %r; using %d", text, CACHE_BYTES)
        return CACHE_BYTES


class PartCache:
    """The parts of one process, the least recently used going first. Thread-safe.

    Args:
        limit: bytes kept at most.
        idle: seconds after which a part is dropped that nobody asks for.
    """

    def __init__(self, limit: int, idle: float = IDLE_SECONDS) -> None:
        self.limit = limit
        self._idle = idle
        self._kept: OrderedDict[_Name, tuple[Original, float]] = OrderedDict()
        self._coming: dict[_Name, threading.Event] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self.bytes = 0

    def get(self, name: _Name, load: Callable[[], Original]) -> Original:
        """Return a part; ``load`` gets it when it is not there.

        Raises:
            Exception: what ``load`` raises.
        """
        with self._lock:
            kept = self._touch(name)
            coming = self._coming.get(name)
            if kept is None and coming is None:
                self._coming[name] = threading.Event()
        if kept is not None:
            return kept
        if coming is not None:
            coming.wait(WAIT_SECONDS)
            with self._lock:
                kept = self._touch(name)
            # Where the other one had no luck, all who wait try at once, and not in turn.
            return load() if kept is None else kept
        try:
            return self._keep(name, load())
        finally:
            with self._lock:
                self._coming.pop(name).set()

    def _touch(self, name: _Name) -> Original | None:
        found = self._kept.get(name)
        if found is None:
            return None
        self._kept[name] = found[0], time.monotonic()
        self._kept.move_to_end(name)
        return found[0]

    def _keep(self, name: _Name, part: Original) -> Original:
        with self._lock:
            self._kept[name] = part, time.monotonic()
            self.bytes += part.data.nbytes
            while self.bytes > self.limit:
                self._drop(next(iter(self._kept)))
            self._watch()
            return part

    def _drop(self, name: _Name) -> None:
        self.bytes -= self._kept.pop(name)[0].data.nbytes

    def _watch(self) -> None:
        if self._timer is None and self._kept:
            self._timer = threading.Timer(self._idle, self._sweep)
            self._timer.name = "wove-parts"
            self._timer.daemon = True
            self._timer.start()

    def _sweep(self) -> None:
        with self._lock:
            self._timer = None
            oldest = time.monotonic() - self._idle
            for name in [name for name, (_, used) in self._kept.items() if used <= oldest]:
                self._drop(name)
            self._watch()

    def clear(self) -> None:
        """Keep nothing of what there is."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None


_caches: dict[int, PartCache] = {}


def cache() -> PartCache:
    """Return the cache of this process; a forked child begins with an empty one."""
    pid = os.getpid()
    found = _caches.get(pid)
    if found is None:
        _caches.clear()
        found = _caches.setdefault(pid, PartCache(cache_bytes()))
    return found


def shared_part(task: Assignment, claim: Any) -> Original:
    """Return the part that a payload names, verified; each run decodes a copy of it.

    Raises:
        NotWanted, FetchFailed, ProtocolError: see :func:`wove.worker.fetching.fetch`.
    """
    size, digest = claimed(claim, "part")
    tag = part_tag(task.key, task.run_id)
    kept = cache()

    def load() -> Original:
        part = Original(size)
        found = fetch(task, "parts", tag, size, digest, lambda length: part.data[:length])
        if found.obj is not part.data.obj:  # a short one, that came without
            part.data[: found.nbytes] = found
        return part

    return load() if size > kept.limit else kept.get((task.kid, task.environment, digest), load)
