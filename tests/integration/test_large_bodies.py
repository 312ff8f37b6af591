"""Large bodies at the listener: parts and messages that workers fetch, outcomes that come past aiohttp's buffers."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from wove_tests.callbacks import (
    Sink,
    ask,
    events_path,
    key_of,
    kid,
    listening,
    open_run,
    post,
    result_body,
    signed,
    wait_until,
)
from wove_tests.services import make_certificates

from wove import frames
from wove.callback_server import guard
from wove.callback_server.tls import read_tls
from wove.security import fetch_tag, part_tag
from wove.shared_parts import as_part
from wove.worker.connection import request

if TYPE_CHECKING:
    from wove.callback_server.hub import Lease
    from wove.callback_server.runs import OpenRun

PATIENCE = 15.0

#: One and a half times what is left to aiohttp, and not a whole number of anything.
SIZE = guard.LARGE_FROM * 3 // 2 + 7


@pytest.fixture
def run(lease: Lease, sink: Sink) -> OpenRun:
    return open_run(lease, sink)


def under_way(lease: Lease) -> int:
    """Return how many bytes of bodies the listener counts as under way."""
    assert lease._listener is not None
    return lease._listener.guard._bytes


def asking(run: OpenRun, tag: bytes) -> dict[str, str]:
    return {"Wove-Key": kid(), "Wove-Signature": tag.hex()}


class TestHandingOut:
    """``GET /wove/v1/payloads`` and ``GET /wove/v1/parts``."""

    @pytest.fixture
    def pieces(self) -> list[bytes | memoryview]:
        return [b"head", secrets.token_bytes(3_000_001), memoryview(np.arange(100_000)), b"", b"end"]

    @pytest.mark.parametrize("kind", ["payloads", "parts"])
    def test_whole_and_in_order(
        self, kind: str, pieces: list[bytes | memoryview], lease: Lease, sink: Sink
    ) -> None:
        part = as_part(list(pieces))
        run = open_run(lease, sink, message=list(pieces) if kind == "payloads" else None, part=part)
        tag = (fetch_tag if kind == "payloads" else part_tag)(key_of(run), run.run_id)
        origin = f"http://{lease.host}:{lease.port}"
        for _ in range(2):  # the connection is good for more
            reply = request(
                origin, "GET", f"/wove/v1/{kind}/{run.run_id}", asking(run, tag), max_reply=part.size
            )
            assert reply.status == 200
            assert reply.body == b"".join(pieces)

    def test_one_signature_does_not_open_the_other(self, lease: Lease, sink: Sink) -> None:
        run = open_run(lease, sink, message=[b"message"], part=as_part([b"part"]))
        key = key_of(run)
        for kind, wrong in (("payloads", part_tag), ("parts", fetch_tag)):
            path = f"/wove/v1/{kind}/{run.run_id}"
            reply = ask(lease, "GET", path, headers=asking(run, wrong(key, run.run_id)))
            assert (reply.status, reply.body) == (401, b"401: Unauthorized")
            assert ask(lease, "GET", path).status == 401

    def test_another_runs_signature_does_not_open_it(self, lease: Lease, sink: Sink) -> None:
        part = as_part([b"part"])
        run, other = (open_run(lease, sink, part=part) for _ in range(2))
        headers = asking(run, part_tag(key_of(other), run.run_id))
        assert ask(lease, "GET", f"/wove/v1/parts/{run.run_id}", headers=headers).status == 401

    @pytest.mark.parametrize("why", ["it has none", "it is cancelled", "it is closed"])
    def test_none_to_be_had(self, why: str, lease: Lease, sink: Sink) -> None:
        run = open_run(lease, sink, part=None if why == "it has none" else as_part([b"part"]))
        headers = asking(run, part_tag(key_of(run), run.run_id))
        if why == "it is cancelled":
            lease.cancel_run(run.run_id)
        elif why == "it is closed":
            lease.close_run(run.run_id)
        wait_until(lambda: run.part is None, "it is let go of")
        assert ask(lease, "GET", f"/wove/v1/parts/{run.run_id}", headers=headers).status == 410

    def test_a_reader_that_leaves_harms_nobody(
        self, lease: Lease, sink: Sink, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = open_run(lease, sink, part=as_part([secrets.token_bytes(20_000_000)]))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(fetching(run))
            assert connection.recv(100_000)
        assert post(lease, run, result_body(run, 1)).status == 204
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_reader_that_does_not_read_is_cut(
        self, lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
        run = open_run(lease, sink, part=as_part([secrets.token_bytes(40_000_000)]))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(fetching(run))
            wait_until(lambda: server_connections(lease) == 1, "it is there")
            wait_until(lambda: server_connections(lease) == 0, "it is cut")
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def fetching(run: OpenRun) -> bytes:
    """Return a request for a run's part."""
    lines = [f"{name}: {value}" for name, value in asking(run, part_tag(key_of(run), run.run_id)).items()]
    return "\r\n".join([f"GET /wove/v1/parts/{run.run_id} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def server_connections(lease: Lease) -> int:
    """Return how many connections the listener knows of."""
    assert lease._listener is not None
    return lease._listener.guard.connections


class TestTakingIn:
    """Outcomes of :data:`guard.LARGE_FROM` bytes and more."""

    @pytest.mark.parametrize("size", [guard.LARGE_FROM - 1_000, guard.LARGE_FROM, SIZE, 5_000_000])
    def test_sizes_around_the_threshold(self, size: int, lease: Lease, sink: Sink, run: OpenRun) -> None:
        value = secrets.token_bytes(size)
        assert post(lease, run, result_body(run, value)).status == 204
        assert sink.outcome(run.run_id)["result"] == value
        assert under_way(lease) == 0

    def test_an_array_is_aligned_and_may_be_written_to(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        array = np.arange(SIZE // 8, dtype=np.float64)
        assert post(lease, run, result_body(run, {"name": "x", "array": array})).status == 204
        result = sink.outcome(run.run_id)["result"]["array"]
        assert np.array_equal(result, array)
        assert result.flags.aligned
        assert result.flags.writeable
        result[0] = 5

    def test_the_reply_ends_the_connection(self, lease: Lease, run: OpenRun) -> None:
        reply = post(lease, run, result_body(run, secrets.token_bytes(SIZE)))
        assert reply.headers["Connection"] == "close"

    def test_a_worker_goes_on_with_another_connection(self, lease: Lease, sink: Sink) -> None:
        for _ in range(3):
            run = open_run(lease, sink)
            body = result_body(run, secrets.token_bytes(SIZE))
            reply = request(
                f"http://{lease.host}:{lease.port}", "POST", events_path(run), signed(run, body), [body]
            )
            assert reply.status == 204
            assert sink.outcome(run.run_id)["type"] == frames.TASK_RESULT

    def test_in_pieces(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        value = secrets.token_bytes(SIZE)
        body = result_body(run, value)
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head_of(run, body))
            for at in range(0, len(body), 100_003):
                connection.sendall(body[at : at + 100_003])
                time.sleep(0.002)  # so that they come one by one; nothing depends on it
            assert connection.recv(100).startswith(b"HTTP/1.1 204")
        assert sink.outcome(run.run_id)["result"] == value

    @pytest.mark.parametrize("sent", [0, 1_000, guard.LARGE_FROM + 5])
    @pytest.mark.parametrize("end", ["close", "half"])
    def test_cut_in_the_middle(self, sent: int, end: str, lease: Lease, sink: Sink, run: OpenRun) -> None:
        body = result_body(run, secrets.token_bytes(SIZE))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head_of(run, body) + body[:sent])
            wait_until(lambda: under_way(lease) == len(body), "it is being read")
            if end == "half":
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1_000):
                    pass
        wait_until(lambda: under_way(lease) == 0, "it is let go of")
        assert sink.of(run.run_id) == []
        # It is offered again.
        assert post(lease, run, body).status == 204
        assert sink.outcome(run.run_id)["type"] == frames.TASK_RESULT

    def test_one_that_does_not_flow(
        self, lease: Lease, sink: Sink, run: OpenRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
        monkeypatch.setattr(guard, "SLOWEST_BODY", 1024 * 1024 * 1024)
        body = result_body(run, secrets.token_bytes(SIZE))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head_of(run, body) + body[:-1])
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            while connection.recv(1_000):
                pass
        wait_until(lambda: under_way(lease) == 0, "it is let go of")
        assert sink.of(run.run_id) == []

    def test_a_run_that_is_closed_meanwhile(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        body = result_body(run, secrets.token_bytes(SIZE))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head_of(run, body) + body[:-1])
            wait_until(lambda: under_way(lease) == len(body), "it is being read")
            lease.close_run(run.run_id)
            wait_until(lambda: lease.find(run.run_id) is None, "it is closed")
            connection.sendall(body[-1:])
            assert connection.recv(100).startswith(b"HTTP/1.1 410")
        assert sink.of(run.run_id) == []

    def test_many_at_once(self, lease: Lease, sink: Sink) -> None:
        runs = [open_run(lease, sink) for _ in range(8)]
        values = [secrets.token_bytes(SIZE) for _ in runs]
        connections = []
        for run, value in zip(runs, values, strict=True):
            body = result_body(run, value)
            connection = socket.create_connection((lease.host, lease.port), timeout=PATIENCE)
            connections.append((connection, body))
            connection.sendall(head_of(run, body) + body[: SIZE // 2])
        for connection, body in connections:
            connection.sendall(body[SIZE // 2 :])
        for connection, _ in connections:
            assert connection.recv(100).startswith(b"HTTP/1.1 204")
            connection.close()
        assert [sink.outcome(run.run_id)["result"] for run in runs] == values


def head_of(run: OpenRun, body: bytes) -> bytes:
    """Return the head of an events request."""
    headers = {"Host": "x", **signed(run, body), "Content-Length": str(len(body))}
    lines = [f"POST {events_path(run)} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def test_both_ways_over_tls(
    sink: Sink, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = make_certificates(tmp_path_factory.mktemp("tls"))
    monkeypatch.setenv("WOVE_CA", certificates.authority)
    with listening(read_tls({"certificate": certificates.certificate, "key": certificates.key})) as lease:
        part = as_part([b"head", secrets.token_bytes(SIZE)])
        run = open_run(lease, sink, part=part)
        origin = f"https://{lease.host}:{lease.port}"
        headers = asking(run, part_tag(key_of(run), run.run_id))
        reply = request(origin, "GET", f"/wove/v1/parts/{run.run_id}", headers, max_reply=part.size)
        assert reply.body == b"".join(bytes(piece) for piece in part.message)
        value = secrets.token_bytes(5_000_000)
        body = result_body(run, value)
        assert request(origin, "POST", events_path(run), signed(run, body), [body]).status == 204
        assert sink.outcome(run.run_id)["result"] == value
