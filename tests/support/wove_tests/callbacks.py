"""Both ends of a callback, each alone: runs opened on a real listener, payloads given to a real worker."""

from __future__ import annotations

import http.client
import os
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from wove import frames
from wove.backend import build_payload
from wove.callback_server import hub
from wove.callback_server.runs import OpenRun
from wove.security import event_tag, find_secrets, run_key
from wove.wire import encode_value, pack_message
from wove_tests.fleets import SUPPORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from typing_extensions import Buffer

    from wove.callback_server.hub import Lease
    from wove.callback_server.tls import ListenerTls
    from wove.frames import Frame
    from wove.shared_parts import SharedCallable

ENVIRONMENT = "tests"

MSGPACK = "application/msgpack"

#: Seconds until a condition that does not come true fails the test.
PATIENCE = 15.0


def wait_until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until ``condition()`` is true and return its value; for tests without an event loop."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain until {what}"
        time.sleep(0.005)
    return value


def child_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a Python process that imports what the tests import."""
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


class Sink:
    """Takes events in, as an executor's channel does."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def __call__(self, batch: Iterable[Frame]) -> bool:
        """Take a batch of events."""
        self.frames.extend(batch)
        return True

    def of(self, run_id: str) -> list[Frame]:
        """Return the events of one run, in the order they came."""
        return [frame for frame in self.frames if frame["run_id"] == run_id]

    def kinds(self, run_id: str) -> list[str]:
        """Return the types of one run's events."""
        return [frame["type"] for frame in self.of(run_id)]

    def outcome(self, run_id: str) -> Frame:
        """Wait for the one outcome of a run."""
        wait_until(
            lambda: any(kind in frames.TERMINAL for kind in self.kinds(run_id)), f"run {run_id} has ended"
        )
        (outcome,) = [frame for frame in self.of(run_id) if frame["type"] in frames.TERMINAL]
        return outcome


@contextmanager
def listening(tls: ListenerTls | None = None) -> Iterator[Lease]:
    """Have a share of the listener on any port of 127.0.0.1, as an executor has it; the fixture ``lease`` is one."""
    lease = hub.acquire("127.0.0.1", 0, tls)
    try:
        yield lease
    finally:
        lease.release()


def open_run(lease: Lease, sink: Sink, *, max_body: int = 8 * 1024 * 1024, **changes: Any) -> OpenRun:
    """Open a run on a listener, as an executor does before it submits."""
    run = OpenRun(
        run_id=changes.pop("run_id", None) or secrets.token_hex(16),
        task_id="tests.task",
        environment=ENVIRONMENT,
        ring=changes.pop("ring", None) or find_secrets(),
        nonce=changes.pop("nonce", None) or secrets.token_bytes(16),
        sink=sink,
        max_body=max_body,
        **changes,
    )
    lease.open_run(run)
    return run


# --- what a worker says, without the worker's code -------------------------------


class Reply(NamedTuple):
    """A listener's answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(
    lease: Lease,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send one request on a connection of its own."""
    connection = http.client.HTTPConnection(lease.host, lease.port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def kid() -> str:
    """Return the id of the secret that this run of the tests has."""
    return find_secrets().primary.kid


def key_of(run: OpenRun) -> bytes:
    """Return the key that signs a run's events."""
    key = run.key(kid())
    assert key is not None
    return key


def event(run: OpenRun, kind: str, seq: int = 1, **fields: Any) -> Frame:
    """Return one event of a run."""
    return frames.event(kind, run.run_id, run.task_id, 1, seq, **fields)


def packed(batch: Sequence[Frame], attachments: Sequence[Buffer] = (), **envelope: Any) -> bytes:
    """Return the body of an events request."""
    message = pack_message({"frames": list(batch), **envelope}, attachments)
    return b"".join(bytes(part) for part in message)


def result_body(run: OpenRun, value: Any) -> bytes:
    """Return the body that ends a run with a result."""
    attachments: list[Buffer] = []
    described = encode_value(value, attachments)
    return packed([event(run, frames.TASK_RESULT, result=described)], attachments)


def events_path(run: OpenRun) -> str:
    """Return where a run's events go."""
    return f"/wove/v1/events/{run.run_id}"


def signed(run: OpenRun, body: bytes, codec: str = MSGPACK, *, final: bool = True) -> dict[str, str]:
    """Return the headers of an events request."""
    return {
        "Content-Type": codec,
        "Wove-Key": kid(),
        "Wove-Signature": event_tag(key_of(run), run.run_id, codec, final, [body]).hex(),
        "Wove-Final": "1" if final else "0",
    }


def post(lease: Lease, run: OpenRun, body: bytes, codec: str = MSGPACK, *, final: bool = True) -> Reply:
    """Post a body, whatever it holds, signed as it should be."""
    return ask(lease, "POST", events_path(run), body, signed(run, body, codec, final=final))


# --- what a submitter sends --------------------------------------------------------


class Payload:
    """A call, built and signed as a submitter does it.

    ``blob`` is what crosses the broker, ``message`` what a worker fetches, or None, ``key`` signs the events.
    """

    def __init__(
        self,
        callback_url: str,
        func: Callable[..., Any],
        *args: Any,
        heartbeat: float | None = None,
        timeout: float | None = None,
        secret: str | None = None,
        delivery: dict[str, Any] | None = None,
        shared: SharedCallable | None = None,
        withdrawn: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.run_id = secrets.token_hex(16)
        self.frame: Frame = {
            "type": frames.RUN_TASK,
            "run_id": self.run_id,
            "task_id": f"tests.{getattr(func, '__name__', 'task')}",
            "callable": func,
            "positional": args,
            "args": kwargs,
            "delivery": {
                "attempt": 1,
                "timeout": timeout,
                "heartbeat_seconds": heartbeat,
                **(delivery or {}),
            },
        }
        if shared is not None:
            self.frame["shared"] = shared
        ring = find_secrets(secret)
        built = build_payload(
            self.frame, environment=ENVIRONMENT, ring=ring, callback_url=callback_url, withdrawn=withdrawn
        )
        self.blob: bytes = built.blob
        self.nonce: bytes = built.nonce
        self.message: list[Buffer] | None = built.message
        self.kid = ring.primary.kid
        self.key = run_key(ring.primary, ENVIRONMENT, self.run_id, built.nonce)

    def open_on(self, lease: Lease, sink: Sink, **changes: Any) -> OpenRun:
        """Open the run on a real listener."""
        return open_run(lease, sink, run_id=self.run_id, nonce=self.nonce, message=self.message, **changes)
