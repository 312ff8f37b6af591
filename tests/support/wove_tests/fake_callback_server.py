"""A callback server that answers what the test tells it, from the standard library alone."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from wove.security import beat_tag, cancel_tag, event_tag, reply_tag
from wove.wire import decode_value, unpack_message
from wove_tests.callbacks import wait_until

if TYPE_CHECKING:
    from typing import Self

    from wove.frames import Frame
    from wove_tests.callbacks import Payload

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Answer:
    """What is said to one request, or done instead.

    ``status`` None: the connection is reset, or closed after the bytes ``raw``. ``read`` False: the answer
    comes before the body is read, which then never is. ``after``: an event to wait for first.
    """

    status: int | None = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    read: bool = True
    raw: bytes | None = None
    after: threading.Event | None = None


RESET = Answer(None)


@dataclass
class Request:
    """One request as it arrived."""

    kind: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: tuple[str, int]
    at: float
    status: int | None = None

    @property
    def final(self) -> bool:
        """Whether it brought an outcome."""
        return self.headers.get("wove-final") == "1"

    @property
    def accepted(self) -> bool:
        """Whether it was answered with a 2xx status."""
        return self.status is not None and self.status < 300

    def frames(self, payload: Payload) -> list[Frame]:
        """Verify the request with the run's key and return its events, results decoded."""
        codec = self.headers["content-type"]
        tag = event_tag(payload.key, payload.run_id, codec, self.final, [self.body])
        assert self.headers["wove-signature"] == tag.hex()
        assert self.headers["wove-key"] == payload.kid
        envelope, attachments = unpack_message(self.body)
        for frame in envelope["frames"]:
            frame["worker"] = envelope["worker"]
            if "result" in frame:
                frame["result"] = decode_value(frame["result"], attachments)
        frames: list[Frame] = envelope["frames"]
        return frames


class Beat:
    """One beat that is held."""

    def __init__(self, request: Request) -> None:
        self.request = request
        first, *lines = request.body.decode().split("\n")
        self.hold = float(first.removeprefix("hold "))
        self.lines = [line.split(" ") for line in lines]
        self.answered = threading.Event()
        self.answer = Answer(200)

    def line(self, payload: Payload) -> list[str]:
        """Return what it says of a run: word, run id, execution, attempt, count, key id, signature; verified."""
        (line,) = [line for line in self.lines if line[1] == payload.run_id]
        _, run_id, execution, attempt, count, kid, tag = line
        assert tag == beat_tag(payload.key, run_id, execution, int(attempt), int(count)).hex()
        assert kid == payload.kid
        return line

    def names(self, payload: Payload) -> bool:
        """Whether it speaks of a run."""
        return any(line[1] == payload.run_id for line in self.lines)

    def release(self, answer: Answer | None = None) -> None:
        """Answer it now."""
        self.answer = answer or self.answer
        self.answered.set()

    def cancel(self, payload: Payload, key: bytes | None = None) -> None:
        """Answer it with the cancellation of a run."""
        _, run_id, execution, _, count, *_ = self.line(payload)
        tag = cancel_tag(key or payload.key, run_id, execution, int(count))
        self.release(Answer(200, body=f"cancel {execution} {tag.hex()}".encode()))


class FakeCallbackServer:
    """Listens at once, or with ``listen=False`` when :meth:`start` is called.

    Every request is answered with the next answer in ``script[kind]``, kinds being ``events``, ``beats`` and
    ``payloads``; when there is none, events are taken, beats are held for their time, and payloads are those
    in ``messages``, by run id; with ``cancel_with``, a key, answers to events say that the run is cancelled.
    Bodies over ``max_body`` are refused by their head, as a real one does it. ``tells_time``: whether answers tell the clock, as those of a real one do.
    """

    def __init__(self, *, listen: bool = True, tells_time: bool = True) -> None:
        self.requests: list[Request] = []
        self.script: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self.beats: list[Beat] = []
        self.messages: dict[str, bytes] = {}
        self.cancel_with: bytes | None = None
        self.max_body: int | None = None
        self.tells_time = tells_time
        self.connections: set[socket.socket] = set()
        # Bound from the beginning: what does not listen yet refuses connections, on a port that stays ours.
        self._server = _Server((LOOPBACK, 0), _Handler, bind_and_activate=False)
        self._server.fake = self
        self._server.server_bind()
        self._thread: threading.Thread | None = None
        if listen:
            self.start()

    @property
    def url(self) -> str:
        """The callback URL."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def start(self) -> None:
        """Listen."""
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and close every connection."""
        for beat in list(self.beats):
            beat.release(RESET)
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def answer(self, kind: str, request: Request) -> Answer:
        """Return what is said when the script says nothing."""
        if kind == "beats":
            beat = Beat(request)
            self.beats.append(beat)
            beat.answered.wait(beat.hold)
            return beat.answer
        if kind == "payloads":
            message = self.messages.get(request.path.rpartition("/")[2])
            return Answer(410) if message is None else Answer(200, body=message)
        if self.cancel_with is not None:
            tag = reply_tag(self.cancel_with, bytes.fromhex(request.headers["wove-signature"]), b"cancel")
            return Answer(200, {"Wove-Cancel": tag.hex()})
        return Answer()

    # --- what came ------------------------------------------------------------

    def events(self, payload: Payload) -> list[Request]:
        """Return the events requests of a run, in the order they came, whatever was answered."""
        path = f"/wove/v1/events/{payload.run_id}"
        return [request for request in list(self.requests) if request.path == path]

    def taken(self, payload: Payload) -> list[Frame]:
        """Return the events of a run that were taken."""
        return [f for r in self.events(payload) if r.accepted for f in r.frames(payload)]

    def kinds(self, payload: Payload) -> list[str]:
        """Return the types of a run's events that were taken."""
        return [frame["type"] for frame in self.taken(payload)]

    def outcomes(self, payload: Payload) -> list[Request]:
        """Return the requests that brought an outcome, whatever was answered."""
        return [request for request in self.events(payload) if request.final]

    def beat(self, payload: Payload, number: int = 1) -> Beat:
        """Wait for the beat that is the ``number``-th to speak of a run."""
        beats: list[Beat] = wait_until(
            lambda: found if len(found := [b for b in self.beats if b.names(payload)]) >= number else None,
            f"beat {number} of run {payload.run_id} is held",
        )
        return beats[number - 1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeCallbackServer

    def server_bind(self) -> None:
        """Bind, without asking the resolver for a name that nobody needs."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that break connections are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.fake: FakeCallbackServer = self.server.fake
        self.fake.connections.add(self.connection)

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        kind = self.path.split("/")[3] if self.path.count("/") >= 3 else ""
        answer = self.fake.script[kind].popleft() if self.fake.script[kind] else None
        length = int(self.headers.get("Content-Length") or 0)
        if self.fake.max_body is not None and length > self.fake.max_body:
            answer = Answer(413, read=False)
        body = self.rfile.read(length) if answer is None or answer.read else b""
        headers = {name.lower(): value for name, value in self.headers.items()}
        peer = (self.client_address[0], self.client_address[1])
        request = Request(kind, self.path, headers, body, peer, time.monotonic())
        if answer is None:
            answer = self.fake.answer(kind, request)
        elif answer.after is not None:
            answer.after.wait(30)
        request.status = answer.status
        self.fake.requests.append(request)
        self._give(answer)

    def _give(self, answer: Answer) -> None:
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            self.close_connection = True
            return
        if answer.status is None:
            # With a linger of no time, closing is a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        if self.fake.tells_time:
            self.send_header("Wove-Time", f"{time.time():.6f}")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        if not answer.read:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(answer.body)
