"""The worker's own reader of replies: plain ones in any slices, and everything else left to http.client."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from wove.worker import connection, plain_http
from wove.worker.plain_http import Head, head_of, parse_head

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nWove-Time: 12.5\r\n\r\nhello"


class Scripted:
    """A server that answers each request of one connection after another with the pieces it is given."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.replies: list[list[bytes]] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.listening.accept()
            except OSError:
                return
            self.connections += 1
            with peer:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self.replies and (request := self._read(peer)):
                    self.requests.append(request)
                    pieces = self.replies.pop(0)
                    for piece in pieces:
                        if piece == b"":
                            break
                        peer.sendall(piece)
                    else:
                        continue
                    break

    def _read(self, peer: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            more = peer.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line.split(b":")[1]):
                    body += peer.recv(65536)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self.listening.close()


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.close()
    connections = getattr(connection._local, "connections", {})
    if (kept := connections.pop(scripted.origin, None)) is not None:
        kept.close()


def post(server: Scripted, body: bytes = b"x") -> connection.Reply:
    return connection.request(server.origin, "POST", "/there", {"Wove-Key": "k"}, [body], timeout=5.0)


def test_a_plain_reply_is_read_in_any_slices(server: Scripted) -> None:
    cuts = [[PLAIN], [PLAIN[:1], PLAIN[1:]], [PLAIN[i : i + 1] for i in range(len(PLAIN))]]
    cuts += [[PLAIN[:at], PLAIN[at:]] for at in range(10, len(PLAIN), 7)]
    server.replies = [list(cut) for cut in cuts]
    for _ in cuts:
        reply = post(server)
        assert (reply.status, bytes(reply.body), reply.headers["wove-time"]) == (200, b"hello", "12.5")
    assert server.connections == 1
    assert server.requests[0] == (
        f"POST /there HTTP/1.1\r\nHost: {server.origin[7:]}\r\nWove-Key: k\r\nContent-Length: 1\r\n\r\nx".encode()
    )


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Folded: a\r\n b\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-LENGTH:5\r\n\r\nhello",
    ],
)
def test_unusual_replies_are_understood_and_the_connection_is_kept(server: Scripted, reply: bytes) -> None:
    server.replies = [[reply], [PLAIN], [reply[:30], reply[30:]], [PLAIN]]
    for _ in range(4):
        answer = post(server)
        assert (answer.status, bytes(answer.body)) == (200, b"hello")
    assert server.connections == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_a_reply_that_ends_its_connection_is_followed_by_another_connection(
    server: Scripted, reply: bytes
) -> None:
    server.replies = [[reply, b""], [reply, b""]]
    for _ in range(2):
        answer = post(server)
        assert (answer.status, bytes(answer.body)) == (200, b"hello")
    assert server.connections == 2


def test_what_follows_a_reply_unasked_is_no_reply_to_the_next_request(server: Scripted) -> None:
    forged = b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"
    server.replies = [[PLAIN + forged, b""], [PLAIN]]
    assert post(server).status == 200
    assert post(server).status == 200
    assert server.connections == 2


def test_a_connection_closed_while_idle_is_replaced_once(server: Scripted) -> None:
    server.replies = [[PLAIN, b""], [PLAIN]]
    assert post(server).status == 200
    assert post(server).status == 200
    assert server.connections == 2


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", PLAIN[:-2], b"SSH-2.0-OpenSSH\r\n"])
def test_no_reply_is_an_error(server: Scripted, reply: bytes) -> None:
    import http.client

    server.replies = [[reply, b""]] * 2
    with pytest.raises((OSError, http.client.HTTPException)):
        post(server)


def test_204_has_no_body_and_too_long_a_reply_is_refused(server: Scripted) -> None:
    server.replies = [[b"HTTP/1.1 204 No Content\r\nWove-Time: 1.0\r\n\r\n"], [PLAIN]]
    assert (post(server).status, post(server).status) == (204, 200)
    server.replies = [[b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"]]
    with pytest.raises(ConnectionError, match="too long"):
        post(server)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/2 200 OK\r\nContent-Length: 1",
        b"HTTP/1.1 2x0 OK\r\nContent-Length: 1",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2",
        b"HTTP/1.1 200 OK\r\nContent-Length : 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\nX: y",
        b"HTTP/1.1 200 OK\r\nnothing",
        b"",
    ],
)
def test_heads_that_are_left_to_http_client(head: bytes) -> None:
    assert parse_head(head, b"") is None


def test_a_head_that_is_read_here() -> None:
    head = parse_head(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\nWove-Ended: 1", b"")
    assert isinstance(head, Head)
    assert (head.status, head.headers["wove-ended"], head.length) == (410, "1", 0)
    assert plain_http.stays_open(head)


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y", "/a\tb", "/ü"])
def test_paths_that_are_left_to_http_client(path: str) -> None:
    assert head_of("POST", path, "h", {}, 0) is None


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nX: y", "a\rb", "a\0b", "ü"])
def test_header_values_that_are_left_to_http_client(value: str) -> None:
    assert head_of("POST", "/", "h", {"A": value}, 0) is None
