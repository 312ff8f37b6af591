"""The listeners of this process: one per address, shared by all who ask for it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from wove.callback_server.batches import OpenBatch
from wove.callback_server.runs import OpenRun
from wove.callback_server.server import CallbackListener
from wove.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from wove.callback_server.tls import ListenerTls
    from wove.frames import Frame
    from wove.shared_parts import Part

    Sink = Callable[[Iterable[Frame]], bool]
    # With a port of 0, those who speak TLS alike share a listener.
    _Key = tuple[str, int, ListenerTls | None]

_lock = threading.Lock()
_listeners: dict[_Key, _Shared] = {}


class _Shared:
    def __init__(self, listener: CallbackListener) -> None:
        self.listener = listener
        self.users = 0


class Lease:
    """One user's share of a listener. Thread-safe; all runs of a lease have one sink."""

    def __init__(self, key: _Key, listener: CallbackListener) -> None:
        self._key = key
        self._listener: CallbackListener | None = listener
        self.host = listener.host
        self.port = listener.port
        self._sink: Sink | None = None

    def open_run(self, run: OpenRun) -> None:
        """Take events for ``run`` until it is closed."""
        if self._listener is None:
            raise RuntimeError("the callback listener was released")
        self._sink = run.sink
        self._listener.open_run(run)

    def open_new(self, **settings: Any) -> None:
        """Open a run with these settings of :class:`~wove.callback_server.runs.OpenRun`."""
        self.open_run(OpenRun(**settings))

    def open_batch(self, **settings: Any) -> None:
        """Open a batch with these settings of an ``OpenBatch``; its members are open until they are closed."""
        if self._listener is None:
            raise RuntimeError("the callback listener was released")
        batch = OpenBatch(**settings)
        self._sink = settings["sink"]
        self._listener.open_batch(batch)

    def batch_of(self, run_id: str) -> OpenBatch | None:
        """Return the batch in which an open run travels."""
        return self._listener.runs.batch_of(run_id) if self._listener is not None else None

    def renew_run(
        self, run: OpenRun, attempt: int, message: list[Buffer] | None, part: Part | None = None
    ) -> None:
        """Begin another attempt of an open run; whoever is at an earlier one is told to stop."""
        if self._listener is not None:
            self._listener.runs.withdraw()
        run.renew(attempt, message, part)
        if self._listener is not None:
            self._listener.wake_run(run)

    def close_run(self, run_id: str) -> None:
        """Take no more events for a run."""
        if self._listener is not None:
            self._listener.close_runs([run_id])

    def cancel_run(self, run_id: str) -> None:
        """Tell a run's worker to stop."""
        if self._listener is not None:
            self._listener.cancel_run(run_id)

    @property
    def withdrawn(self) -> int | None:
        """What a payload that is made now is to say of withdrawals."""
        return self._listener.runs.withdrawn if self._listener is not None else None

    def find(self, run_id: str) -> OpenRun | None:
        """Return an open run."""
        return self._listener.runs.get(run_id) if self._listener is not None else None

    def has_started(self, run_id: str) -> bool:
        """Tell whether a worker has spoken of the run."""
        run = self.find(run_id)
        return run is not None and run.started

    async def take_parked(self, run_id: str, blob: bytes) -> None:
        """Take an outcome in that a worker has left with the backend.

        Raises:
            ProtocolError: it is not signed with the run's key, or malformed.
        """
        if self._listener is not None:
            await self._listener.take_parked(run_id, blob)

    def open_runs(self) -> list[OpenRun]:
        """Return this user's runs that were not closed yet."""
        if self._listener is None or self._sink is None:
            return []
        return self._listener.runs.of(self._sink)

    def release(self) -> None:
        """Close what is left of this user's runs; the last user stops the listener. Blocks shortly."""
        left = self.open_runs()
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Work that was told to stop is over; what was left to run on is not.
        for over in (True, False):
            listener.close_runs([run.run_id for run in left if run.cancelled is over], ended=over)
        with _lock:
            shared = _listeners.get(self._key)
            if shared is None or shared.listener is not listener:
                return
            shared.users -= 1
            if shared.users:
                return
            del _listeners[self._key]
            # Within the lock: who asks for this address next must find the port free.
            listener.stop()


def acquire(host: str, port: int, tls: ListenerTls | None = None) -> Lease:
    """Return a share of the listener on that address, starting it when it is the first.

    Args:
        host: the address to listen on.
        port: the port; 0 for any free one, shared by all who ask for 0 on that host.
        tls: how to speak TLS there; None for plain HTTP.

    Raises:
        ConfigurationError: the address cannot be bound, for example because another
            process has the port, or this one speaks otherwise there.
    """
    key = (host, port, tls)
    with _lock:
        _check_alike(key)
        shared = _listeners.get(key)
        if shared is None or not shared.listener.alive:
            listener = CallbackListener(host, port, tls)
            try:
                listener.start()
            except BaseException:
                listener.stop()
                raise
            shared = _listeners[key] = _Shared(listener)
        shared.users += 1
        return Lease(key, shared.listener)


def _check_alike(key: _Key) -> None:
    host, port, tls = key
    for other_host, other_port, other in _listeners:
        if port and (host, port) == (other_host, other_port) and tls != other:
            spoken = [("plain HTTP" if it is None else "TLS") for it in (other, tls)]
            if spoken == ["TLS", "TLS"]:
                spoken = ["TLS by other certificates", "TLS by these"]
            raise ConfigurationError(
                f"callback_port {port} on {host} is in use in this process for {spoken[0]}, and cannot serve {spoken[1]} "
                'as well: give both environments the same executor_config["callback_tls"], or another callback_port'
            )


def _forget() -> None:
    # A forked child has none of the threads; the parent's sockets are not its own.
    global _lock
    _lock = threading.Lock()
    for shared in _listeners.values():
        shared.listener.close_in_child()
    _listeners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
