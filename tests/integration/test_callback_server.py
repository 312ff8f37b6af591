"""The callback server on a real socket: what it takes, what it refuses, and what nobody can do to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import os
import pickle
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

import msgpack
import pytest
from wove_tests import tasks
from wove_tests.callbacks import (
    ENVIRONMENT,
    MSGPACK,
    Reply,
    Sink,
    ask,
    child_environment,
    event,
    events_path,
    key_of,
    kid,
    listening,
    open_run,
    packed,
    post,
    result_body,
    signed,
    wait_until,
)
from wove_tests.recorder import DECODERS, record_calls

from wove import frames
from wove.callback_server import guard, hub, routes
from wove.remote_errors import encode_exception, error_from_frame
from wove.security import (
    SecretRing,
    beat_tag,
    cancel_tag,
    event_tag,
    fetch_tag,
    refusals,
    reply_tag,
    webhook_token,
)
from wove.wire import encode_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from wove.callback_server.hub import Lease
    from wove.callback_server.runs import OpenRun

JSON = "application/json"

#: Seconds until an answer that does not come fails the test.
PATIENCE = 10.0


@pytest.fixture
def run(lease: Lease, sink: Sink) -> OpenRun:
    """An open run."""
    return open_run(lease, sink)


@pytest.fixture
def bystander(lease: Lease, sink: Sink) -> OpenRun:
    """Another open run, to which nothing may happen."""
    return open_run(lease, sink)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that are held."""
    with ThreadPoolExecutor(4, "test-request") as pool:
        yield pool


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoders that were called, whoever called them."""
    return record_calls(monkeypatch, *DECODERS)


# --- speaking to it ----------------------------------------------------------


def converse(lease: Lease, data: bytes) -> bytes:
    """Send raw bytes and return everything that comes until the server closes."""
    with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the server closes, by a FIN or by a reset; TimeoutError if it does not."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            answer += chunk
    return answer


def head_of(path: str, **headers: str) -> bytes:
    """Return the head of a POST request."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: tests", *lines, "", ""]).encode("latin-1")


def status_of(answer: bytes) -> int:
    """Return the status of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def assert_open(lease: Lease, sink: Sink, run: OpenRun) -> None:
    """A run still takes its outcome, and has had nothing but."""
    assert sink.of(run.run_id) == []
    assert post(lease, run, result_body(run, "still here")).status == 204
    assert sink.outcome(run.run_id)["result"] == "still here"


# --- events ------------------------------------------------------------------


class TestEvents:
    """Signed events arrive at the sink, in their order."""

    def test_msgpack(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        value = {"point": tasks.Point(1, 2), "tuple": (1, {2})}
        attachments: list[Any] = []
        described = encode_value(value, attachments)
        batch = [
            event(run, frames.TASK_STARTED),
            event(run, frames.PROGRESS, 2, fraction=0.5, message="half"),
            event(run, frames.TASK_RESULT, 3, result=described),
        ]
        reply = post(lease, run, packed(batch, attachments, worker={"host": "there", "pid": 7}))
        assert reply.status == 204
        assert sink.kinds(run.run_id) == ["task_started", "progress", "task_result"]
        assert sink.outcome(run.run_id)["result"] == value
        assert [f["seq"] for f in sink.frames] == [1, 2, 3]
        assert {f["worker"]["host"] for f in sink.frames} == {"there"}

    def test_news_leave_the_run_open(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        for seq, kind in enumerate((frames.TASK_STARTED, frames.HEARTBEAT), start=1):
            assert post(lease, run, packed([event(run, kind, seq)]), final=False).status == 204
        assert sink.kinds(run.run_id) == ["task_started", "heartbeat"]
        assert post(lease, run, result_body(run, 3)).status == 204
        assert sink.outcome(run.run_id)["result"] == 3

    def test_an_exception_arrives_as_itself(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        attachments: list[Any] = []
        chain = encode_exception(tasks.TwoArguments(7, "seven"), attachments)
        error = {"kind": "TwoArguments", "message": "7: seven", "traceback": "", "source": "task"}
        body = packed([event(run, frames.TASK_ERROR, error=error, exception=chain)], attachments)
        assert post(lease, run, body).status == 204
        exc = error_from_frame(sink.outcome(run.run_id))
        assert isinstance(exc, tasks.TwoArguments)
        assert (exc.code, exc.reason) == (7, "seven")

    def test_json_by_a_worker_in_another_language(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        # Nothing of Wove is called here: this is what its documentation has to tell such a worker.
        secret = os.environ["WOVE_SECRET"].encode()
        extracted = hmac.digest(ENVIRONMENT.encode(), secret, "sha256")
        event_key = hmac.digest(extracted, b"wove/1 event\x01", "sha256")

        def mac(key: bytes, fields: Sequence[bytes], rest: bytes = b"") -> bytes:
            return hmac.digest(key, b"".join(struct.pack(">I", len(f)) + f for f in fields) + rest, "sha256")

        run_key = mac(event_key, [run.run_id.encode(), run.nonce])
        common = f'"run_id": "{run.run_id}", "task_id": "t", "attempt": 1'
        body = f"""
            {{"frames": [
                {{"type": "task_started", {common}, "seq": 1}},
                {{"type": "progress", {common}, "seq": 2, "fraction": 0.5, "message": "half"}},
                {{"type": "task_result", {common}, "seq": 3, "result": {{
                    "plain": [1, 2.5, null, true, "text"],
                    "tuple": {{"__wove__": "tuple", "v": [1, {{"__wove__": "set", "v": [2, 3]}}]}},
                    "bytes": {{"__wove__": "bytes", "v": "{base64.b64encode(bytes(range(256))).decode()}"}},
                    "int": {{"__wove__": "int", "v": "{hex(2**100)}"}},
                    "when": {{"__wove__": "datetime", "v": "2025-01-02T03:04:05+00:00"}},
                    "price": {{"__wove__": "decimal", "v": "12.50"}}
                }}}}
            ], "worker": {{"host": "a.example", "pid": 1}}}}""".encode()
        kid = hmac.digest(secret, b"wove/1 key id", "sha256").hex()[:8]
        tag = mac(run_key, [b"wove/1 event", run.run_id.encode(), b"application/json", b"1"], body)
        reply = ask(
            lease,
            "POST",
            f"/wove/v1/events/{run.run_id}",
            body,
            {
                "Content-Type": "application/json",
                "Wove-Key": kid,
                "Wove-Signature": tag.hex(),
                "Wove-Final": "1",
            },
        )
        assert reply.status == 204
        assert sink.kinds(run.run_id) == ["task_started", "progress", "task_result"]
        assert sink.outcome(run.run_id)["result"] == {
            "plain": [1, 2.5, None, True, "text"],
            "tuple": (1, {2, 3}),
            "bytes": bytes(range(256)),
            "int": 2**100,
            "when": datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
            "price": Decimal("12.50"),
        }
        assert sink.outcome(run.run_id)["worker"]["host"] == "a.example"

    def test_a_json_error(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        error = {"kind": "KeyError", "message": "'missing'", "traceback": "line 1", "retryable": False}
        body = json.dumps({"frames": [event(run, frames.TASK_ERROR, error=error)]}).encode()
        assert post(lease, run, body, JSON).status == 204
        assert sink.outcome(run.run_id)["error"] == error

    def test_types_of_a_newer_worker_harm_nothing(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        batch = [event(run, "task_paused", 1), event(run, frames.LOG, 2, message="after it")]
        assert post(lease, run, packed(batch), final=False).status == 204
        assert sink.of(run.run_id)[-1]["message"] == "after it"
        assert post(lease, run, result_body(run, 1)).status == 204

    def test_a_large_result(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        value = secrets.token_bytes(guard.LARGE_FROM + 1)
        assert post(lease, run, result_body(run, value)).status == 204
        assert sink.outcome(run.run_id)["result"] == value

    def test_a_secret_that_is_being_rotated_out(self, lease: Lease, sink: Sink) -> None:
        # The worker still has the old one alone, which is the second here.
        old = os.environ["WOVE_SECRET"]
        run = open_run(lease, sink, ring=SecretRing.parse(f"{secrets.token_hex(32)},{old}", "a test"))
        assert post(lease, run, result_body(run, 1)).status == 204
        assert sink.outcome(run.run_id)["result"] == 1

    def test_an_outcome_is_taken_once(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        body = result_body(run, 1)
        assert post(lease, run, body).status == 204
        assert post(lease, run, body).status == 410
        assert post(lease, run, result_body(run, 2)).status == 410
        assert sink.outcome(run.run_id)["result"] == 1

    def test_a_connection_serves_many_requests(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        connection = http.client.HTTPConnection(lease.host, lease.port, timeout=PATIENCE)
        connection.connect()
        first = connection.sock
        with contextlib.closing(connection):
            for seq in range(1, 6):
                body = packed([event(run, frames.HEARTBEAT, seq)])
                connection.request("POST", events_path(run), body, signed(run, body, final=False))
                assert connection.getresponse().read() == b""
            assert connection.sock is first
        assert len(sink.of(run.run_id)) == 5

    def test_replies_tell_the_clock(self, lease: Lease, run: OpenRun) -> None:
        # By it workers tell how long a payload has waited.
        before = time.time()
        reply = post(lease, run, packed([event(run, frames.HEARTBEAT)]), final=False)
        assert before - 0.001 <= float(reply.headers["Wove-Time"]) <= time.time() + 0.001

    def test_healthz(self, lease: Lease) -> None:
        reply = ask(lease, "GET", "/healthz")
        assert reply.status == 200
        assert json.loads(reply.body) == {"status": "ok"}


# --- who may speak -----------------------------------------------------------


def _without(name: str) -> Callable[[OpenRun, OpenRun, bytes], dict[str, str]]:
    def headers(run: OpenRun, other: OpenRun, body: bytes) -> dict[str, str]:
        right = signed(run, body)
        del right[name]
        return right

    return headers


def _with(**changes: str) -> Callable[[OpenRun, OpenRun, bytes], dict[str, str]]:
    renamed = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda run, other, body: {**signed(run, body), **renamed}


FORGERIES: dict[str, Callable[[OpenRun, OpenRun, bytes], dict[str, str]]] = {
    "no signature": _without("Wove-Signature"),
    "no key id": _without("Wove-Key"),
    "an unknown key id": _with(Wove_Key="nobody's"),
    "zeros": _with(Wove_Signature="0" * 64),
    "half a signature": lambda run, other, body: {
        **signed(run, body),
        "Wove-Signature": signed(run, body)["Wove-Signature"][:32],
    },
    "no hexadecimal": _with(Wove_Signature="x" * 64),
    "bytes beyond ASCII": _with(Wove_Signature="\xff\xfe", Wove_Key="\xff"),
    "a key id beyond ASCII": _with(Wove_Key="\xff"),
    "a codec beyond ASCII": _with(Content_Type="application/\xff"),
    "another run's signature": lambda run, other, body: signed(other, body),
    "the signature of another body": lambda run, other, body: signed(run, body + b"x"),
    "the signature of a plain report": lambda run, other, body: {
        **signed(run, body, final=False),
        "Wove-Final": "1",
    },
    "the signature of a final report": _with(Wove_Final="0"),
    "the signature of another codec": _with(Content_Type=JSON),
    "a fetch signature": lambda run, other, body: {
        **signed(run, body),
        "Wove-Signature": fetch_tag(key_of(run), run.run_id).hex(),
    },
}


class TestSignatures:
    """What is not signed with the run's key is refused before anything is decoded."""

    @pytest.mark.parametrize("forgery", FORGERIES)
    def test_a_forgery(
        self,
        lease: Lease,
        sink: Sink,
        run: OpenRun,
        bystander: OpenRun,
        decoded: list[str],
        caplog: pytest.LogCaptureFixture,
        forgery: str,
    ) -> None:
        body = result_body(run, tasks.Point(1, 2))
        reply = ask(lease, "POST", events_path(run), body, FORGERIES[forgery](run, bystander, body))
        assert reply.status == 401
        assert decoded == []
        assert reply.body == b"401: Unauthorized", "the same for all: nothing is learnt from it"
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        # The recorder works, and the run has not suffered.
        assert post(lease, run, body).status == 204
        assert sink.outcome(run.run_id)["result"] == tasks.Point(1, 2)
        assert {"unpackb", "loads"} <= set(decoded)

    def test_a_large_forgery(self, lease: Lease, sink: Sink, run: OpenRun, decoded: list[str]) -> None:
        # It is verified in another thread, by the same rules.
        body = result_body(run, secrets.token_bytes(guard.LARGE_FROM))
        headers = {**signed(run, body), "Wove-Signature": "0" * 64}
        assert ask(lease, "POST", events_path(run), body, headers).status == 401
        assert decoded == []
        assert_open(lease, sink, run)

    def test_forged_json(self, lease: Lease, sink: Sink, run: OpenRun, decoded: list[str]) -> None:
        body = json.dumps({"frames": [event(run, frames.TASK_RESULT, result=1)]}).encode()
        headers = {**signed(run, body, JSON), "Wove-Signature": "0" * 64}
        assert ask(lease, "POST", events_path(run), body, headers).status == 401
        assert decoded == []
        assert_open(lease, sink, run)


class TestCounts:
    """What was not taken can be read as numbers."""

    def test_by_status(self, lease: Lease, run: OpenRun) -> None:
        before = refusals()
        assert ask(lease, "POST", events_path(run), b"x", {"Wove-Key": kid()}).status == 401
        assert ask(lease, "POST", f"/wove/v1/events/{'0' * 32}", b"x").status == 410
        assert ask(lease, "GET", "/nowhere").status == 404
        assert ask(lease, "GET", "/healthz").status == 200
        news = {key: count - before.get(key, 0) for key, count in refusals().items()}
        assert {key: count for key, count in news.items() if count} == {
            "callback:401": 1,
            "callback:404": 1,
            "callback:410": 1,
        }


class TestRefusals:
    """What is refused by its head alone."""

    def test_an_unknown_run(self, lease: Lease, run: OpenRun) -> None:
        body = result_body(run, 1)
        path = f"/wove/v1/events/{secrets.token_hex(16)}"
        assert ask(lease, "POST", path, body, signed(run, body)).status == 410

    def test_a_closed_run(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        lease.close_run(run.run_id)
        wait_until(lambda: post(lease, run, packed([]), final=False).status == 410, "it is closed")
        assert post(lease, run, result_body(run, 1)).status == 410
        assert sink.of(run.run_id) == []

    def test_the_length_of_an_outcome(self, lease: Lease, sink: Sink) -> None:
        value = secrets.token_bytes(2_000)
        run = open_run(lease, sink)
        body = result_body(run, value)
        run.max_body = len(body) - 1
        # Nothing of the body is sent: an answer can only come from the head.
        head = head_of(events_path(run), **signed(run, body), Content_Length=str(len(body)))
        assert status_of(converse(lease, head)) == 413
        run.max_body = len(body)
        assert post(lease, run, body).status == 204
        assert sink.outcome(run.run_id)["result"] == value

    def test_the_length_of_news(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        head = head_of(
            events_path(run), Wove_Key=kid(), Wove_Final="0", Content_Length=str(routes.MAX_NEWS + 1)
        )
        assert status_of(converse(lease, head)) == 413
        length = str(routes.MAX_NEWS + 1)
        assert status_of(converse(lease, head_of("/wove/v1/beats", Content_Length=length))) == 413
        failed = f"/wove/v1/failed/{run.run_id}"
        # Whose word it is comes first: its token stands in the head.
        assert status_of(converse(lease, head_of(failed, Content_Length=length))) == 401
        token = f"Bearer {webhook_token(key_of(run), run.run_id)}"
        head = head_of(failed, Authorization=token, Content_Length=length)
        assert status_of(converse(lease, head)) == 413
        assert_open(lease, sink, run)

    def test_no_length(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        chunked = head_of(events_path(run), Wove_Key=kid(), Transfer_Encoding="chunked")
        assert status_of(converse(lease, chunked + b"3\r\nabc\r\n0\r\n\r\n")) == 411
        assert_open(lease, sink, run)

    def test_an_encoded_body(self, lease: Lease, sink: Sink, run: OpenRun, decoded: list[str]) -> None:
        body = result_body(run, 1)
        headers = {**signed(run, body), "Content-Encoding": "gzip"}
        assert ask(lease, "POST", events_path(run), body, headers).status == 415
        assert decoded == []
        assert_open(lease, sink, run)

    def test_a_body_cut_short(self, lease: Lease, sink: Sink, run: OpenRun, decoded: list[str]) -> None:
        body = result_body(run, 1)
        head = head_of(events_path(run), **signed(run, body), Content_Length=str(len(body) + 10))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head + body)
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection)
        assert decoded == []
        assert_open(lease, sink, run)

    def test_the_order_of_the_checks(self, lease: Lease, run: OpenRun) -> None:
        # Is the run open, is the key known, is the length allowed: the first no is the answer.
        far_too_long = str(2**40)
        unknown = f"/wove/v1/events/{secrets.token_hex(16)}"
        assert status_of(converse(lease, head_of(unknown, Content_Length=far_too_long))) == 410
        no_key = head_of(events_path(run), Wove_Final="1", Content_Length=far_too_long)
        assert status_of(converse(lease, no_key)) == 401

    def test_what_does_not_exist(self, lease: Lease) -> None:
        assert ask(lease, "GET", "/").status == 404
        assert ask(lease, "POST", "/healthz", b"").status == 405
        assert ask(lease, "GET", f"/wove/v1/events/{secrets.token_hex(16)}").status == 405

    def test_what_is_no_http_is_not_worth_an_error_in_the_log(
        self, lease: Lease, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Whoever reaches the port would fill the application's log otherwise, with text of their own choice.
        assert (
            status_of(converse(lease, b"GET / HTTP/1.1\r\nCanary: " + b"c4n4ry" * 1_000 + b"\r\n\r\n")) == 400
        )
        assert status_of(converse(lease, b"c4n4ry\r\n\r\n")) == 400
        loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert loud == []


# --- bodies that are signed and still wrong ----------------------------------


class Unloadable:
    """Raises when it is rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_raise, ("cannot be rebuilt",))


# A process of its own: what it tries is to end the thread, and with it the process.
EXITING = """
import pickle, sys
from wove import frames
from wove.callback_server import hub
from wove_tests.callbacks import Sink, event, open_run, packed, post, result_body

class Exiting:
    def __reduce__(self):
        return (sys.exit, (3,))

lease, sink = hub.acquire("127.0.0.1", 0), Sink()
first, second, bystander = (open_run(lease, sink) for _ in range(3))
exiting = pickle.dumps(Exiting())
body = packed([event(first, frames.TASK_RESULT, result=["pickle", 0, 1])], [exiting])
assert post(lease, first, body).status == 204
assert sink.outcome(first.run_id)["error"]["kind"] == "ResultDecodeError"
chain = [{"kind": "Some", "message": "text", "notes": [], "link": "", "value": ["pickle", 0, 1]}]
failed = event(second, frames.TASK_ERROR, error={"kind": "Some"}, exception=chain)
assert post(lease, second, packed([failed], [exiting])).status == 204
assert sink.outcome(second.run_id)["error"]["kind"] == "Some"
assert post(lease, bystander, result_body(bystander, 1)).status == 204
lease.release()
print("survived")
"""


def _raise(text: str) -> NoReturn:
    raise LookupError(text)


def _with_result(descriptor: Any, attachments: Sequence[Any] = ()) -> Callable[[OpenRun, OpenRun], bytes]:
    return lambda run, other: packed([event(run, frames.TASK_RESULT, result=descriptor)], attachments)


def _json(text: str) -> Callable[[OpenRun, OpenRun], bytes]:
    """Return a JSON outcome with that text as its result."""

    def body(run: OpenRun, other: OpenRun) -> bytes:
        head = json.dumps({"frames": [event(run, frames.TASK_RESULT, result="RESULT")]})
        return head.replace('"RESULT"', text).encode()

    return body


def _broken_chain(run: OpenRun, other: OpenRun) -> bytes:
    attachments: list[Any] = []
    chain: list[Any] = encode_exception(ValueError("its first link is sound"), attachments)
    failed = event(run, frames.TASK_ERROR, error={"kind": "ValueError"}, exception=[*chain, "not a link"])
    return packed([failed], attachments)


MALFORMED: dict[str, tuple[str, Callable[[OpenRun, OpenRun], bytes]]] = {
    "garbage": (MSGPACK, lambda run, other: b"garbage"),
    "nothing": (MSGPACK, lambda run, other: b""),
    "cut short": (MSGPACK, lambda run, other: result_body(run, "long enough")[:-3]),
    "too long": (MSGPACK, lambda run, other: result_body(run, 1) + b"more"),
    "an unknown codec": ("text/plain", lambda run, other: result_body(run, 1)),
    "no frames": (MSGPACK, lambda run, other: packed([])),
    "frames that are none": (MSGPACK, lambda run, other: packed([1, 2])),
    "no outcome": (MSGPACK, lambda run, other: packed([event(run, frames.TASK_STARTED)])),
    "two outcomes": (MSGPACK, lambda run, other: packed([event(run, frames.TASK_CANCELLED)] * 2)),
    "an outcome of another run": (MSGPACK, lambda run, other: result_body(other, 1)),
    "an outcome and news of another": (
        MSGPACK,
        lambda run, other: packed([event(other, frames.HEARTBEAT), event(run, frames.TASK_CANCELLED)]),
    ),
    "no result": (MSGPACK, lambda run, other: packed([event(run, frames.TASK_RESULT)])),
    "no error": (MSGPACK, lambda run, other: packed([event(run, frames.TASK_ERROR)])),
    "a number of 0": (MSGPACK, lambda run, other: packed([event(run, frames.TASK_CANCELLED, seq=0)])),
    "a missing attachment": (MSGPACK, _with_result(["data", 0, 1])),
    "a descriptor that is none": (MSGPACK, _with_result({"a": 1})),
    "an unknown value codec": (MSGPACK, _with_result([["data"], 0, 1], [b"\xc0"])),
    "data that is none": (MSGPACK, _with_result(["data", 0, 1], [b"\xc1"])),
    "an unknown tag": (MSGPACK, _with_result(["tagged", 0, 1], [msgpack.packb({"__wove__": "os.system"})])),
    "a pickle that is none": (MSGPACK, _with_result(["pickle", 0, 1], [b"garbage"])),
    "a pickle that raises": (MSGPACK, _with_result(["pickle", 0, 1], [pickle.dumps(Unloadable())])),
    "a pickle of a missing module": (MSGPACK, _with_result(["pickle", 0, 1], [b"cno_such_module\nname\n."])),
    "a broken chain of exceptions": (MSGPACK, _broken_chain),
    "JSON garbage": (JSON, lambda run, other: b"{"),
    "a JSON list": (JSON, lambda run, other: b"[]"),
    "JSON that is no text": (JSON, lambda run, other: b"\xff\xfe\xfd"),
    "JSON that is deep": (JSON, _json("[" * 900 + "]" * 900)),
    "JSON that is deeper": (JSON, _json("[" * 100_000 + "]" * 100_000)),
    "a JSON tag that is unknown": (JSON, _json('{"__wove__": "pickle", "v": "gASVAAAA"}')),
    "a JSON tag without a value": (JSON, _json('{"__wove__": "tuple"}')),
    "a JSON number of many digits": (JSON, _json("9" * 5_000)),
}


class TestMalformed:
    """A signed body that cannot be read ends its own run with an error, and no other."""

    @pytest.mark.parametrize("kind", MALFORMED)
    def test_an_outcome(self, lease: Lease, sink: Sink, run: OpenRun, bystander: OpenRun, kind: str) -> None:
        codec, build = MALFORMED[kind]
        reply = post(lease, run, build(run, bystander), codec)
        # Nothing better will come: the worker is not asked to try again.
        assert reply.status == 204
        assert sink.outcome(run.run_id)["type"] == frames.TASK_ERROR
        assert isinstance(error_from_frame(sink.outcome(run.run_id)), Exception)
        assert post(lease, run, result_body(run, 1)).status == 410
        assert_open(lease, sink, bystander)

    def test_the_error_says_what_is_wrong(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        post(lease, run, packed([event(run, frames.TASK_RESULT)]))
        error = sink.outcome(run.run_id)["error"]
        assert error["kind"] == "ProtocolError"
        assert error["source"] == "worker"
        assert "the result is missing" in error["message"]

    def test_a_result_whose_class_is_missing_here_says_so(
        self, lease: Lease, sink: Sink, run: OpenRun
    ) -> None:
        body = packed(
            [event(run, frames.TASK_RESULT, result=["pickle", 0, 1])], [b"cno_such_module\nname\n."]
        )
        post(lease, run, body)
        error = sink.outcome(run.run_id)["error"]
        assert error["kind"] == "ResultDecodeError"
        assert "no_such_module" in error["message"]

    def test_what_exits_when_it_is_rebuilt(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", EXITING],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.stdout == "survived\n", done.stderr

    @pytest.mark.parametrize(
        "build",
        [
            lambda run: b"garbage",
            lambda run: packed([]),
            lambda run: packed([event(run, frames.PROGRESS, fraction=2)]),
            lambda run: packed([event(run, frames.LOG, message=1)]),
            lambda run: packed([event(run, frames.TASK_CANCELLED)]),
        ],
        ids=["garbage", "empty", "a fraction of 2", "a log of a number", "an outcome that is not marked"],
    )
    def test_news(self, lease: Lease, sink: Sink, run: OpenRun, build: Callable[[OpenRun], bytes]) -> None:
        reply = post(lease, run, build(run), final=False)
        assert reply.status == 400
        assert_open(lease, sink, run)


# --- cancelling --------------------------------------------------------------


def beat_line(
    run: OpenRun, count: int = 1, *, execution: str = "e1", word: str = "run", tag: bytes | None = None
) -> str:
    tag = tag or beat_tag(key_of(run), run.run_id, execution, run.attempt, count)
    return f"{word} {run.run_id} {execution} {run.attempt} {count} {kid()} {tag.hex()}"


def beat(lease: Lease, *lines: str, hold: float = 20.0) -> Reply:
    body = "\n".join([f"hold {hold}", *lines]).encode()
    return ask(lease, "POST", "/wove/v1/beats", body, {"Content-Type": "text/plain"})


def hold_beat(background: ThreadPoolExecutor, lease: Lease, *runs: OpenRun, **options: Any) -> Future[Reply]:
    """Open a beat for those runs and wait until the server holds it."""
    before = [len(run.watchers) for run in runs]
    held = background.submit(beat, lease, *(beat_line(run, **options) for run in runs))
    wait_until(
        lambda: held.done() or all(len(r.watchers) > n for r, n in zip(runs, before, strict=True)),
        "the beat is held",
    )
    return held


def cancel(lease: Lease, run: OpenRun) -> None:
    lease.cancel_run(run.run_id)
    wait_until(lambda: run.cancelled, "the listener knows of the cancellation")


class TestCancel:
    """A worker hears that its run was cancelled with whatever it says next, or at once over its beat."""

    def test_the_reply_to_news_carries_it_signed(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        body = packed([event(run, frames.HEARTBEAT)])
        assert "Wove-Cancel" not in post(lease, run, body, final=False).headers
        cancel(lease, run)
        reply = post(lease, run, body, final=False)
        tag = event_tag(key_of(run), run.run_id, MSGPACK, False, [body])
        assert reply.status == 200
        assert reply.headers["Wove-Cancel"] == reply_tag(key_of(run), tag, b"cancel").hex()
        # Whatever comes first ends it: here a result that was on its way.
        assert post(lease, run, result_body(run, "made it")).status == 204
        assert sink.outcome(run.run_id)["result"] == "made it"

    def test_who_asks_for_leave_to_start_is_refused(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        cancel(lease, run)
        body = packed([event(run, frames.TASK_STARTED, fence=True)])
        assert post(lease, run, body, final=False).status == 410
        assert sink.outcome(run.run_id)["type"] == frames.TASK_CANCELLED

    def test_who_asks_is_let_in_otherwise(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        body = packed([event(run, frames.TASK_STARTED, fence=True)])
        assert post(lease, run, body, final=False).status == 204
        assert sink.kinds(run.run_id) == ["task_started"]

    def test_a_held_beat_is_answered_at_once(
        self, lease: Lease, sink: Sink, background: ThreadPoolExecutor, run: OpenRun, bystander: OpenRun
    ) -> None:
        held = hold_beat(background, lease, run, bystander)
        assert not held.done()
        assert sink.kinds(run.run_id) == ["heartbeat"]
        begun = time.monotonic()
        lease.cancel_run(run.run_id)
        reply = held.result(PATIENCE)
        assert time.monotonic() - begun < 4, "and not when its time is up"
        assert reply.status == 200
        tag = cancel_tag(key_of(run), run.run_id, "e1", 1).hex()
        assert reply.body.decode() == f"cancel e1 {tag}", "only the cancelled one of the two"

    def test_a_beat_that_comes_after_the_cancellation(self, lease: Lease, run: OpenRun) -> None:
        cancel(lease, run)
        assert beat(lease, beat_line(run)).body.startswith(b"cancel e1 ")

    def test_who_is_stopping_is_not_told_again(
        self, lease: Lease, background: ThreadPoolExecutor, run: OpenRun
    ) -> None:
        cancel(lease, run)
        held = hold_beat(background, lease, run, word="stopping")
        assert not held.done()
        lease.close_run(run.run_id)
        assert held.result(PATIENCE).body == b""

    def test_a_beat_ends_with_its_time(self, lease: Lease, run: OpenRun) -> None:
        reply = beat(lease, beat_line(run), hold=0.1)
        assert (reply.status, reply.body) == (200, b"")
        assert beat(lease, beat_line(run, 2), hold=0.1).status == 200

    def test_a_beat_ends_with_its_runs(
        self, lease: Lease, background: ThreadPoolExecutor, run: OpenRun, bystander: OpenRun
    ) -> None:
        held = hold_beat(background, lease, run, bystander)
        post(lease, run, result_body(run, 1))
        assert not held.done()
        post(lease, bystander, result_body(bystander, 1))
        assert held.result(PATIENCE).body == b""

    def test_a_replayed_beat_is_refused(
        self, lease: Lease, background: ThreadPoolExecutor, sink: Sink, run: OpenRun
    ) -> None:
        assert beat(lease, beat_line(run, 5), hold=0.1).status == 200
        for count in (5, 4):
            assert beat(lease, beat_line(run, count)).status == 401
        assert sink.kinds(run.run_id) == ["heartbeat"], "what was refused is no sign of life"
        # Another execution, after a redelivery, counts for itself.
        assert beat(lease, beat_line(run, 1, execution="e2"), hold=0.1).status == 200

    def test_a_forged_beat_is_refused(
        self, lease: Lease, sink: Sink, run: OpenRun, bystander: OpenRun
    ) -> None:
        cancel(lease, run)
        others_tag = beat_tag(key_of(bystander), run.run_id, "e1", 1, 1)
        for line in (
            beat_line(run, tag=b"\0" * 32),
            beat_line(run, tag=others_tag),
            beat_line(run).replace(kid(), "nobody"),
            beat_line(run).replace(" 1 ", " 2 "),
            beat_line(run).replace(" 1 ", " -1 "),
        ):
            reply = beat(lease, line)
            assert reply.status == 401, line
            assert b"cancel" not in reply.body
        assert sink.of(run.run_id) == []

    def test_a_beat_of_nothing_is_malformed(self, lease: Lease) -> None:
        assert beat(lease).status == 400
        assert ask(lease, "POST", "/wove/v1/beats", b"\xff\x00").status == 400

    def test_a_beat_of_a_closed_run(self, lease: Lease, background: ThreadPoolExecutor, run: OpenRun) -> None:
        post(lease, run, result_body(run, 1))
        assert beat(lease, beat_line(run)).status == 410

    def test_a_worker_that_has_gone_is_not_waited_for(self, lease: Lease, run: OpenRun) -> None:
        body = f"hold 20\n{beat_line(run)}".encode()
        head = head_of("/wove/v1/beats", Content_Length=str(len(body)))
        with socket.create_connection((lease.host, lease.port), timeout=PATIENCE) as connection:
            connection.sendall(head + body)
            wait_until(lambda: run.watchers, "the beat is held")
        wait_until(lambda: not run.watchers, "the server has noticed", patience=2)


# --- large payloads and the backend's own word ---------------------------------


class TestPayload:
    """A worker fetches what was too large for the broker."""

    def fetch(self, lease: Lease, run: OpenRun, tag: bytes | None = None) -> Reply:
        tag = fetch_tag(key_of(run), run.run_id) if tag is None else tag
        headers = {"Wove-Key": kid(), "Wove-Signature": tag.hex()}
        return ask(lease, "GET", f"/wove/v1/payloads/{run.run_id}", headers=headers)

    def test_it_comes_whole(self, lease: Lease, sink: Sink) -> None:
        array = memoryview(struct.pack("300000d", *range(300_000))).cast("d")
        run = open_run(lease, sink, message=[b"head", array, b"tail"])
        reply = self.fetch(lease, run)
        assert reply.status == 200
        assert hashlib.sha256(reply.body).digest() == hashlib.sha256(b"head" + array + b"tail").digest()
        # A redelivered task needs it again.
        assert self.fetch(lease, run).status == 200

    def test_who_does_not_take_it_does_not_outlive_the_listener(self, sink: Sink) -> None:
        own = hub.acquire("127.0.0.1", 0)
        run = open_run(own, sink, message=[bytes(50_000_000)])
        tag = fetch_tag(key_of(run), run.run_id).hex()
        with socket.create_connection((own.host, own.port), timeout=10) as connection:
            connection.sendall(
                f"GET /wove/v1/payloads/{run.run_id} HTTP/1.1\r\nHost: x\r\n"
                f"Wove-Key: {kid()}\r\nWove-Signature: {tag}\r\n\r\n".encode()
            )
            assert connection.recv(1)
            own.release()
            with contextlib.suppress(ConnectionError):
                while connection.recv(1_000_000):
                    pass

    def test_not_without_a_signature(self, lease: Lease, sink: Sink, bystander: OpenRun) -> None:
        run = open_run(lease, sink, message=[b"secret arguments"])
        for tag in (b"", b"\0" * 32, fetch_tag(key_of(bystander), run.run_id)):
            reply = self.fetch(lease, run, tag)
            assert reply.status == 401
            assert b"secret" not in reply.body
        assert ask(lease, "GET", f"/wove/v1/payloads/{run.run_id}").status == 401

    def test_not_when_there_is_nothing_to_fetch(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        assert self.fetch(lease, run).status == 410
        cancelled = open_run(lease, sink, message=[b"arguments"])
        cancel(lease, cancelled)
        assert self.fetch(lease, cancelled).status == 410
        closed = open_run(lease, sink, message=[b"arguments"])
        post(lease, closed, result_body(closed, 1))
        assert self.fetch(lease, closed).status == 410


class TestFailedWebhook:
    """RQ's own word that a job has failed."""

    @pytest.fixture(autouse=True)
    def short_grace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "FAILURE_GRACE", 0.05)

    def report(self, lease: Lease, run: OpenRun, token: str | None = None, **body: Any) -> Reply:
        token = webhook_token(key_of(run), run.run_id) if token is None else token
        body = body or {"exc_info": "Traceback ...\nWork-horse terminated unexpectedly; signal 9"}
        headers = {"Authorization": f"Bearer {token}", "Content-Type": JSON}
        return ask(lease, "POST", f"/wove/v1/failed/{run.run_id}", json.dumps(body).encode(), headers)

    def test_it_ends_the_run(self, lease: Lease, sink: Sink, run: OpenRun, bystander: OpenRun) -> None:
        assert self.report(lease, run).status == 204
        outcome = sink.outcome(run.run_id)
        exc = error_from_frame(outcome)
        assert type(exc).__name__ == "WorkerLostError"
        assert "signal 9" in str(exc)
        assert "Traceback ..." in outcome["error"]["traceback"]
        assert outcome["error"]["retryable"] is True
        # Another attempt may follow, and whoever has a result has done the work.
        assert self.report(lease, run).status == 204
        assert post(lease, run, result_body(run, 1)).status == 204
        assert sink.kinds(run.run_id) == ["task_error", "task_result"]
        assert_open(lease, sink, bystander)

    @pytest.mark.parametrize("body", [{"exc_info": None}, {"exc_info": ["no", "text"]}, {"else": 1}])
    def test_without_a_reason(self, lease: Lease, sink: Sink, run: OpenRun, body: dict[str, Any]) -> None:
        assert self.report(lease, run, **body).status == 204
        assert "no reason given" in sink.outcome(run.run_id)["error"]["message"]

    def test_with_a_body_that_is_no_json(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        headers = {"Authorization": f"Bearer {webhook_token(key_of(run), run.run_id)}"}
        for body in (b"\xff", b"[1]"):
            assert ask(lease, "POST", f"/wove/v1/failed/{run.run_id}", body, headers).status == 204
        assert sink.outcome(run.run_id)["error"]["kind"] == "WorkerLostError"

    def test_an_outcome_within_the_grace_wins(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        other = open_run(lease, sink)
        assert self.report(lease, run).status == 204
        assert post(lease, run, result_body(run, "in time")).status == 204
        # The grace of the second one ends after that of the first.
        assert self.report(lease, other).status == 204
        assert sink.outcome(other.run_id)["error"]["kind"] == "WorkerLostError"
        assert sink.outcome(run.run_id)["result"] == "in time"

    @pytest.mark.parametrize("token", ["", "0" * 64, "\xff", "OTHER"])
    def test_a_wrong_token(
        self, lease: Lease, sink: Sink, run: OpenRun, bystander: OpenRun, decoded: list[str], token: str
    ) -> None:
        if token == "OTHER":
            token = webhook_token(key_of(bystander), bystander.run_id)
        assert self.report(lease, run, token).status == 401
        assert decoded == []
        other = open_run(lease, sink)
        self.report(lease, other)
        sink.outcome(other.run_id)  # what the first could do it would have done by now
        assert_open(lease, sink, run)

    def test_another_scheme(self, lease: Lease, run: OpenRun) -> None:
        headers = {"Authorization": f"Basic {webhook_token(key_of(run), run.run_id)}"}
        assert ask(lease, "POST", f"/wove/v1/failed/{run.run_id}", b"{}", headers).status == 401
        assert ask(lease, "POST", f"/wove/v1/failed/{run.run_id}", b"{}").status == 401

    def test_a_closed_run(self, lease: Lease, sink: Sink, run: OpenRun) -> None:
        # RQ tells of every failure, also of those that the worker has reported itself.
        post(lease, run, result_body(run, 1))
        assert self.report(lease, run).status == 204
        assert sink.kinds(run.run_id) == ["task_result"]


# --- the guard -----------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard with the patience of a test."""
    monkeypatch.setattr(guard, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(guard, "KEEP_ALIVE_SECONDS", 0.6)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)


@pytest.fixture
def connect(lease: Lease) -> Iterator[Callable[[], socket.socket]]:
    """Opens connections and closes them at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            socket.create_connection((lease.host, lease.port), timeout=PATIENCE)
        )


def closed_by_server(connection: socket.socket) -> bool:
    """Whether the server has closed a connection on which nothing was to be said."""
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        connection.close()  # a reset is told once; what is closed here says so again
        return True


def still_open(connections: list[socket.socket]) -> list[socket.socket]:
    """Return those that the server has not closed."""
    return [connection for connection in connections if not closed_by_server(connection)]


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that finds a few connections many."""
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", CROWD)
    monkeypatch.setattr(guard, "HEAD_SECONDS", 60.0)


CROWD = 8


@pytest.mark.usefixtures("hasty")
class TestGuard:
    """Nobody holds the server up, whether they have a key or not."""

    def test_a_connection_that_sends_nothing(self, connect: Callable[[], socket.socket]) -> None:
        assert read_to_end(connect()) == b""

    def test_half_a_head(self, connect: Callable[[], socket.socket]) -> None:
        connection = connect()
        connection.sendall(b"POST /wove/v1/beats HTTP/1.1\r\nHost: te")
        assert read_to_end(connection) == b""

    def test_a_head_that_dribbles(self, connect: Callable[[], socket.socket]) -> None:
        connection = connect()
        connection.sendall(b"GET /healthz HTTP/1.1\r\nDribble: ")
        connection.settimeout(0.02)
        deadline = time.monotonic() + PATIENCE
        ended = False
        while not ended and time.monotonic() < deadline:
            try:
                connection.sendall(b"x")
                ended = connection.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended

    def test_a_body_that_stalls(self, connect: Callable[[], socket.socket], run: OpenRun) -> None:
        connection = connect()
        connection.sendall(head_of(events_path(run), Wove_Key=kid(), Content_Length="1000") + b"a beginning")
        assert status_of(read_to_end(connection)) == 408

    def test_a_body_that_dribbles(self, connect: Callable[[], socket.socket], run: OpenRun) -> None:
        connection = connect()
        connection.sendall(head_of(events_path(run), Wove_Key=kid(), Content_Length="1000"))
        stop = threading.Event()

        def dribble() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    connection.send(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            assert status_of(read_to_end(connection)) == 408
        finally:
            stop.set()
            thread.join()

    def test_a_large_body_that_stalls(
        self, connect: Callable[[], socket.socket], lease: Lease, sink: Sink
    ) -> None:
        # That it could be large earns it no time; that it comes does.
        run = open_run(lease, sink, max_body=1024 * guard.SLOWEST_BODY)
        connection = connect()
        connection.settimeout(3)
        length = str(1024 * guard.SLOWEST_BODY)
        connection.sendall(
            head_of(events_path(run), Wove_Key=kid(), Wove_Final="1", Content_Length=length) + b"a beginning"
        )
        assert status_of(read_to_end(connection)) == 408

    def test_a_connection_that_idles_after_a_request(self, lease: Lease) -> None:
        connection = http.client.HTTPConnection(lease.host, lease.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            begun = time.monotonic()
            assert read_to_end(connection.sock) == b""
            # A worker between two tasks is given longer than one who never asked for anything.
            assert time.monotonic() - begun > guard.HEAD_SECONDS * 2

    def test_a_held_beat_does_not_idle(self, lease: Lease, run: OpenRun) -> None:
        reply = beat(lease, beat_line(run), hold=guard.KEEP_ALIVE_SECONDS * 2)
        assert reply.status == 200

    @pytest.mark.usefixtures("crowded")
    def test_many_idle_connections_lock_nobody_out(
        self, lease: Lease, connect: Callable[[], socket.socket]
    ) -> None:
        connections = [connect() for _ in range(5 * CROWD)]
        for _ in range(5):
            assert ask(lease, "GET", "/healthz").status == 200
        wait_until(lambda: len(still_open(connections)) <= CROWD, "the excess is closed")
        # Those of the requests were open for a moment and may have counted.
        assert len(still_open(connections)) >= CROWD - 5, "no more than the excess"
        assert ask(lease, "GET", "/healthz").status == 200

    @pytest.mark.usefixtures("crowded")
    def test_the_oldest_make_room(
        self, lease: Lease, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # All within two looks of the guard: who came last, and is about to ask, is not the one to go.
        monkeypatch.setattr(guard, "SWEEP_SECONDS", 0.3)
        wait_until(lambda: ask(lease, "GET", "/healthz").status == 200, "it is served")
        connections = [connect() for _ in range(4 * CROWD)]
        wait_until(lambda: len(still_open(connections)) <= CROWD, "the excess is closed")
        assert still_open(connections) == connections[-CROWD:]

    @pytest.mark.usefixtures("crowded")
    @pytest.mark.parametrize("what", ["beats", "events", "failed"])
    def test_bodies_that_do_not_come_make_room(
        self,
        lease: Lease,
        connect: Callable[[], socket.socket],
        run: OpenRun,
        sink: Sink,
        what: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Each would be waited for for a while; together they must not take all descriptors meanwhile.
        monkeypatch.setattr(guard, "BODY_SECONDS", 60.0)
        path = {"beats": "/wove/v1/beats", "events": events_path(run), "failed": "/wove/v1/failed/nobody"}
        connections = [connect() for _ in range(4 * CROWD)]
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head_of(path[what], Wove_Key=kid(), Content_Length="1000"))
        wait_until(lambda: len(still_open(connections)) <= CROWD, "the excess is closed")
        assert post(lease, run, result_body(run, 1)).status == 204

    def test_an_answer_that_is_not_taken(
        self, lease: Lease, connect: Callable[[], socket.socket], sink: Sink
    ) -> None:
        run = open_run(lease, sink, message=[bytes(50_000_000)])
        tag = fetch_tag(key_of(run), run.run_id).hex()
        connection = connect()
        head = head_of(events_path(run), Wove_Key=kid(), Wove_Signature=tag)
        connection.sendall(head.replace(b"POST", b"GET").replace(b"/events/", b"/payloads/"))
        listener = hub._listeners[lease._key].listener
        wait_until(lambda: listener.guard.connections == 1, "it is there")
        wait_until(lambda: listener.guard.connections == 0, "it is not waited for")

    @pytest.mark.usefixtures("crowded")
    def test_held_beats_are_not_the_excess(
        self,
        lease: Lease,
        connect: Callable[[], socket.socket],
        background: ThreadPoolExecutor,
        run: OpenRun,
    ) -> None:
        held = hold_beat(background, lease, run)
        idle = [connect() for _ in range(3 * CROWD)]
        wait_until(lambda: len(still_open(idle)) < CROWD, "the idle ones make room")
        assert not held.done()
        lease.cancel_run(run.run_id)
        assert held.result(PATIENCE).body.startswith(b"cancel")

    def test_it_leaves_the_application_its_file_descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard.resource, "getrlimit", lambda _: (100, 100))
        monkeypatch.setattr(guard, "HEAD_SECONDS", 60.0)
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(listening())
            connections = [
                stack.enter_context(socket.create_connection((shared.host, shared.port), timeout=PATIENCE))
                for _ in range(35)
            ]
            wait_until(lambda: len(still_open(connections)) == 25, "a quarter of them is left")

    def test_bodies_under_way_are_bounded(
        self,
        lease: Lease,
        sink: Sink,
        connect: Callable[[], socket.socket],
        run: OpenRun,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(guard, "BODY_SECONDS", 60.0)
        monkeypatch.setattr(guard, "MAX_BYTES_IN_FLIGHT", 2_000)
        monkeypatch.setattr(guard, "SMALL_BODY", 1_000)
        first, second = connect(), connect()
        head = head_of(events_path(run), Wove_Key=kid(), Wove_Final="1", Content_Length="1500")
        first.sendall(head)
        # Until the first one's body is being read, there is room for the second.
        answer = wait_until(lambda: _answer_within(connect(), head, 0.1), "a second body is put off")
        assert status_of(answer) == 503
        assert b"Retry-After: " in answer
        # Nobody is kept from saying a little by those who claim to say much.
        assert post(lease, run, packed([event(run, frames.HEARTBEAT)]), final=False).status == 204
        first.close()
        wait_until(lambda: post(lease, run, result_body(run, b"x" * 1_400)).status == 204, "there is room")
        assert len(sink.outcome(run.run_id)["result"]) == 1_400
        second.close()


def _answer_within(connection: socket.socket, data: bytes, seconds: float) -> bytes | None:
    connection.sendall(data)
    connection.settimeout(seconds)
    try:
        return connection.recv(4096)
    except TimeoutError:
        connection.close()
        return None
