"""The worker's HTTP client: keep-alive connections to callback servers.

``http.client`` from the standard library opens them, because its import is nearly free where
Celery or RQ is loaded; requests and replies of the usual form are written and read by
:mod:`wove.worker.plain_http`. A connection must never cross a fork: each thread of each
process has its own.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from wove.buffers import room
from wove.worker import plain_http
from wove.worker.plain_http import SMALL
from wove.worker.transport import TIMEOUT, connect, leads_straight, open_connection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from http.client import HTTPConnection, HTTPResponse

    from typing_extensions import Buffer

#: Bytes a second that a large body is granted on top.
SLOWEST = 256 * 1024
#: Bytes of a large body that are read, and hashed, at a time.
PIECE = 1024 * 1024
#: Origins that a thread keeps a connection to: submitters come and go, workers stay.
MAX_ORIGINS = 8
#: Largest reply body that is read, in bytes; fetched payloads say their size beforehand.
MAX_REPLY = 64 * 1024


class Reply:
    """A callback server's answer; header names are in lower case."""

    __slots__ = ("body", "digest", "headers", "status")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes | memoryview,
        digest: bytes | None = None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        #: Of a large body, where it was asked for.
        self.digest = digest


#: Per callback origin: its wall clock minus ours, in seconds, as its last reply told; and ours minus the
#: monotonic one at that time.
clock_offsets: dict[str, tuple[float, float]] = {}
#: Seconds by which that difference may change before our own clock counts as set anew.
CLOCK_JUMP = 1.0

#: Per callback origin: when a request was made that told its count of withdrawals, on the monotonic clock,
#: and that count, as text.
withdrawals: dict[str, tuple[float, str]] = {}

_NOT_IN_HOST = frozenset(" @?#\\")
#: Since when, on the monotonic clock, a callback origin has not answered.
down_since: dict[str, float] = {}

_local = threading.local()


class _Connections(dict[str, "HTTPConnection"]):
    """One thread's connections by origin; closed when the thread ends."""

    def __del__(self) -> None:
        for connection in self.values():
            connection.close()


def split_url(url: str) -> tuple[str, str]:
    """Split a callback URL into its origin and its path, without a trailing slash.

    Raises:
        ValueError: not an ``http://`` or ``https://`` URL of a host and, perhaps, a port.
    """
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    # A user's name before an @ would be taken for the host by whoever reads the URL from the left.
    usable = host.isprintable() and not _NOT_IN_HOST.intersection(host)
    if not separator or scheme not in ("http", "https") or not host or not usable:
        raise ValueError(f"a callback URL begins with http:// or https:// and a host; got {url!r:.200}")
    return f"{scheme}://{host}", (slash + path).rstrip("/")


def request(
    origin: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    parts: Sequence[Buffer] = (),
    *,
    timeout: float = TIMEOUT,
    max_reply: int = MAX_REPLY,
    hasher: Callable[[], Any] | None = None,
    room: Callable[[int], memoryview] = room,
) -> Reply:
    """Send a request on this thread's connection and read the reply.

    A connection that the server has closed while it was idle is replaced once: requests
    to a callback server can be repeated without harm.

    Raises:
        OSError, http.client.HTTPException: no reply was had.
    """
    size = sum([memoryview(part).nbytes for part in parts])
    allowed = timeout + (size + max_reply) / SLOWEST
    for fresh in (False, True):
        connection, reused = _connection(origin, fresh=fresh)
        try:
            head = plain_http.head_of(method, path, origin.partition("://")[2], headers, size)
            # What may be large is read by pieces, and hashed meanwhile.
            if head is not None and max_reply <= MAX_REPLY and leads_straight(connection):
                return _exchange(connection, origin, method, head, parts, size, allowed, max_reply)
            try:
                send(connection, method, path, headers, parts, size, allowed)
            except ConnectionError:
                if reused or size <= SMALL:
                    raise
                # A server that refuses a large body answers before it has all of it.
            return read_reply(origin, connection.getresponse(), max_reply, hasher, room)
        except (ConnectionError, _bad_status()) as exc:
            connection.close()
            if not reused or isinstance(exc, ConnectionRefusedError):
                raise
        except BaseException:
            # Also for a time limit that strikes here: half a reply must not be left to the next request.
            connection.close()
            raise
    raise ConnectionError("unreachable")  # the second round either returns or raises


def clock_offset(origin: str) -> float | None:
    """Return a callback server's wall clock minus ours, in seconds; None when it is not known, or no longer."""
    known = clock_offsets.get(origin)
    if known is None:
        return None
    offset, ours = known
    if abs(time.time() - time.monotonic() - ours) > CLOCK_JUMP:
        return None  # our clock was set, or this machine slept
    return offset


def _exchange(
    connection: HTTPConnection,
    origin: str,
    method: str,
    head: bytes,
    parts: Sequence[Buffer],
    size: int,
    timeout: float,
    max_reply: int,
) -> Reply:
    """Make a request by hand, on a connection that leads straight to the callback server."""
    reused = connection.sock is not None
    if not reused:
        open_connection(connection, timeout)
    sock = connection.sock
    begun = time.monotonic()
    if sock.gettimeout() != timeout:
        sock.settimeout(timeout)
    try:
        plain_http.send(sock, head, parts, size)
    except ConnectionError:
        if reused or size <= SMALL:
            raise
        # A server that refuses a large body answers before it has all of it.
    answer = plain_http.read_head(sock)
    if isinstance(answer, bytes):
        from wove.worker.early import reply_from

        response = reply_from(answer, sock, method)
        reply = read_reply(origin, response, max_reply)
        if response.will_close:
            connection.close()
        return reply
    if answer.length > max_reply:
        raise ConnectionError(f"the callback server's reply is too long ({answer.length} bytes)")
    _note(origin, answer.headers)
    _note_withdrawals(origin, answer.headers, begun)
    reply = Reply(answer.status, answer.headers, bytes(plain_http.read_body(sock, answer)))
    if not plain_http.stays_open(answer):
        connection.close()
    return reply


def _bad_status() -> type[Exception]:
    import http.client

    return http.client.BadStatusLine


def _connection(origin: str, *, fresh: bool) -> tuple[HTTPConnection, bool]:
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid = os.getpid()
        _local.connections = _Connections()
    connections: _Connections = _local.connections
    connection = connections.pop(origin, None)
    if connection is None or fresh:
        connection = connect(origin)
    connections[origin] = connection  # the most recently used one stands last
    if len(connections) > MAX_ORIGINS:
        connections.pop(next(iter(connections))).close()
    return connection, connection.sock is not None


def forget(origin: str) -> None:
    """Close this thread's connection to an origin, and remember nothing of it."""
    connection = getattr(_local, "connections", {}).pop(origin, None)
    if connection is not None:
        connection.close()
    for known in (clock_offsets, withdrawals, down_since):
        known.pop(origin, None)


def send(
    connection: HTTPConnection,
    method: str,
    path: str,
    headers: Mapping[str, str],
    parts: Sequence[Buffer],
    size: int,
    timeout: float,
) -> None:
    """Write a request; large parts are sent as they are, without being joined first."""
    connection.timeout = timeout
    if connection.sock is not None:
        connection.sock.settimeout(timeout)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if method != "GET":
        connection.putheader("Content-Length", str(size))
    if size <= SMALL:
        connection.endheaders(b"".join(parts) or None)
        return
    connection.endheaders()
    for part in parts:
        connection.send(part)


def read_reply(
    origin: str,
    response: HTTPResponse,
    max_reply: int = MAX_REPLY,
    hasher: Callable[[], Any] | None = None,
    room: Callable[[int], memoryview] = room,
) -> Reply:
    """Read a reply of at most ``max_reply`` bytes.

    A large one is read into ``room`` for it, and hashed by a new ``hasher`` while it comes in.
    """
    # Proxies may change the case of names.
    headers = {name.lower(): value for name, value in response.headers.items()}
    _note(origin, headers)
    length = response.length
    if length is not None and length > max_reply:
        raise ConnectionError(f"the callback server's reply is too long ({length} bytes)")
    if max_reply > MAX_REPLY and length is not None:
        body = room(length)
        _read_large(response, body, digest := hasher() if hasher is not None else None)
        return Reply(response.status, headers, body, digest.digest() if digest is not None else None)
    return Reply(response.status, headers, response.read(max_reply))


def _read_large(response: HTTPResponse, body: memoryview, digest: Any) -> None:
    at = 0
    while at < body.nbytes:
        # What is hashed meanwhile, the peer can send the next of.
        count = response.readinto(body[at : at + PIECE])
        if not count:
            raise ConnectionError("the callback server's reply was cut short")
        if digest is not None:
            digest.update(body[at : at + count])
        at += count
    response.close()


def _note_withdrawals(origin: str, headers: Mapping[str, str], asked_at: float) -> None:
    withdrawn = headers.get("wove-withdrawn")
    if withdrawn is not None:
        if len(withdrawals) > 1_000:
            withdrawals.clear()
        withdrawals[origin] = (asked_at, withdrawn)


def _note(origin: str, headers: Mapping[str, str]) -> None:
    """Remember what a reply says of its server."""
    if down_since:
        down_since.pop(origin, None)
    sent_at = headers.get("wove-time")
    if sent_at is not None:
        try:
            if len(clock_offsets) > 1_000:
                clock_offsets.clear()
            now = time.time()
            clock_offsets[origin] = float(sent_at) - now, now - time.monotonic()
        except ValueError:
            pass
