"""Bytes that a machine made up: every decoder and the whole listener, by the structure of what they expect.

Seconds here; ``make fuzz`` takes its time: FUZZ_EXAMPLES per property (100), FUZZ_REQUESTS on the wire (300).
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import random
import secrets
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from wove_tests.callbacks import (
    ENVIRONMENT,
    MSGPACK,
    Payload,
    Sink,
    event,
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
from wove_tests.recorder import DECODERS, record_calls

from wove import frames
from wove.callback_server import guard, hub
from wove.callback_server.decoding import decode_batch, open_parked
from wove.callback_server.runs import OpenRun
from wove.decode_limits import MAX_DECODED, Bounds
from wove.errors import PayloadRejectedError, ProtocolError
from wove.plain_data import from_tagged
from wove.security import SecretRing, event_tag, find_secrets, seal_payload
from wove.wire import decode_value, pack_message, park, unpack_json, unpack_message, unpark
from wove.worker.assignment import Assignment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove.callback_server.hub import Lease

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "300"))
FRAMES = int(os.environ.get("FUZZ_FRAMES", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or secrets.randbits(32)
LIVE_RUNS = 100

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)

# Long runs have no time limit of their own.
pytestmark = pytest.mark.timeout(120 + EXAMPLES // 5 + REQUESTS // 10)

# --- what almost looks right ---------------------------------------------------

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
_TAGS = st.sampled_from(
    [
        "tuple",
        "set",
        "frozenset",
        "dict",
        "int",
        "float",
        "bytes",
        "datetime",
        "date",
        "time",
        "timedelta",
        "decimal",
        "uuid",
        "x",
    ]
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    tagged = st.fixed_dictionaries({"__wove__": _TAGS | inner, "v": inner})
    return st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5) | tagged


VALUES = st.recursive(_SCALARS, _containers, max_leaves=20)
RUN_ID = "f" * 32


def _frame(run_id: str) -> st.SearchStrategy[dict[str, Any]]:
    kinds = st.sampled_from(sorted(frames.EVENTS)) | st.text(max_size=10) | VALUES
    descriptor = st.tuples(
        st.sampled_from(["data", "tagged", "pickle"]) | VALUES, st.integers(-1, 3), st.integers(-1, 3)
    ).map(list)
    return st.fixed_dictionaries(
        {"type": kinds, "run_id": st.just(run_id) | VALUES, "task_id": st.just("t") | VALUES},
        optional={
            "attempt": st.integers(-1, 3) | VALUES,
            "seq": st.integers(-1, 3) | VALUES,
            "fraction": VALUES,
            "message": VALUES,
            "fence": VALUES,
            "error": VALUES | st.fixed_dictionaries({"kind": VALUES, "message": VALUES, "source": VALUES}),
            "exception": VALUES
            | st.lists(st.fixed_dictionaries({"kind": VALUES, "value": descriptor}), max_size=3),
            "result": VALUES | descriptor,
            "execution": VALUES,
            "worker": VALUES,
        },
    )


def _message(envelope: Any, parts: list[bytes], *, honest: bool = True) -> bytes:
    if honest and isinstance(envelope, dict):
        return b"".join(bytes(part) for part in pack_message(envelope, parts))
    head = msgpack.packb(envelope)
    return struct.pack(">I", len(head)) + head + b"".join(parts)


PARTS = st.lists(st.binary(max_size=60) | VALUES.map(msgpack.packb), max_size=3)


def _bodies(run_id: str) -> st.SearchStrategy[bytes]:
    envelopes = st.fixed_dictionaries(
        {"frames": st.lists(_frame(run_id), max_size=4) | VALUES},
        optional={"worker": VALUES, "execution": VALUES, "v": VALUES},
    )
    return st.binary(max_size=200) | st.builds(_message, envelopes | VALUES, PARTS, honest=st.booleans())


@st.composite
def _cut_or_flipped(draw: st.DrawFn, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "cut", "insert", "byte"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case _:
                data[at] = draw(st.integers(0, 255))
        if not data:
            return b""
    return bytes(data)


def _pickles_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made-up pickles run made-up code; that they are looked at only when signed is tested elsewhere.
    import wove.wire

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a made-up pickle")

    monkeypatch.setattr(wove.wire.pickle, "loads", refuse)


# --- decoders ------------------------------------------------------------------


class TestDecoders:
    """Whatever is signed, and however wrong it is: ProtocolError, or a value within bounds."""

    @fuzz
    @given(data=st.data())
    @pytest.mark.parametrize("plain", [False, True])
    def test_batches(self, data: st.DataObject, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        _pickles_are_not_read(monkeypatch)
        body = data.draw(_bodies(RUN_ID))
        try:
            batch = decode_batch(
                bytearray(body), MSGPACK, RUN_ID, final=data.draw(st.booleans()), plain=plain
            )
        except ProtocolError:
            return
        for frame in batch:
            assert frame["run_id"] == RUN_ID
            assert isinstance(frame.get("exception"), Exception | None)

    @fuzz
    @given(
        message=st.fixed_dictionaries({"frames": st.lists(_frame(RUN_ID), max_size=3) | VALUES}) | VALUES,
        final=st.booleans(),
    )
    def test_json_batches(self, message: Any, final: bool) -> None:
        try:
            body = json.dumps(message).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError):
            assume(False)
        with contextlib.suppress(ProtocolError):
            decode_batch(bytearray(body), "application/json", RUN_ID, final=final)

    @fuzz
    @given(body=st.binary(max_size=300) | st.builds(_message, VALUES, PARTS, honest=st.just(False)))
    def test_messages(self, body: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            envelope, parts = unpack_message(body)
            assert sum(len(part) for part in parts) <= len(body)
            assert type(envelope) is dict

    @fuzz
    @given(data=st.binary(max_size=300) | VALUES.map(msgpack.packb), tagged=st.booleans())
    def test_values(self, data: bytes, tagged: bool) -> None:
        with contextlib.suppress(ProtocolError):
            decode_value(["tagged" if tagged else "data", 0, 1], [memoryview(data)])

    @fuzz
    @given(value=VALUES)
    def test_tags(self, value: Any) -> None:
        with contextlib.suppress(ProtocolError):
            from_tagged(value)

    @fuzz
    @given(text=st.text(max_size=200) | st.binary(max_size=200))
    def test_json(self, text: str | bytes) -> None:
        with contextlib.suppress(ProtocolError):
            unpack_json(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)

    @fuzz
    @given(data=st.data())
    def test_parked_outcomes(self, data: st.DataObject) -> None:
        run = _unlistened_run()
        whole = park(
            kid(), event_tag(key_of(run), run.run_id, MSGPACK, True, [_right_body(run)]), [_right_body(run)]
        )
        assert open_parked(run, whole)[-1]["result"] == [1, "two"]
        changed = data.draw(_cut_or_flipped(whole) | st.binary(max_size=100))
        assume(not _same_blob(changed, whole))
        with pytest.raises(ProtocolError):
            open_parked(run, changed)

    @fuzz
    @given(data=st.data())
    def test_signed_payloads_of_any_content(
        self, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _pickles_are_not_read(monkeypatch)
        envelope = data.draw(
            st.fixed_dictionaries(
                {
                    "v": st.just(1) | VALUES,
                    "run_id": st.just(RUN_ID) | VALUES,
                    "task_id": st.just("t") | VALUES,
                    "attempt": st.integers(0, 3) | VALUES,
                    "nonce": st.just(b"n" * 16) | VALUES,
                    "callback": st.sampled_from(["http://127.0.0.1:9", "http://a@b", "//"]) | VALUES,
                    "sent_at": st.floats() | VALUES,
                },
                optional=dict.fromkeys(
                    (
                        "expires",
                        "plain",
                        "timeout",
                        "max_body",
                        "keep",
                        "attended",
                        "callable",
                        "args",
                        "heartbeat",
                    ),
                    VALUES,
                ),
            )
        )
        blob = seal_payload(find_secrets(), ENVIRONMENT, pack_message(envelope, data.draw(PARTS)))
        # Signed, and so from a friend; it may be wrong all the same.
        with contextlib.suppress(ProtocolError, PayloadRejectedError):
            assignment = Assignment(blob)
            assignment.check()
            with contextlib.suppress(Exception):
                assignment.load()


def _unlistened_run() -> OpenRun:
    return OpenRun(
        run_id=RUN_ID,
        task_id="t",
        environment=ENVIRONMENT,
        ring=find_secrets(),
        nonce=b"n" * 16,
        sink=lambda batch: True,
        max_body=10_000,
    )


def _right_body(run: OpenRun) -> bytes:
    return result_body(run, [1, "two"])


def _same_blob(one: bytes, other: bytes) -> bool:
    try:
        return unpark(one) == unpark(other)  # hexadecimal digits may be of either case
    except ProtocolError:
        return False


# --- P6: nothing that is not verified is decoded -----------------------------------


class TestUnverified:
    """Recorders on every decoder stay empty."""

    def test_changed_payloads(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = Payload("http://127.0.0.1:9", secrets.token_hex, 3).blob
        dice = random.Random(SEED)
        changed = [_change(dice, whole) for _ in range(10_000)]
        texts = [base64.b64encode(blob).decode() for blob in changed[:1_000]]
        calls = record_calls(monkeypatch, *DECODERS)
        for blob in [*changed, *texts]:
            with pytest.raises(PayloadRejectedError):
                Assignment(blob)
        assert calls == []
        assert Assignment(whole).run_id
        assert calls

    def test_changed_requests(
        self, lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        run = open_run(lease, sink)
        canary = f"canary-{secrets.token_hex(8)}"
        body = result_body(run, canary)
        dice = random.Random(SEED)
        requests = [_changed_request(dice, run, body) for _ in range(REQUESTS)]
        calls = record_calls(monkeypatch, *DECODERS)
        statuses = {_raw(lease, request) for request in requests}
        assert calls == []
        # Unsigned, gone, malformed HTTP, the wrong length or encoding, too slow for what was claimed.
        assert statuses <= {400, 401, 404, 405, 408, 410, 411, 413, 415, None}
        assert 401 in statuses
        assert sink.frames == []
        assert canary not in caplog.text
        monkeypatch.undo()
        assert post(lease, run, body).status == 204


def _change(dice: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(data) or 1)
        if not data:
            data += b"W"
        match dice.randrange(4):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at : at + dice.randint(1, 9)]
            case 2:
                data[at:at] = dice.randbytes(dice.randint(1, 9))
            case _:
                data = data[:at] or bytearray(b"W")
    return bytes(data) if bytes(data) != whole else bytes(data[:-1])


def _changed_request(dice: random.Random, run: OpenRun, body: bytes) -> bytes:
    headers = signed(run, body)
    path = events_path(run)
    match dice.randrange(4):
        case 0:
            body = _change(dice, body)
        case 1:
            name = dice.choice(["Wove-Key", "Wove-Signature", "Wove-Final", "Content-Type"])
            kept = headers[name]
            headers[name] = _change(dice, kept.encode()).decode("latin-1")
            if headers[name].strip().lower() == kept.lower():
                del headers[name]
        case 2:
            del headers[dice.choice(["Wove-Key", "Wove-Signature", "Wove-Final"])]
        case _:
            path = _change(dice, path.encode()).decode("latin-1")
    lines = [f"POST {path} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in headers.items())]
    # Some in the very form that the listener takes without aiohttp, some in another.
    close = ["Connection: close"] if dice.random() < 0.5 else []
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", *close, "", ""])
    return head.encode("latin-1") + body


def _raw(lease: Lease, request: bytes, *, whole: bool = True) -> int | None:
    """Send bytes, and no more of them unless ``whole``; return the status of the answer, None when there was none."""
    with socket.create_connection((lease.host, lease.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n" not in answer and (chunk := connection.recv(4096)):
                answer += chunk
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else None


# --- P14: a bad frame harms its own run at most -------------------------------------


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lease]:
    """A share of a listener, which is not patient with who claims more than it sends."""
    print(f"FUZZ_SEED={SEED}")
    monkeypatch.setattr(guard, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    with listening() as shared:
        yield shared


class TestListener:
    """The listener as a whole, with runs that have nothing to do with what is thrown at it."""

    def test_made_up_frames_leave_other_runs_alone(
        self, lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _pickles_are_not_read(monkeypatch)
        others = Sink()
        live = [open_run(lease, sink) for _ in range(LIVE_RUNS)]
        connection = http.client.HTTPConnection(lease.host, lease.port, timeout=20)
        target = open_run(lease, others)
        sent = 0

        @settings(fuzz, max_examples=REQUESTS)
        @given(data=st.data())
        def throw(data: st.DataObject) -> None:
            nonlocal target, sent
            if lease.find(target.run_id) is None:
                target = open_run(lease, others)
            batch = data.draw(st.lists(_frame(target.run_id), min_size=1, max_size=40))
            with contextlib.suppress(Exception):
                body = _message({"frames": batch}, data.draw(PARTS))
                final = data.draw(st.booleans())
                headers = {**signed(target, body, final=final), "Connection": "keep-alive"}
                connection.request("POST", events_path(target), body, headers)
                response = connection.getresponse()
                response.read()
                assert response.status in (200, 204, 400, 409, 410, 503), response.status
                sent += len(batch)

        throw()
        connection.close()
        assert sent > REQUESTS / 2
        assert sink.frames == []
        for number, run in enumerate(live):
            assert post(lease, run, result_body(run, number)).status == 204
        assert [sink.outcome(run.run_id)["result"] for run in live] == list(range(LIVE_RUNS))

    def test_a_hundred_thousand_frames(
        self, lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """P14's load: frames with one thing or two that are wrong with them, 50 in a request, signed."""
        _pickles_are_not_read(monkeypatch)
        dice = random.Random(SEED)
        live = [open_run(lease, sink) for _ in range(LIVE_RUNS)]
        others = Sink()
        target = open_run(lease, others)
        connection = http.client.HTTPConnection(lease.host, lease.port, timeout=20)
        taken = 0
        for _ in range(FRAMES // 50):
            if lease.find(target.run_id) is None:
                target = open_run(lease, others)
            final = dice.random() < 0.5
            batch = [_wrong_frame(dice, target, frames.EVENTS - frames.TERMINAL) for _ in range(49)]
            batch.append(_wrong_frame(dice, target, frames.TERMINAL if final else frames.EVENTS))
            body = _message({"frames": batch}, [dice.randbytes(9)])
            connection.request("POST", events_path(target), body, signed(target, body, final=final))
            response = connection.getresponse()
            response.read()
            assert response.status in (200, 204, 400, 409, 410, 503)
            taken += response.status < 300
        connection.close()
        assert taken
        assert sink.frames == []
        for number, run in enumerate(live):
            assert post(lease, run, result_body(run, number)).status == 204
        assert [sink.outcome(run.run_id)["result"] for run in live] == list(range(LIVE_RUNS))

    def test_made_up_heads(self, lease: Lease, sink: Sink) -> None:
        run = open_run(lease, sink)
        words = st.sampled_from(
            ["POST", "GET", "PRI", " ", "/", events_path(run), "/wove/v1/beats", "HTTP/1.1", "HTTP/1.0", "\r\n", "\n", "\r",
             "Content-Length:", "0", "-1", "5", "99999999999999999999", "Transfer-Encoding:", "chunked", "Wove-Key:", kid(),
             "Wove-Final:", "1", "Host:", "x", ":", "\x00", "Expect:", "100-continue", "Upgrade:", "websocket", "a" * 5_000]
        )  # fmt: skip

        @settings(fuzz, max_examples=max(50, REQUESTS // 6))
        @given(
            head=st.lists(words | st.text(max_size=10), max_size=30).map("".join), tail=st.binary(max_size=50)
        )
        def throw(head: str, tail: bytes) -> None:
            data = head.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + tail
            assert _raw(lease, data) in (
                None,
                100,
                200,
                400,
                401,
                404,
                405,
                408,
                410,
                411,
                413,
                415,
                417,
                505,
            )

        throw()
        assert sink.frames == []
        assert post(lease, run, result_body(run, 1)).status == 204

    def test_made_up_beats(self, lease: Lease, sink: Sink) -> None:
        run = open_run(lease, sink)
        words = st.sampled_from(
            [
                "hold",
                "run",
                "stopping",
                run.run_id,
                "x" * 70,
                "1",
                "-1",
                "9" * 20,
                "0.1",
                "nan",
                "inf",
                kid(),
                "f" * 64,
            ]
        )
        lines = st.lists(st.lists(words | st.text(max_size=5), max_size=8).map(" ".join), max_size=8).map(
            "\n".join
        )

        @settings(fuzz, max_examples=max(50, REQUESTS // 6))
        @given(body=lines)
        def throw(body: str) -> None:
            raw = body.encode("utf-8", "surrogatepass")
            head = f"POST /wove/v1/beats HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
            assert _raw(lease, head.encode() + raw) in (400, 410)

        throw()
        assert sink.frames == []
        assert post(lease, run, result_body(run, 1)).status == 204


_WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1.5, float("nan"), "", "x" * 99, b"\xff", [], [[]], {}, {"__wove__": "set", "v": [[]]},
    ["data", 0, 1], ["pickle", 0, 1], ["tagged", 0, 9], ["data", -1, 1], [{"kind": 1, "value": ["pickle", 0, 1]}],
)  # fmt: skip


def _wrong_frame(dice: random.Random, run: OpenRun, kinds: frozenset[str]) -> dict[str, Any]:
    frame = event(run, dice.choice(sorted(kinds)), dice.randint(1, 9))
    frame.update(result=["data", 0, 1], error={"kind": "E", "message": "m"}, message="m", fraction=0.5)
    # Most are right but for what nobody reads, or nothing of their request would be looked at but the first.
    wrong = (
        dice.choice(list(frame))
        if dice.random() < 0.02
        else dice.choice(["unknown", "fence", "worker", "exception"])
    )
    frame[wrong] = dice.choice(_WRONG)
    return frame


# --- bounds ------------------------------------------------------------------------


def _nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


class TestBounds:
    """A small body does not become a large value."""

    @pytest.mark.parametrize(
        "data",
        [
            b"\xdd" + struct.pack(">I", 300_000) + b"\x80" * 300_000,
            b"\x9f" + b"".join(b"\xdd" + struct.pack(">I", 900_000) + b"\x90" * 900_000 for _ in range(4)),
            _nested(500),
            _nested(100_000),
            b"\x81\xc0" * 300 + b"\xc0",
            b"\xdd\xff\xff\xff\xff" * 50,
        ],
        ids=[
            "300 000 mappings",
            "3.6 million lists",
            "500 deep",
            "100 000 deep",
            "mappings 300 deep",
            "claims",
        ],
    )
    def test_containers_are_counted(self, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = 0
        counted = Bounds.sequence, Bounds.mapping

        def count(self: Bounds, value: Any, real: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(self, value)

        monkeypatch.setattr(Bounds, "sequence", lambda self, value: count(self, value, counted[0]))
        monkeypatch.setattr(Bounds, "mapping", lambda self, value: count(self, value, counted[1]))
        with contextlib.suppress(ProtocolError):
            decode_value(["data", 0, 1], [memoryview(data)])
        assert calls <= MAX_DECODED + 1

    @pytest.mark.parametrize("depth", [193, 500, 1_000])
    def test_depth(self, depth: int) -> None:
        with pytest.raises(ProtocolError, match=r"nested more than 192 deep|malformed data: StackError"):
            decode_value(["data", 0, 1], [memoryview(_nested(depth))])

    def test_as_deep_as_it_may_be(self) -> None:
        assert decode_value(["data", 0, 1], [memoryview(_nested(192))])

    def test_a_long_json_message(self) -> None:
        with pytest.raises(ProtocolError, match=r"a JSON message of \d+ bytes, and \d+ are taken"):
            unpack_json(b" " * (16 * 1024 * 1024 + 1))


def test_a_ring_of_strangers_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = seal_payload(SecretRing.parse(secrets.token_hex(32), "a test"), ENVIRONMENT, [b"x" * 100])
    calls = record_calls(monkeypatch, *DECODERS)
    with pytest.raises(PayloadRejectedError, match="does not have"):
        Assignment(blob)
    assert calls == []


def test_the_listener_forgets_what_was_thrown_at_it(lease: Lease, sink: Sink) -> None:
    run = open_run(lease, sink)
    for _ in range(50):
        _raw(
            lease, b"POST /wove/v1/events/" + secrets.token_hex(16).encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        )
    assert len(hub._listeners[(lease.host, 0, None)].listener.runs) == 1
    wait_until(
        lambda: hub._listeners[(lease.host, 0, None)].listener.guard.connections == 0, "they are closed"
    )
    assert post(lease, run, result_body(run, 1)).status == 204
    assert event(run, "log")["run_id"] == run.run_id
