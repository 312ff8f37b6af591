"""The TCP proxy of the fault tests, between a real client and a real server."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING

import pytest
from wove_tests.callbacks import wait_until
from wove_tests.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 5.0
#: Seconds without an answer after which nobody is taken to answer.
SILENCE = 0.3


class UpperCase(socketserver.ThreadingTCPServer):
    """Answers each line in capitals and remembers it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _UpperCaseHandler)


class _UpperCaseHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, UpperCase)
        with contextlib.suppress(OSError):
            for line in self.rfile:
                self.server.lines.append(line)
                self.wfile.write(line.upper())


@pytest.fixture
def server() -> Iterator[UpperCase]:
    with UpperCase() as upstream:
        thread = threading.Thread(target=upstream.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield upstream
        upstream.shutdown()
        thread.join()


@pytest.fixture
def proxy(server: UpperCase) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", server.server_address[1]) as running:
        yield running


@contextlib.contextmanager
def connected(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=SECONDS) as client:
        yield client


def read(client: socket.socket, count: int) -> bytes:
    """Read so many bytes, fewer only at the end of the connection."""
    data = b""
    while len(data) < count and (more := client.recv(count - len(data))):
        data += more
    return data


def answers(client: socket.socket, line: bytes = b"hello\n") -> bool:
    client.sendall(line)
    return read(client, len(line)) == line.upper()


def test_passes_everything_both_ways(proxy: TcpProxy) -> None:
    long_line = b"x" * 300_000 + b"\n"
    with connected(proxy) as one, connected(proxy) as two:
        assert answers(one) and answers(two) and answers(one, long_line)


def test_passes_the_end_of_a_connection_on(proxy: TcpProxy, server: UpperCase) -> None:
    with connected(proxy) as client:
        client.sendall(b"last\n")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 100) == b"LAST\n"
    wait_until(lambda: proxy.connections == 0, "the connection is gone")


def test_down_refuses_and_cuts_and_up_listens_on_the_same_port(proxy: TcpProxy) -> None:
    for _ in range(3):
        with connected(proxy) as client:
            assert answers(client)
            proxy.down()
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        for _ in range(20):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", proxy.port), timeout=SECONDS)
        proxy.up()
        with connected(proxy) as client:
            assert answers(client)


def test_reset_sends_rst_to_those_who_are_there_and_those_who_come(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        assert answers(client)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    # It may come before connect() returns.
    with pytest.raises(ConnectionResetError), connected(proxy) as client:
        client.recv(1)
    proxy.up()
    with connected(proxy) as client:
        assert answers(client)


@pytest.mark.parametrize(("direction", "arrives"), [("both", False), ("request", False), ("response", True)])
def test_a_black_hole_accepts_and_answers_nothing(
    proxy: TcpProxy, server: UpperCase, direction: str, arrives: bool
) -> None:
    with connected(proxy) as before:
        assert answers(before)
        proxy.black_hole(direction)
        with connected(proxy) as client:
            for caught in (before, client):
                caught.sendall(b"caught\n")
                caught.settimeout(SILENCE)
                with pytest.raises(TimeoutError):
                    caught.recv(1)
            assert (server.lines.count(b"caught\n") == 2) is arrives
            proxy.up()
            for caught in (before, client):
                # The bytes are gone, so the connections are no good any more.
                caught.settimeout(SECONDS)
                with contextlib.suppress(ConnectionResetError):
                    assert caught.recv(1) == b""
    with connected(proxy) as client:
        assert answers(client)


def test_a_connection_that_nothing_was_swallowed_from_outlives_a_black_hole(proxy: TcpProxy) -> None:
    with connected(proxy) as client:
        assert answers(client)
        proxy.black_hole()
        proxy.up()
        assert answers(client)


@pytest.mark.parametrize("before", [1, 4])
def test_cut_after_commit_lets_the_server_act_and_keeps_the_answer(
    proxy: TcpProxy, server: UpperCase, before: int
) -> None:
    with connected(proxy) as client:
        assert answers(client, b"earlier\n")
        proxy.cut_after_commit(before)
        client.sendall(b"commit\n")
        assert read(client, 100) == b"COMMIT\n"[: before - 1]
    assert b"commit\n" in server.lines


@pytest.mark.parametrize(("direction", "least"), [("both", 0.3), ("request", 0.15), ("response", 0.15)])
def test_latency_delays_each_way(proxy: TcpProxy, direction: str, least: float) -> None:
    proxy.latency(0.2, jitter=0.05, direction=direction)
    with connected(proxy) as client:
        begun = time.monotonic()
        assert answers(client)
        assert time.monotonic() - begun >= least


def test_slicer_passes_everything_in_small_pieces(proxy: TcpProxy) -> None:
    line = bytes(97 + n % 26 for n in range(2_000)) + b"\n"
    with connected(proxy) as client:
        proxy.slicer(7, direction="response")
        client.sendall(line)
        wait_until(lambda: client.recv(1, socket.MSG_PEEK), "the answer has begun")
        assert read(client, len(line)) == line.upper()


def test_a_server_that_is_not_there_closes_the_clients_connection(server: UpperCase) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with TcpProxy("127.0.0.1", nobody.getsockname()[1]) as proxy, connected(proxy) as client:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""


def test_leaving_ends_every_connection_whatever_the_weather(server: UpperCase) -> None:
    for weather in (TcpProxy.up, TcpProxy.black_hole, TcpProxy.down):
        with TcpProxy("127.0.0.1", server.server_address[1]) as proxy, connected(proxy) as client:
            assert answers(client)
            weather(proxy)
        assert not proxy.connections


def test_the_weather_may_change_from_any_thread(proxy: TcpProxy) -> None:
    def shake() -> None:
        for verb in (proxy.down, proxy.reset, proxy.black_hole, proxy.cut, proxy.up) * 5:
            verb()

    threads = [threading.Thread(target=shake) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.up()
    assert proxy.weather == "up"
    with connected(proxy) as client:
        assert answers(client)
