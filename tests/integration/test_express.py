"""Reports that come in one piece are answered at once, others through aiohttp: nobody can tell the difference."""

from __future__ import annotations

import random
import re
import socket
from typing import TYPE_CHECKING

import pytest
from wove_tests.callbacks import (
    PATIENCE,
    Sink,
    event,
    events_path,
    kid,
    open_run,
    packed,
    result_body,
    signed,
    wait_until,
)

from wove import frames
from wove.callback_server import express
from wove.worker.plain_http import head_of, parse_head

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wove.callback_server.hub import Lease
    from wove.callback_server.runs import OpenRun


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs of which a report was answered at once."""
    seen: list[str] = []
    take = express.Connection._take

    def noticed(self: express.Connection, data: bytes) -> bool:
        seen.append(data[21:53].decode())  # beforehand: nobody is to read it before it is there
        done = take(self, data)
        if not done:
            seen.pop()
        return done

    monkeypatch.setattr(express.Connection, "_take", noticed)
    return seen


class Line:
    """One connection."""

    def __init__(self, lease: Lease) -> None:
        self.sock = socket.create_connection((lease.host, lease.port), timeout=PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read = b""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def reply(self) -> tuple[int, Mapping[str, str], bytes]:
        while (end := self.read.find(b"\r\n\r\n")) < 0:
            self._more()
        # aiohttp answers with the version that it read, if any.
        head = parse_head(self.read[:end].replace(b"HTTP/1.0", b"HTTP/1.1", 1), b"")
        assert head is not None, self.read
        self.read = self.read[end + 4 :]
        while len(self.read) < head.length:
            self._more()
        body, self.read = self.read[: head.length], self.read[head.length :]
        return head.status, head.headers, body

    def _more(self) -> None:
        more = self.sock.recv(65536)
        if not more:
            raise ConnectionResetError
        self.read += more


def report(run: OpenRun, body: bytes, *, final: bool = True, **changes: str) -> bytes:
    """A report as a worker writes it."""
    headers = {**signed(run, body, final=final), **{k.replace("_", "-"): v for k, v in changes.items()}}
    head = head_of("POST", events_path(run), "127.0.0.1", headers, len(body))
    assert head is not None
    return head + body


def ordinary(request: bytes) -> bytes:
    """The same in a form that is not known."""
    return request.replace(b"\r\nContent-Length", b"\r\nX-Other: 1\r\nContent-Length", 1)


def started(run: OpenRun, **fields: object) -> bytes:
    return packed([event(run, frames.TASK_STARTED, **fields)], execution="e1")


def test_a_report_is_taken_at_once(lease: Lease, sink: Sink, taken: list[str]) -> None:
    run = open_run(lease, sink)
    with Line(lease) as line:
        line.send(report(run, started(run), final=False))
        status, headers, body = line.reply()
        assert (status, body) == (204, b"")
        assert float(headers["wove-time"]) > 1e9
        line.send(report(run, result_body(run, {"a": 1})))
        assert line.reply()[0] == 204
        assert sink.outcome(run.run_id)["result"] == {"a": 1}
        line.send(report(run, result_body(run, 2)))
        status, headers, _ = line.reply()
        assert (status, headers["wove-ended"]) == (410, "1")
    assert taken == [run.run_id, run.run_id], "what is refused goes the ordinary way"


def test_each_answer_tells_whether_anything_was_withdrawn(lease: Lease, sink: Sink) -> None:
    def told(way: Callable[[bytes], bytes]) -> int:
        run = open_run(lease, sink)
        with Line(lease) as line:
            line.send(way(report(run, result_body(run, 1))))
            status, headers, _ = line.reply()
        assert status == 204
        return int(headers["wove-withdrawn"])

    before = lease.withdrawn
    assert before == told(lambda request: request) == told(ordinary), "outcomes are no withdrawals"
    run = open_run(lease, sink)
    lease.cancel_run(run.run_id)
    wait_until(lambda: lease.withdrawn == before + 1, "a cancelled run is counted")
    assert before + 1 == told(lambda request: request) == told(ordinary)
    lease.close_run(run.run_id)
    wait_until(lambda: lease.withdrawn == before + 2, "a closed run is counted")
    run = open_run(lease, sink)
    lease.renew_run(run, 2, None)
    assert lease.withdrawn == before + 3
    assert told(ordinary) == before + 3
    with Line(lease) as line:
        line.send(report(run, started(run), final=False))
        line.reply()
        wait_until(lambda: told(ordinary) == before + 4, "a run that a worker is still at is counted")
        line.send(report(run, started(run), final=False))
        line.reply()
    assert told(ordinary) == before + 4, "once"


CASES: dict[str, Callable[[OpenRun], bytes]] = {
    "result": lambda run: report(run, result_body(run, [1, 2])),
    "started": lambda run: report(run, started(run), final=False),
    "leave to start": lambda run: report(run, started(run, fence=True), final=False),
    "not final": lambda run: report(run, result_body(run, 1), final=False),
    "no outcome": lambda run: report(run, started(run)),
    "unknown key": lambda run: report(run, started(run), Wove_Key="nobody"),
    "wrong signature": lambda run: report(run, started(run), Wove_Signature="0" * 64),
    "other codec": lambda run: report(run, started(run), Content_Type="application/json"),
    "malformed": lambda run: report(run, b"\xc1" * 40, final=False),
    "malformed outcome": lambda run: report(run, b"\xc1" * 40),
    "empty": lambda run: report(run, b"", final=False),
    "too long news": lambda run: report(run, b"x" * (256 * 1024 + 1), final=False),
    "too long outcome": lambda run: report(run, b"x" * 5_000),
    "unknown run": lambda run: report(run, started(run)).replace(run.run_id.encode(), b"0" * 32),
}


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_answer_alike(lease: Lease, case: str, cancelled: bool) -> None:
    outcomes = []
    for way in (lambda request: request, ordinary):
        sink = Sink()
        run = open_run(lease, sink, max_body=4_000)
        if cancelled:
            lease.cancel_run(run.run_id)
            wait_until(lambda run=run: run.cancelled, "it is cancelled")
        with Line(lease) as line:
            line.send(way(CASES[case](run)))
            status, headers, _ = line.reply()
        told = {name for name in headers if name in ("wove-cancel", "wove-ended", "retry-after")}
        kinds = [(f["type"], f.get("error", {}).get("kind")) for f in sink.of(run.run_id)]
        outcomes.append((status, told, kinds, run.closed))
        lease.close_run(run.run_id)
    assert outcomes[0] == outcomes[1]


def test_one_execution_waits_for_another_both_ways(lease: Lease, sink: Sink) -> None:
    answers = []
    for way in (lambda request: request, ordinary):
        run = open_run(lease, sink)
        with Line(lease) as line:
            line.send(way(report(run, started(run), final=False)))
            line.reply()
            asks = packed([event(run, frames.TASK_STARTED, 2, fence=True)], execution="e2")
            line.send(way(report(run, asks, final=False)))
            status, headers, _ = line.reply()
            answers.append((status, headers["retry-after"]))
            line.send(way(report(run, started(run), final=False)))
            line.reply()
            line.send(way(report(run, asks, final=False)))
            answers.append(line.reply()[0])
    assert answers == [(503, "0.5"), 409, (503, "0.5"), 409]


def test_any_slices_and_any_mixture_on_one_connection(lease: Lease, sink: Sink, taken: list[str]) -> None:
    randomness = random.Random(7)
    with Line(lease) as line:
        whole, reported = [], []
        for number in range(60):
            run = open_run(lease, sink)
            request = report(run, result_body(run, "x" * randomness.choice([1, 300, 3_000])))
            kind = (
                randomness.choice(["whole", "sliced", "ordinary", "health", "gone"])
                if number > 4
                else "whole"
            )
            if kind == "ordinary":
                request = ordinary(request)
            elif kind == "health":
                request = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
            elif kind == "gone":
                # With a body it would end the connection.
                request = b"GET /wove/v1/payloads/" + b"0" * 32 + b" HTTP/1.1\r\nHost: h\r\n\r\n"
            elif kind == "whole":
                whole.append(run.run_id)
            if kind in ("whole", "ordinary", "sliced"):
                reported.append(run.run_id)
            if kind == "sliced":
                cuts = sorted(randomness.sample(range(1, len(request)), 3))
                for a, b in zip([0, *cuts], [*cuts, len(request)], strict=True):
                    line.send(request[a:b])
            else:
                line.send(request)
            assert line.reply()[0] == {"health": 200, "gone": 410}.get(kind, 204)
    assert [frame["run_id"] for frame in sink.frames] == reported, "each once, and in order"
    # Once a head has come in pieces, and whether it has is up to the sockets, its connection is aiohttp's for good.
    assert taken[:5] == whole[:5]


def test_after_a_request_of_known_length_reports_are_taken_at_once_again(
    lease: Lease, sink: Sink, taken: list[str]
) -> None:
    with Line(lease) as line:
        for ending in (b"", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"):
            run = open_run(lease, sink)
            request = ending or ordinary(report(run, started(run), final=False))
            line.send(request)
            assert line.reply()[0] in (200, 204)
            line.send(report(run, result_body(run, 1)))
            assert line.reply()[0] == 204
            assert taken.pop() == run.run_id


def test_who_does_not_wait_for_answers_gets_them_in_order(lease: Lease, sink: Sink, taken: list[str]) -> None:
    first, second, third = (open_run(lease, sink) for _ in range(3))
    with Line(lease) as line:
        line.send(
            report(first, started(first), final=False)
            + b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
            + report(second, result_body(second, 2))
        )
        assert [line.reply()[0] for _ in range(3)] == [204, 200, 204]
        line.send(report(third, result_body(third, 3)))
        assert line.reply()[0] == 204
    assert taken == []


def test_half_a_head_is_never_completed_by_a_report(lease: Lease, sink: Sink, taken: list[str]) -> None:
    run = open_run(lease, sink)
    with Line(lease) as line:
        line.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\nX-Swallows: ")
        line.send(report(run, result_body(run, 1)))
        with pytest.raises(ConnectionResetError):
            while True:
                assert line.reply()[0] in (200, 400, 404)
    assert taken == []
    assert not sink.of(run.run_id)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda request: request.replace(b"HTTP/1.1", b"HTTP/1.0"),
        lambda request: request.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost"),
        lambda request: request.replace(b"Wove-Final: 1", b"Wove-Final: 1\r\nWove-Final: 1"),
        lambda request: request.replace(b"Wove-Final: 1", b"Wove-Final: 1\nX: y"),
        lambda request: request.replace(b"Wove-Key: ", b"Wove-Key:  "),
        lambda request: request.replace(b"/wove/v1/", b"/x/../wove/v1/"),
        lambda request: re.sub(
            rb"Content-Length: (\d+)", rb"Content-Length: \1\r\nContent-Length: \1", request
        ),
        lambda request: re.sub(
            rb"Content-Length: (\d+)", rb"Content-Length: \1\r\nTransfer-Encoding: chunked", request
        ),
    ],
)
def test_other_forms_are_not_recognised(
    lease: Lease, sink: Sink, taken: list[str], spoilt: Callable[[bytes], bytes]
) -> None:
    run = open_run(lease, sink)
    with Line(lease) as line:
        line.send(spoilt(report(run, result_body(run, 1))))
        line.reply()
    assert taken == []


def test_a_connection_by_which_reports_come_is_an_executions_own(lease: Lease, sink: Sink) -> None:
    suspects = []
    run = open_run(lease, sink, on_suspect=suspects.append)
    with Line(lease) as line:
        line.send(report(run, started(run), final=False))
        assert line.reply()[0] == 204
        assert run.started
    wait_until(lambda: suspects, "the loss of the connection made it suspect")


def test_the_keys_name_is_the_one_that_workers_send() -> None:
    assert re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", kid().encode())
