"""The worker side against a callback server that behaves as badly as the test wants it to."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from wove_tests import tasks
from wove_tests.callbacks import Payload, child_environment, wait_until
from wove_tests.fake_callback_server import RESET, Answer, FakeCallbackServer
from wove_tests.recorder import DECODERS, record_calls
from wove_tests.waiting import until

from wove import EncodeError, current, frames
from wove.backend import as_text
from wove.demo.processes import free_port
from wove.errors import ConfigurationError, PayloadRejectedError, ProtocolError
from wove.refusals import refusals as counted
from wove.remote_errors import decode_exception
from wove.security import find_secrets, open_payload, seal_payload
from wove.wire import pack_message, unpack_message
from wove.worker import arun, assignment, beats, connection, courier, execution, offering, session, starting
from wove.worker.calls import TaskCancelledItself
from wove.worker.hooks import BackendHooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from wove.frames import Frame


@pytest.fixture
def server() -> Iterator[FakeCallbackServer]:
    """A callback server that listens."""
    with FakeCallbackServer() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a worker that has spoken to nobody, and end what it has begun."""
    monkeypatch.setattr(courier, "IDLE_SECONDS", 0.3)
    connection.clock_offsets.clear()
    offering.down_since.clear()
    CALLS.clear()
    GATE.clear()
    yield
    GATE.set()
    for kept in getattr(connection._local, "connections", {}).values():
        kept.close()
    connection._local.__dict__.clear()


@pytest.fixture
def fresh(server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads count as submitted this moment, however slow this machine is, and the clock is known."""
    monkeypatch.setattr(starting, "FRESH", 60.0)
    assert run(Payload(server.url, double, 0))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks beat from their first moments."""
    monkeypatch.setattr(courier, "REPORT_AFTER", 0.02)
    monkeypatch.setattr(courier, "BEAT_AFTER", 0.04)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads in which payloads run while the test looks on."""
    with ThreadPoolExecutor(4, "test-worker") as pool:
        yield pool
        GATE.set()


# --- what runs; in this process, so that a test can see it -------------------------

CALLS: list[Any] = []
GATE = threading.Event()


def double(number: int) -> int:
    CALLS.append(number)
    return number * 2


async def double_async(number: int) -> int:
    CALLS.append(number)
    await asyncio.sleep(0)
    return number * 2


def fail(text: str) -> NoReturn:
    raise LookupError(text)


def leave() -> NoReturn:
    raise SystemExit(4)


def who() -> tuple[str, int, bool]:
    context = current()
    return context.run_id, context.attempt, context.cancelled


def big(size: int) -> bytes:
    return bytes(size)


def wait_for_gate() -> str:
    CALLS.append("begun")
    GATE.wait(30)
    return "gone through"


def wait_for_cancel() -> str:
    CALLS.append("begun")
    deadline = time.monotonic() + 30
    while not current().cancelled and time.monotonic() < deadline:
        time.sleep(0.005)
    CALLS.append("cancelled" if current().cancelled else "in vain")
    return "ended by itself"


async def wait_for_cancel_async() -> None:
    CALLS.append("begun")
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        CALLS.append("cancelled")
        raise


async def cancel_itself() -> None:
    raise asyncio.CancelledError


def report(count: int, pause: float) -> int:
    for number in range(count):
        current().progress((number + 1) / count, f"step {number}")
        time.sleep(pause)
    return count


def report_and_wait() -> None:
    current().log("one")
    current().progress(None, "two")
    GATE.wait(30)


def loop_and_thread() -> tuple[int, int]:
    return threading.get_ident(), 0


async def loop_and_thread_async() -> tuple[int, int]:
    return threading.get_ident(), id(asyncio.get_running_loop())


def talk(lines: int) -> int:
    for number in range(lines):
        current().log(f"line {number}")
    return lines


class SoftTimeLimitExceeded(Exception):
    """Named as Celery's, which strikes wherever the main thread is."""


class JobTimeoutException(Exception):
    """Named as RQ's."""


LIMITS = [SoftTimeLimitExceeded, JobTimeoutException]


def strike(name: str) -> NoReturn:
    raise {kind.__name__: kind for kind in LIMITS}[name]("time is up")


class Struck(Exception):
    """The time is up while it is pickled, or unpickled; only once, as a limit does."""

    def __init__(self, name: str, *, later: bool = False) -> None:
        super().__init__(name)
        self.name, self.later = name, later

    def __reduce__(self) -> Any:
        if self.later:
            return strike, (self.name,)
        name, self.name = self.name, ""
        if name:
            strike(name)
        return type(self), ("",)


def return_struck(name: str) -> Struck:
    return Struck(name)


def raise_struck(name: str) -> NoReturn:
    raise Struck(name)


def ignore(_: object) -> None:
    CALLS.append("ignored")


class RunsAgain(BackendHooks):
    """Runs payloads again whose time was up."""

    def runs_again(self, ending: Any) -> bool:
        return isinstance(ending, tuple(LIMITS))


class Keeps(BackendHooks):
    """Keeps outcomes."""

    def __init__(self) -> None:
        self.parked: list[bytes] = []

    def park(self, outcome: bytes) -> None:
        self.parked.append(outcome)


def strike_once(monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """Have a time limit strike in the middle of a request."""
    left = [True] * after + [False]

    def request(*args: Any, **options: Any) -> Any:
        if left and not left.pop(0):
            raise SoftTimeLimitExceeded
        return real(*args, **options)

    real = session.request
    monkeypatch.setattr(session, "request", request)


def run(payload: Payload, **options: Any) -> bool:
    """Run a payload as a backend does."""
    return execution.run(payload.blob, **options)


def rebuilt(payload: Payload, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Return the payload with another envelope, signed again."""
    ring = find_secrets()
    environment, _, message = open_payload(ring, payload.blob)
    envelope, attachments = unpack_message(message)
    return seal_payload(ring, environment, pack_message(change(envelope), attachments))


def outcome(server: FakeCallbackServer, payload: Payload) -> Frame:
    """Return the one outcome of a run that was taken."""
    (request,) = [request for request in server.outcomes(payload) if request.accepted]
    return request.frames(payload)[-1]


def hear_of_withdrawals(
    server: FakeCallbackServer,
    monkeypatch: pytest.MonkeyPatch,
    told: str = "7",
    *,
    recent: float = 60.0,
    settled: float = 3600.0,
) -> None:
    """Have the listener tell this worker how many withdrawals there were; nothing that comes then is fresh."""
    monkeypatch.setattr(starting, "FRESH", 0.0)
    monkeypatch.setattr(starting, "RECENT", recent)
    monkeypatch.setattr(starting, "SETTLED", settled)
    server.script["events"].extend([Answer(204, {"Wove-Withdrawn": told})] * 4)
    assert run(Payload(server.url, double, 0))


class TestOutcome:
    """One request where one is enough, and everything in it."""

    @pytest.mark.usefixtures("fresh")
    def test_a_short_task_needs_one_request(self, server: FakeCallbackServer) -> None:
        before = len(server.requests)
        payload = Payload(server.url, double, 21)
        assert run(payload) is True
        (request,) = server.requests[before:]
        assert request.final
        started, result = request.frames(payload)
        assert (started["type"], result["type"]) == ("task_started", "task_result")
        assert result["result"] == 42
        assert "fence" not in started
        # All requests of this thread went over one connection.
        assert len({each.peer for each in server.requests}) == 1

    def test_what_may_have_been_cancelled_is_asked_for_first(self, server: FakeCallbackServer) -> None:
        # Nothing is known of the submitter's clock before its first reply.
        payload = Payload(server.url, double, 21)
        assert run(payload) is True
        fence, last = server.events(payload)
        assert [(f["type"], f["fence"]) for f in fence.frames(payload)] == [("task_started", True)]
        assert not fence.final
        assert [f["type"] for f in last.frames(payload)] == ["task_result"]

    @pytest.mark.parametrize(
        ("payload", "told", "again", "recent", "asks"),
        [
            ({"withdrawn": 7}, "7", False, 60.0, False),
            ({"withdrawn": 7}, "8", False, 60.0, True),
            ({"withdrawn": 7}, "7", True, 60.0, True),
            ({"withdrawn": 7}, "7", False, 0.0, True),
            ({"withdrawn": 7}, "", False, 60.0, True),
            ({}, "7", False, 60.0, True),
            ({"withdrawn": 7, "delivery": {"keep": True}}, "7", False, 60.0, True),
            ({"withdrawn": 7, "delivery": {"key": "k"}}, "7", False, 60.0, True),
        ],
    )
    def test_what_waited_is_not_asked_for_while_nothing_was_withdrawn(
        self,
        server: FakeCallbackServer,
        monkeypatch: pytest.MonkeyPatch,
        payload: dict[str, Any],
        told: str,
        again: bool,
        recent: float,
        asks: bool,
    ) -> None:
        hear_of_withdrawals(server, monkeypatch, told, recent=recent)
        for origin in connection.clock_offsets:  # by its reply alone the clock may be a moment off
            connection.clock_offsets[origin] = (0.0, time.time() - time.monotonic())
        waiting = Payload(server.url, double, 21, **payload)
        assert run(waiting, redelivered=again)
        first = server.events(waiting)[0].frames(waiting)[0]
        assert ("fence" in first) is asks

    def test_a_copy_of_what_this_process_has_begun_is_asked_for(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hear_of_withdrawals(server, monkeypatch)
        payload = Payload(server.url, double, 21, withdrawn=7)
        assert run(payload)
        assert run(payload)
        asked = ["fence" in request.frames(payload)[0] for request in server.events(payload)]
        assert asked == [False, True, False]

    def test_what_waited_long_is_asked_for(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hear_of_withdrawals(server, monkeypatch, settled=0.0)
        waiting = Payload(server.url, double, 21, withdrawn=7)
        assert run(waiting)
        assert "fence" in server.events(waiting)[0].frames(waiting)[0]

    @pytest.mark.usefixtures("fresh")
    def test_what_is_delivered_again_is_asked_for_first(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        assert run(payload, redelivered=True) is True
        assert server.events(payload)[0].frames(payload)[0]["fence"] is True

    def test_every_event_says_where_it_is_from(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, report, 3, 0)
        run(payload, backend={"backend": "celery", "job": "j-1"})
        taken = server.taken(payload)
        assert [f["seq"] for f in taken] == sorted({f["seq"] for f in taken})
        assert {(f["run_id"], f["attempt"]) for f in taken} == {(payload.run_id, 1)}
        for frame in taken:
            assert frame["worker"]["pid"] == os.getpid()
            assert frame["worker"]["backend"] == "celery"
            assert frame["worker"]["job"] == "j-1"

    def test_the_function_can_ask_who_it_is(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, who)
        run(payload)
        assert outcome(server, payload)["result"] == (payload.run_id, 1, False)
        assert current().run_id == ""

    def test_a_payload_that_travelled_as_text(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 4)
        execution.run(as_text(payload.blob))
        assert outcome(server, payload)["result"] == 8

    def test_a_coroutine_function(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double_async, 4)
        run(payload)
        assert outcome(server, payload)["result"] == 8

    def test_an_exception_is_reported_and_raised(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, fail, "nothing there")
        # The backend counts the task as failed as well.
        with pytest.raises(LookupError, match="nothing there"):
            run(payload)
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["message"], error["source"]) == ("LookupError", "nothing there", "task")
        assert "in fail" in error["traceback"]
        assert "wove/worker" not in error["traceback"], "the frames of the library tell nothing"
        (request,) = server.outcomes(payload)
        envelope, attachments = unpack_message(request.body)
        exc = decode_exception(envelope["frames"][-1]["exception"], attachments)
        assert isinstance(exc, LookupError)

    def test_system_exit_is_reported_before_it_ends_the_process(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, leave)
        with pytest.raises(SystemExit):
            run(payload)
        assert outcome(server, payload)["error"]["kind"] == "SystemExit"

    def test_a_time_limit_that_strikes_while_it_asks_is_its_error(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strike_once(monkeypatch)
        payload = Payload(server.url, double, 1)
        with pytest.raises(SoftTimeLimitExceeded):
            run(payload)
        assert outcome(server, payload)["error"]["kind"] == "SoftTimeLimitExceeded"

    def test_a_copy_whose_time_is_up_while_it_asks_says_nothing(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Another execution may be under way, and its outcome is the one that counts.
        strike_once(monkeypatch)
        payload = Payload(server.url, double, 1)
        with pytest.raises(SoftTimeLimitExceeded):
            run(payload, redelivered=True)
        assert server.outcomes(payload) == []
        strike_once(monkeypatch, after=1)
        server.script["events"].append(Answer(503, {"Retry-After": "0.05"}))
        assert run(payload) is False
        assert server.outcomes(payload) == []

    @pytest.mark.parametrize("lines", [0, 60], ids=["the outcome", "what goes ahead of it"])
    def test_an_outcome_that_a_time_limit_interrupts_is_kept(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch, lines: int
    ) -> None:
        strike_once(monkeypatch, after=1)  # the question for leave goes through
        payload, hooks = Payload(server.url, talk, lines), Keeps()
        # It has done its work, and the backend is not to have it done again.
        assert run(payload, hooks=hooks)
        assert len(hooks.parked) == 1

    @pytest.mark.parametrize("kind", LIMITS)
    @pytest.mark.parametrize("func", [return_struck, raise_struck], ids=["result", "error"])
    def test_a_time_limit_that_strikes_while_an_outcome_is_encoded_is_the_tasks(
        self, server: FakeCallbackServer, func: Callable[[str], object], kind: type[Exception]
    ) -> None:
        payload, hooks = Payload(server.url, func, kind.__name__), Keeps()
        with pytest.raises(kind, match="time is up"):
            run(payload, hooks=hooks)
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["message"], error["source"]) == (kind.__name__, "time is up", "task")
        assert hooks.parked == []

    def test_a_time_limit_that_strikes_while_a_result_is_encoded_is_retried_as_the_tasks(
        self, server: FakeCallbackServer
    ) -> None:
        payload = Payload(server.url, return_struck, "SoftTimeLimitExceeded")
        with pytest.raises(SoftTimeLimitExceeded):
            run(payload, hooks=RunsAgain())
        assert server.outcomes(payload) == []
        assert server.taken(payload)[-1]["type"] == frames.TASK_RETRY

    def test_a_time_limit_that_strikes_before_a_result_is_offered_is_told(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def deliver(*_: object) -> NoReturn:
            strike("SoftTimeLimitExceeded")

        monkeypatch.setattr(session.Session, "deliver_result", deliver)
        payload = Payload(server.url, double, 1)
        with pytest.raises(SoftTimeLimitExceeded):
            run(payload)
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["source"]) == ("SoftTimeLimitExceeded", "task")

    @pytest.mark.parametrize("kind", LIMITS)
    def test_a_time_limit_that_strikes_while_arguments_are_decoded_is_the_tasks(
        self, server: FakeCallbackServer, kind: type[Exception]
    ) -> None:
        payload = Payload(server.url, ignore, Struck(kind.__name__, later=True))
        with pytest.raises(kind):
            run(payload)
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["source"], CALLS) == (kind.__name__, "task", [])
        assert "could not load" not in error["traceback"]

    @pytest.mark.parametrize("redelivered", [False, True])
    @pytest.mark.parametrize("kind", LIMITS)
    def test_a_time_limit_that_strikes_while_it_asks_for_the_time_is_the_tasks(
        self,
        server: FakeCallbackServer,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[Exception],
        redelivered: bool,
    ) -> None:
        def request(*_: object, **__: object) -> NoReturn:
            strike(kind.__name__)

        monkeypatch.setattr(assignment, "request", request)
        payload = Payload(server.url, double, 1)
        expiring = rebuilt(payload, lambda envelope: {**envelope, "expires": 3600.0})
        with pytest.raises(kind):
            execution.run(expiring, redelivered=redelivered)
        assert CALLS == []
        if redelivered:  # another execution may be under way, and its outcome is the one that counts
            assert server.outcomes(payload) == []
            return
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["source"]) == (kind.__name__, "task")

    def test_a_cancellation_that_nobody_asked_for_is_an_error(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, cancel_itself)
        with pytest.raises(TaskCancelledItself):
            run(payload)
        assert outcome(server, payload)["error"]["kind"] == "TaskCancelledItself"

    def test_a_result_that_cannot_be_sent(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, tasks.return_lock)
        run(payload)
        error = outcome(server, payload)["error"]
        assert error["kind"] == EncodeError.__name__
        assert "_thread.lock" in error["message"]

    def test_a_function_that_is_missing_here(self, server: FakeCallbackServer, tmp_path: Path) -> None:
        payload = Payload(server.url, tasks.double, 1)
        renamed = rebuilt(payload, lambda envelope: {**envelope, "callable": "wove_tests.tasks:no_such_task"})
        with pytest.raises(AttributeError, match="no_such_task"):
            execution.run(renamed)
        error = outcome(server, payload)["error"]
        assert error["source"] == "worker"
        assert "install the code there that the submitter has" in error["traceback"]

    def test_two_threads_have_a_connection_each(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        first, second = (Payload(server.url, wait_for_gate) for _ in range(2))
        running = [background.submit(run, each) for each in (first, second)]
        wait_until(lambda: CALLS == ["begun"] * 2, "both run")
        GATE.set()
        assert all(each.result(10) for each in running)
        peers = [{request.peer for request in server.outcomes(each)} for each in (first, second)]
        assert peers[0].isdisjoint(peers[1])

    def test_a_thread_takes_its_connection_along(self, server: FakeCallbackServer) -> None:
        thread = threading.Thread(target=run, args=(Payload(server.url, double, 1),))
        thread.start()
        thread.join()
        wait_until(lambda: not server.connections, "its connection is closed")

    def test_connections_to_many_submitters_are_bounded(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "MAX_ORIGINS", 2)
        with FakeCallbackServer() as second, FakeCallbackServer() as third:
            for each in (server, second):
                run(Payload(each.url, double, 1))
            assert server.connections
            assert second.connections
            run(Payload(third.url, double, 1))
            wait_until(lambda: not server.connections, "the least recently used one is closed")
            assert second.connections

    def test_proxies_of_the_environment_are_not_asked(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nobody = f"http://127.0.0.1:{free_port()}"
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, nobody)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        payload = Payload(server.url, double, 1)
        run(payload)
        assert outcome(server, payload)["result"] == 2
        assert server.events(payload)[0].path.startswith("/wove/"), "no proxy's absolute form"


class TestFetching:
    """Arguments that are too large for the broker."""

    def test_they_are_fetched(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, len, bytes(1_000_000))
        assert payload.message is not None
        assert len(payload.blob) < 2_000
        server.messages[payload.run_id] = b"".join(bytes(part) for part in payload.message)
        run(payload)
        assert outcome(server, payload)["result"] == 1_000_000

    def test_others_than_were_sent_are_refused_undecoded(
        self, server: FakeCallbackServer, decoded: list[str]
    ) -> None:
        payload = Payload(server.url, len, bytes(1_000_000))
        assert payload.message is not None
        message = bytearray().join(bytes(part) for part in payload.message)
        message[-1] ^= 1
        server.messages[payload.run_id] = bytes(message)
        with pytest.raises(Exception, match="changed while they were sent"):
            run(payload)
        assert decoded.count("unpackb") == 1, "that of the payload itself"
        assert "changed while they were sent" in outcome(server, payload)["error"]["message"]

    def test_a_hitch_is_overcome(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, len, bytes(1_000_000))
        assert payload.message is not None
        server.messages[payload.run_id] = b"".join(bytes(part) for part in payload.message)
        server.script["payloads"].append(RESET)
        run(payload)
        assert outcome(server, payload)["result"] == 1_000_000

    def test_they_are_not_to_be_had(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, len, bytes(1_000_000))
        server.script["payloads"].extend([Answer(404)] * 10)
        assert run(payload) is False
        # Nothing of the task ran: its delivery failed, and may be made again.
        error = outcome(server, payload)["error"]
        assert (error["kind"], error["source"]) == ("WorkerLostError", "backend")
        assert "did not hand out the run's arguments" in error["message"]

    def test_they_are_gone_with_the_run(self, server: FakeCallbackServer) -> None:
        # It was cancelled meanwhile: neither a success nor a failure.
        payload = Payload(server.url, len, bytes(1_000_000))
        assert run(payload) is False
        assert outcome(server, payload)["type"] == "task_cancelled"


# --- delivery of the outcome ------------------------------------------------------


def refusals() -> dict[str, list[Answer]]:
    return {
        "a reset": [RESET],
        "three resets": [RESET] * 3,
        "overload": [Answer(503, {"Retry-After": "0.1"})] * 2,
        "errors of a proxy": [Answer(502), Answer(504)],
        "an answer that is no HTTP": [Answer(None, raw=b"hello\r\n\r\n")],
        "an answer cut short": [Answer(None, raw=b"HTTP/1.1 20")],
        "a timeout": [Answer(408)],
    }


class TestDelivery:
    """An outcome is offered until it is taken, and is taken once."""

    @pytest.mark.parametrize("trouble", refusals())
    def test_it_is_offered_again(self, server: FakeCallbackServer, trouble: str) -> None:
        payload = Payload(server.url, double, 21)
        # The first answer lets the task start.
        server.script["events"].extend([Answer(), *refusals()[trouble]])
        assert run(payload) is True
        offered = server.outcomes(payload)
        assert len(offered) == 1 + len(refusals()[trouble])
        assert len({request.body for request in offered}) == 1, "the same, so that a repetition is harmless"
        assert [request.accepted for request in offered].count(True) == 1
        assert offered[-1].status == 204
        assert offered[-1].frames(payload)[-1]["result"] == 42

    def test_a_server_that_was_away(self, background: ThreadPoolExecutor) -> None:
        with FakeCallbackServer(listen=False) as server:
            payload = Payload(server.url, double, 21)
            running = background.submit(run, payload)
            # The question before the start and the first offer are refused by then.
            wait_until(lambda: CALLS, "the task runs although nobody could be asked")
            assert not running.done()
            server.start()
            assert running.result(10) is True
            (request,) = server.outcomes(payload)
            assert request.frames(payload)[-1]["result"] == 42

    def test_an_error_is_offered_again_too(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, fail, "nothing there")
        server.script["events"].extend([Answer(), RESET, Answer(503, {"Retry-After": "0.1"})])
        with pytest.raises(LookupError):
            run(payload)
        assert outcome(server, payload)["error"]["message"] == "nothing there"

    def test_retry_after_is_heeded(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), Answer(503, {"Retry-After": "0.6"})])
        run(payload)
        first, second = server.outcomes(payload)
        # Half of it at least: a fleet that was put off does not come back all at once.
        assert second.at - first.at >= 0.3

    def test_a_fleet_does_not_come_back_in_step(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            asked.append((low, high))
            return high

        monkeypatch.setattr(random, "uniform", uniform)
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), *[RESET] * 12])
        run(payload)
        assert len(asked) >= 5
        assert {low for low, _ in asked} == {0}, "full jitter"
        highs = [high for _, high in asked]
        assert highs == sorted(highs)
        assert highs[-1] > highs[0], "longer, the longer the server is away"

    def test_it_gives_up_in_the_end(
        self,
        server: FakeCallbackServer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0.3")
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), *[Answer(500)] * 1_000])
        begun = time.monotonic()
        # The function did run to its end, and its backend does not run it again.
        assert run(payload) is True
        assert time.monotonic() - begun < 3
        assert len(server.outcomes(payload)) > 1
        (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert error.name == "wove.worker"
        for detail in (payload.run_id, server.url, "500"):
            assert detail in error.getMessage()

    def test_it_gives_up_on_a_server_that_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0.3")
        payload = Payload(f"http://127.0.0.1:{free_port()}", double, 21)
        assert run(payload) is True
        assert CALLS == [21]
        (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert "refused" in error.getMessage()

    def test_a_wrong_setting_is_said_and_not_followed(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert offering.retry_seconds() == 300
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "five minutes")
        assert offering.retry_seconds() == 300
        assert "WOVE_RESULT_RETRY_SECONDS" in caplog.text

    def test_a_server_that_does_not_know_the_secret_is_not_pestered(
        self, server: FakeCallbackServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), *[Answer(401)] * 100])
        run(payload)
        assert len(server.outcomes(payload)) == 3
        assert "401" in caplog.records[-1].getMessage()
        assert caplog.records[-1].levelno == logging.ERROR

    def test_a_run_that_is_closed_by_now(
        self, server: FakeCallbackServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), Answer(410)])
        assert run(payload) is True
        assert len(server.outcomes(payload)) == 1
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("status", [400, 404])
    def test_an_answer_that_does_not_change(
        self, server: FakeCallbackServer, caplog: pytest.LogCaptureFixture, status: int
    ) -> None:
        # Once it may be a body that was cut on its way; not three times.
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([Answer(), *[Answer(status)] * 100])
        run(payload)
        assert len(server.outcomes(payload)) == 3
        (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert payload.run_id in error.getMessage()

    def test_an_outage_is_waited_for_once(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The runs of a submitter that is gone must not each hold a slot of the fleet for minutes.
        monkeypatch.setattr(random, "uniform", lambda low, high: 0.02)
        monkeypatch.setattr(offering, "LEAST_RETRY", 0.01)
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0.4")
        first, second = Payload(server.url, double, 1), Payload(server.url, double, 2)
        server.script["events"].extend([RESET] * 1_000)
        run(first)
        run(second)
        assert len(server.outcomes(first)) > 5
        assert len(server.outcomes(second)) <= 2
        # What is back is trusted anew.
        server.script["events"].clear()
        third = Payload(server.url, double, 3)
        run(third)
        server.script["events"].extend([Answer(), *[RESET] * 6])
        last = Payload(server.url, double, 4)
        run(last)
        assert outcome(server, last)["result"] == 8

    def test_nobody_waits_beyond_the_deadline(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(offering, "LEAST_RETRY", 0.05)
        payload = Payload(server.url, double, 1, timeout=0.3)
        server.script["events"].extend([Answer(500)] * 1_000)
        begun = time.monotonic()
        run(payload)
        assert time.monotonic() - begun < 10, "and not for 300 s"
        assert CALLS == [1]
        assert server.outcomes(payload), "it was offered"

    @pytest.mark.parametrize("size", [20_000, 32 * 1024 * 1024], ids=["small", "large"])
    def test_a_result_that_is_too_large_becomes_an_error(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        # The real one answers from the head and closes; a large body is still on its way by then.
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "1")
        payload = Payload(server.url, big, size)
        server.max_body = 16_000
        run(payload)
        error = outcome(server, payload)["error"]
        assert error["kind"] == EncodeError.__name__
        assert "callback_max_body" in error["message"]
        assert re.search(r"has \d{5,} bytes", error["message"])

    def test_an_exception_that_is_too_large_is_sent_as_text(self, server: FakeCallbackServer) -> None:
        server.max_body = 60_000
        payload = Payload(server.url, fail, "x" * 50_000)
        with pytest.raises(LookupError):
            run(payload)
        frame = outcome(server, payload)
        assert frame["error"]["kind"] == "LookupError"
        assert "exception" not in frame


# --- leave to start -----------------------------------------------------------


class TestFence:
    """A run that nobody wants is not begun; one that nobody can be asked about is."""

    def test_a_run_that_is_not_wanted(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        server.script["events"].append(Answer(410))
        assert run(payload) is False
        assert CALLS == []
        assert len(server.events(payload)) == 1

    async def test_a_run_that_is_not_wanted_in_a_loop(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double_async, 21)
        server.script["events"].append(Answer(410))
        assert await arun(payload.blob) is False
        assert CALLS == []

    def test_who_is_told_to_wait_asks_again(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        wait = Answer(503, {"Retry-After": "0.05"})
        server.script["events"].extend([wait, wait])
        assert run(payload) is True
        assert CALLS == [21]
        assert [f["type"] for f in server.outcomes(payload)[-1].frames(payload)] == ["task_result"]

    def test_what_another_worker_is_at_is_left_to_it(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        server.script["events"].append(Answer(409))
        assert run(payload) is False
        assert CALLS == []

    def test_work_that_is_kept_is_done_also_when_its_submitter_has_gone(
        self, server: FakeCallbackServer
    ) -> None:
        for answer, begins in ((Answer(410), True), (Answer(410, {"Wove-Ended": "1"}), False)):
            CALLS.clear()
            payload = Payload(server.url, double, 21, delivery={"keep": True})
            server.script["events"].append(answer)
            assert run(payload, redelivered=True) is begins
            assert CALLS == [21] * begins
            server.script["events"].clear()

    @pytest.mark.parametrize("answer", [RESET, Answer(500), Answer(401), Answer(None, raw=b"?")])
    def test_no_answer_that_means_anything(
        self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch, answer: Answer
    ) -> None:
        monkeypatch.setattr(starting, "ASK_AGAIN", 0.0)
        payload = Payload(server.url, double, 21)
        server.script["events"].append(answer)
        assert run(payload) is True
        assert CALLS == [21]
        # Nobody has heard of the start, so the outcome tells of it.
        assert [f["type"] for f in server.outcomes(payload)[-1].frames(payload)] == [
            "task_started",
            "task_result",
        ]

    @pytest.mark.parametrize("lost", [RESET, Answer(None, raw=b"HTTP/1.1 410 Go")], ids=["reset", "cut"])
    def test_an_answer_that_was_lost_is_asked_for_again(
        self, server: FakeCallbackServer, lost: Answer
    ) -> None:
        # It may have been that the run was cancelled; the callback server has then told the caller so.
        payload = Payload(server.url, double, 21)
        server.script["events"].extend([lost, lost, Answer(410, {"Wove-Ended": "1"})])
        assert run(payload) is False
        assert CALLS == []

    def test_no_answer_in_time(self, server: FakeCallbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(starting, "ASK_TIMEOUT", 0.1)
        never = threading.Event()
        payload = Payload(server.url, double, 21)
        server.script["events"].append(Answer(after=never))
        try:
            assert run(payload) is True
        finally:
            never.set()
        assert CALLS == [21]

    def test_a_run_whose_deadline_is_over_and_whose_caller_has_gone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # It lay in the queue, and nobody answers: the caller has given up long ago.
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0")
        payload = Payload(f"http://127.0.0.1:{free_port()}", double, 21, timeout=60)
        for age, skipped in ((30, False), (600, True)):
            old = rebuilt(payload, lambda envelope, age=age: {**envelope, "sent_at": time.time() - age})
            CALLS.clear()
            completed = execution.run(old)
            assert (completed, CALLS) == ((False, []) if skipped else (True, [21]))
            connection.clock_offsets.clear()

    def test_a_cancellation_in_the_answer(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, who)
        server.cancel_with = payload.key
        run(payload)
        assert outcome(server, payload)["result"][2] is True

    def test_a_cancellation_that_is_forged(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, who)
        server.cancel_with = b"another key"
        run(payload)
        assert outcome(server, payload)["result"][2] is False


# --- payloads that are refused --------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was decoded or imported, whoever did it."""
    return record_calls(monkeypatch, *DECODERS, (importlib, "import_module"))


OTHER_SECRET = "another-secret-that-nobody-here-has"


def _changed(at: int) -> Callable[[Payload], bytes]:
    def change(payload: Payload) -> bytes:
        blob = bytearray(payload.blob)
        blob[at] ^= 1
        return bytes(blob)

    return change


def _under_the_same_name(payload: Payload) -> bytes:
    """Return a payload signed with another value of the secret that has the same key id."""
    return Payload("http://127.0.0.1:1", double, 1, secret=f"{payload.kid}:{OTHER_SECRET}").blob


NOT_WOVES = "not a Wove payload"

REJECTED: dict[str, tuple[Callable[[Payload], Any], str]] = {
    "no bytes at all": (lambda payload: b"", NOT_WOVES),
    "garbage": (lambda payload: b"garbage", NOT_WOVES),
    "garbage text": (lambda payload: "no base64!", NOT_WOVES),
    "text beyond ASCII": (lambda payload: "\N{SNOWMAN}", NOT_WOVES),
    "text of garbage": (lambda payload: base64.b64encode(b"garbage").decode(), NOT_WOVES),
    "a number": (lambda payload: 7, NOT_WOVES),
    "a pickle": (lambda payload: pickle.dumps(tasks.Point(1, 2)), NOT_WOVES),
    "an unsigned message": (lambda payload: payload.blob[payload.blob.index(b"\x00\x00") :], NOT_WOVES),
    "the message of a newer version": (
        lambda payload: payload.blob.replace(b"WOVE\x01", b"WOVE\x02"),
        "version",
    ),
    "the first bytes": (lambda payload: payload.blob[:5], "cut short"),
    "the head alone": (lambda payload: payload.blob[:12], "cut short"),
    "half of it": (lambda payload: payload.blob[: len(payload.blob) // 2], "signature"),
    "all but a byte": (lambda payload: payload.blob[:-1], "signature"),
    "a byte more": (lambda payload: payload.blob + b"x", "signature"),
    "a byte of the message changed": (_changed(-1), "signature"),
    "a byte of the signature changed": (_changed(5 + 9 + 6), "signature"),
    "another environment": (lambda payload: payload.blob.replace(b"\x05tests", b"\x05other", 1), "signature"),
    "an unknown secret": (
        lambda payload: Payload("http://127.0.0.1:1", double, 1, secret=OTHER_SECRET).blob,
        "the same WOVE_SECRET",
    ),
    "another secret of the same name": (_under_the_same_name, "the same WOVE_SECRET"),
}


def _as(**changes: Any) -> Callable[[Payload], bytes]:
    return lambda payload: rebuilt(payload, lambda envelope: {**envelope, **changes})


# By reason: what is done to a payload, and what is set on its worker.
COUNTED: dict[str, tuple[Callable[[Payload], Any], dict[str, str]]] = {
    "signature": (lambda payload: payload.blob[:-1], {}),
    "malformed": (_as(run_id="x"), {}),
    "callback": (lambda payload: payload.blob, {"WOVE_CALLBACK_ALLOW": "https://elsewhere.example"}),
    "environment": (lambda payload: payload.blob, {"WOVE_ENVIRONMENTS": "finance"}),
    "expired": (_as(sent_at=1.0, expires=60.0), {}),
    "version": (_as(v=2), {}),
    "function": (lambda payload: payload.blob, {"WOVE_ALLOW": "elsewhere:*"}),
    "pickle": (_as(callable="builtins:abs", args=["pickle", 0, 1]), {"WOVE_ALLOW": "builtins:abs"}),
    "settings": (lambda payload: payload.blob, {"WOVE_CALLBACK_ALLOW": "nonsense"}),
}


class TestRejection:
    """What is not signed with this worker's secret is refused before it is looked into."""

    @pytest.mark.parametrize("how", REJECTED)
    def test_by_run(
        self, server: FakeCallbackServer, decoded: list[str], caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        build, says = REJECTED[how]
        payload = Payload(server.url, double, 21)
        with pytest.raises(PayloadRejectedError, match=says):
            execution.run(build(payload))
        assert decoded == []
        assert CALLS == []
        assert server.requests == [], "nobody is told: who sent it is not known"
        # Whoever operates the worker is.
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert says in caplog.text
        # The recorder works.
        run(payload)
        assert decoded

    @pytest.mark.parametrize("reason", sorted(COUNTED))
    def test_it_is_counted(
        self,
        server: FakeCallbackServer,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        reason: str,
    ) -> None:
        """P7: metric +1, and a record that can be told by its field."""
        change, variables = COUNTED[reason]
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        payload = change(Payload(server.url, double, 21))
        before = counted()
        with pytest.raises((PayloadRejectedError, ProtocolError, ConfigurationError)):
            execution.run(payload)
        after = counted()
        assert after.pop(f"payload:{reason}") == before.pop(f"payload:{reason}", 0) + 1
        assert after == before
        assert [record.wove_refusal for record in caplog.records if hasattr(record, "wove_refusal")] == [
            reason
        ]
        assert CALLS == []

    @pytest.mark.parametrize("how", ["garbage", "an unknown secret", "all but a byte"])
    async def test_by_arun(self, server: FakeCallbackServer, decoded: list[str], how: str) -> None:
        build, says = REJECTED[how]
        with pytest.raises(PayloadRejectedError, match=says):
            await arun(build(Payload(server.url, double_async, 21)))
        assert decoded == []
        assert CALLS == []

    def test_no_message_shows_a_secret(self, server: FakeCallbackServer) -> None:
        for build, _ in REJECTED.values():
            with pytest.raises(PayloadRejectedError) as caught:
                execution.run(build(Payload(server.url, double, 21)))
            assert os.environ["WOVE_SECRET"] not in str(caught.value)
            assert OTHER_SECRET not in str(caught.value)

    def test_a_version_that_this_worker_does_not_read(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, double, 21)
        with pytest.raises(PayloadRejectedError, match=r"version 2 .* version 1: install the same release"):
            execution.run(rebuilt(payload, lambda envelope: {**envelope, "v": 2}))
        assert CALLS == []
        assert "install the same release" in outcome(server, payload)["error"]["message"]

    @pytest.mark.parametrize("key", ["run_id", "task_id", "attempt", "callback", "sent_at", "nonce"])
    @pytest.mark.parametrize("value", [None, ["wrong"]], ids=["missing", "wrong"])
    def test_a_signed_payload_that_is_malformed(
        self, server: FakeCallbackServer, key: str, value: Any
    ) -> None:
        payload = Payload(server.url, double, 21)

        def change(envelope: dict[str, Any]) -> dict[str, Any]:
            changed = {**envelope, key: value}
            return {k: v for k, v in changed.items() if v is not None}

        with pytest.raises(Exception, match="malformed payload"):
            execution.run(rebuilt(payload, change))
        assert CALLS == []


# --- progress -------------------------------------------------------------------


def messages(server: FakeCallbackServer, payload: Payload) -> list[str]:
    """Return the texts of the progress and log frames that were taken, in their order."""
    return [f["message"] for f in server.taken(payload) if f["type"] in ("progress", "log")]


class TestProgress:
    """News are collected, stay in order, and never come after the outcome."""

    def test_a_short_task_sends_them_with_its_result(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, report, 40, 0)
        run(payload)
        assert messages(server, payload) == [f"step {n}" for n in range(40)]
        assert server.kinds(payload)[-1] == "task_result"
        assert len(server.events(payload)) <= 3

    def test_a_longer_one_sends_them_now_and_then(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, report, 100, 0.005)
        begun = time.monotonic()
        run(payload)
        took = time.monotonic() - begun
        assert messages(server, payload) == [f"step {n}" for n in range(100)]
        assert server.kinds(payload)[-1] == "task_result"
        news = [request for request in server.events(payload) if not request.final]
        # One asked for leave to start, one told of the start; the others wait for each other.
        assert 2 <= len(news) <= 3 + took / courier.NEWS_EVERY

    def test_a_burst_is_not_cut(self, server: FakeCallbackServer) -> None:
        # Far fewer than may wait; the task is over before the first of them is due.
        payload = Payload(server.url, report, 200, 0)
        run(payload)
        assert messages(server, payload) == [f"step {n}" for n in range(200)]
        assert server.kinds(payload)[-1] == "task_result"

    def test_they_come_while_the_task_runs(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payload = Payload(server.url, report_and_wait)
        running = background.submit(run, payload)
        wait_until(lambda: messages(server, payload) == ["one", "two"], "they are there")
        assert not running.done()
        GATE.set()
        running.result(10)
        assert server.kinds(payload) == ["task_started", "log", "progress", "task_result"]

    @pytest.mark.usefixtures("fresh")
    def test_a_task_that_takes_a_moment_is_reported_as_started(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payload = Payload(server.url, wait_for_gate)
        running = background.submit(run, payload)
        wait_until(lambda: server.kinds(payload) == ["task_started"], "the start is told")
        GATE.set()
        running.result(10)
        assert server.kinds(payload) == ["task_started", "task_result"]

    def test_news_that_are_refused_harm_nothing(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, report, 60, 0.005)
        server.script["events"].extend([Answer(), RESET, Answer(500), Answer(400)])
        run(payload)
        assert outcome(server, payload)["result"] == 60
        seen = [int(text.removeprefix("step ")) for text in messages(server, payload)]
        assert seen
        assert seen == sorted(seen)

    def test_what_comes_after_the_end_is_dropped(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, keep_context)
        run(payload)
        CALLS[0].log("too late")
        assert messages(server, payload) == []
        assert len(server.outcomes(payload)) == 1


def keep_context() -> None:
    CALLS.append(current())


# --- the open beat ----------------------------------------------------------------


class TestBeat:
    """A task that takes longer than a second keeps one request open."""

    def test_after_a_second(self, server: FakeCallbackServer, background: ThreadPoolExecutor) -> None:
        payload = Payload(server.url, wait_for_gate)
        running = background.submit(run, payload)
        begun = wait_until(lambda: CALLS and time.monotonic(), "it runs")
        beat = server.beat(payload)
        assert beat.request.at - begun > courier.BEAT_AFTER * 0.8
        assert beat.line(payload)[0] == "run"
        assert beat.hold == beats.HOLD
        assert not running.done()
        GATE.set()
        assert running.result(10) is True
        beat.release()

    def test_not_for_a_short_one(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, report, 30, 0.005)
        run(payload)
        assert server.beats == []

    @pytest.mark.usefixtures("soon")
    def test_one_after_the_other(self, server: FakeCallbackServer, background: ThreadPoolExecutor) -> None:
        # Held for a third of the silence that the submitter allows.
        payload = Payload(server.url, wait_for_gate, heartbeat=0.6)
        running = background.submit(run, payload)
        beats = [server.beat(payload, number) for number in (1, 2, 3)]
        assert {beat.hold for beat in beats} == {0.2}
        assert [beat.line(payload)[4] for beat in beats] == ["1", "2", "3"], "so none can be replayed"
        assert len({beat.line(payload)[2] for beat in beats}) == 1
        assert len({beat.request.peer for beat in beats}) == 1, "on one connection"
        GATE.set()
        assert running.result(10) is True

    @pytest.mark.usefixtures("soon")
    def test_cancel_reaches_a_function(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payload = Payload(server.url, wait_for_cancel)
        running = background.submit(run, payload)
        server.beat(payload).cancel(payload)
        # It chose to return; what comes of that is the submitter's to judge.
        assert running.result(10) is True
        assert CALLS == ["begun", "cancelled"]
        assert outcome(server, payload)["result"] == "ended by itself"

    @pytest.mark.usefixtures("soon")
    def test_cancel_reaches_a_coroutine(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payload = Payload(server.url, wait_for_cancel_async)
        running = background.submit(run, payload)
        server.beat(payload).cancel(payload)
        assert running.result(10) is False, "neither a success nor a failure"
        assert CALLS == ["begun", "cancelled"]
        assert outcome(server, payload)["type"] == "task_cancelled"

    @pytest.mark.usefixtures("soon")
    def test_cancel_has_to_be_signed(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payload, other = Payload(server.url, wait_for_cancel), Payload(server.url, wait_for_cancel)
        running = background.submit(run, payload)
        server.beat(payload).cancel(payload, key=other.key)
        second = server.beat(payload, 2)
        second.release(Answer(200, body=b"cancel\ncancel x y z\n\xff"))
        third = server.beat(payload, 3)
        assert CALLS == ["begun"]
        third.cancel(payload)
        running.result(10)
        assert CALLS == ["begun", "cancelled"]

    @pytest.mark.usefixtures("soon")
    def test_who_was_told_says_so(self, server: FakeCallbackServer, background: ThreadPoolExecutor) -> None:
        # Otherwise the server would answer each beat of a task that takes its time to stop at once.
        payload = Payload(server.url, wait_for_gate)
        running = background.submit(run, payload)
        server.beat(payload).cancel(payload)
        second = server.beat(payload, 2)
        assert second.line(payload)[0] == "stopping"
        GATE.set()
        running.result(10)

    @pytest.mark.usefixtures("soon")
    def test_a_beat_that_is_lost_is_followed_by_another(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        server.script["beats"].extend([RESET, Answer(500), RESET])
        payload = Payload(server.url, wait_for_cancel)
        running = background.submit(run, payload)
        server.beat(payload).cancel(payload)
        assert running.result(10) is True
        assert CALLS == ["begun", "cancelled"]

    @pytest.mark.usefixtures("soon")
    def test_none_for_a_run_that_the_server_does_not_know(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        server.script["beats"].append(Answer(410))
        payload, other = Payload(server.url, wait_for_gate), Payload(server.url, wait_for_gate, heartbeat=0.3)
        running = background.submit(run, payload)
        wait_until(lambda: [r for r in server.requests if r.kind == "beats"], "it has beaten once")
        background.submit(run, other)
        assert not server.beat(other, 3).names(payload)
        assert not any(beat.names(payload) for beat in server.beats)
        GATE.set()
        # It runs on all the same: that answer may have been a mistake.
        assert running.result(10) is True

    @pytest.mark.usefixtures("soon")
    def test_many_tasks_share_a_thread(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        payloads = [Payload(server.url, wait_for_cancel) for _ in range(3)]
        running = [background.submit(run, payload) for payload in payloads]
        beats = [server.beat(payload) for payload in payloads]
        couriers = [t for t in threading.enumerate() if t.name == "wove-courier" and t.is_alive()]
        mine = courier.courier_for(server.url)._thread
        assert mine in couriers
        beats[1].cancel(payloads[1])
        assert running[1].result(10) is True
        assert not running[0].done()
        assert not running[2].done()
        for payload in (payloads[0], payloads[2]):
            held = wait_until(
                lambda payload=payload: [
                    beat for beat in server.beats if beat.names(payload) and not beat.answered.is_set()
                ],
                "a beat is held for it",
            )
            held[-1].cancel(payload)
        for each in running:
            assert each.result(10) is True

    @pytest.mark.usefixtures("soon")
    def test_the_thread_ends_when_there_is_nothing_to_do(
        self, server: FakeCallbackServer, background: ThreadPoolExecutor
    ) -> None:
        for _ in range(2):  # and another begins when there is
            payload = Payload(server.url, wait_for_cancel, heartbeat=0.3)
            running = background.submit(run, payload)
            server.beat(payload).cancel(payload)
            running.result(10)
            mine = courier.courier_for(server.url)
            wait_until(lambda mine=mine: mine._thread is None, "the thread has ended")


# --- in a running loop --------------------------------------------------------------


class TestInALoop:
    """``arun``, for workers that are asynchronous themselves."""

    async def test_a_coroutine_runs_on_the_callers_loop(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, loop_and_thread_async)
        assert await arun(payload.blob) is True
        here = (threading.get_ident(), id(asyncio.get_running_loop()))
        assert outcome(server, payload)["result"] == here

    async def test_a_function_leaves_the_loop_free(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, wait_for_gate)
        running = asyncio.create_task(arun(payload.blob))
        await until(lambda: CALLS, "it runs")
        GATE.set()
        assert await running is True
        other = Payload(server.url, loop_and_thread)
        await arun(other.blob)
        assert outcome(server, other)["result"][0] != threading.get_ident()

    async def test_it_reports_off_the_loop(self, server: FakeCallbackServer) -> None:
        # The server answers only when the loop has turned: a request on the loop would never end.
        turned = threading.Event()
        server.script["events"].extend([Answer(after=turned), Answer(after=turned)])
        payload = Payload(server.url, double_async, 2)
        running = asyncio.create_task(arun(payload.blob))
        asyncio.get_running_loop().call_later(0.05, turned.set)
        assert await asyncio.wait_for(running, 10) is True
        assert outcome(server, payload)["result"] == 4

    async def test_the_context_is_the_tasks_own(self, server: FakeCallbackServer) -> None:
        payloads = [Payload(server.url, who) for _ in range(5)]
        await asyncio.gather(*(arun(payload.blob) for payload in payloads))
        assert [outcome(server, p)["result"][0] for p in payloads] == [p.run_id for p in payloads]
        assert current().run_id == ""

    async def test_an_exception_is_reported_and_raised(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, fail, "nothing there")
        with pytest.raises(LookupError, match="nothing there"):
            await arun(payload.blob)
        assert outcome(server, payload)["error"]["message"] == "nothing there"

    @pytest.mark.usefixtures("soon")
    async def test_cancel_reaches_a_coroutine(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, wait_for_cancel_async)
        running = asyncio.create_task(arun(payload.blob))
        (await asyncio.to_thread(server.beat, payload)).cancel(payload)
        assert await running is False
        assert CALLS == ["begun", "cancelled"]
        assert outcome(server, payload)["type"] == "task_cancelled"

    async def test_a_worker_that_stops_can_cancel_it(self, server: FakeCallbackServer) -> None:
        payload = Payload(server.url, wait_for_cancel_async)
        running = asyncio.create_task(arun(payload.blob))
        await until(lambda: CALLS, "it runs")
        running.cancel()
        # Who cancels a task waits for a CancelledError; asyncio.timeout() and TaskGroup do.
        with pytest.raises(asyncio.CancelledError):
            await running
        assert CALLS == ["begun", "cancelled"]
        assert len(server.outcomes(payload)) == 1, "the submitter does not wait in vain"

    async def test_run_inside_a_loop(self, server: FakeCallbackServer) -> None:
        # A synchronous worker function that was called from a coroutine, in Jupyter for one.
        payload = Payload(server.url, double_async, 2)
        assert run(payload) is True
        assert outcome(server, payload)["result"] == 4


# --- forks ----------------------------------------------------------------------

# It takes its payloads from the environment: the first runs before the fork, the second in a thread while
# the fork happens, the third in the child, the fourth in the parent afterwards.
FORKING = """
import base64, json, os, signal, sys, threading
from pathlib import Path
from wove.worker import courier, run

signal.alarm(40)
courier.REPORT_AFTER, courier.BEAT_AFTER = 0.02, 0.04
first, during, child, last = (base64.b64decode(text) for text in json.loads(os.environ["PAYLOADS"]))
assert run(first)
thread = threading.Thread(target=run, args=(during,))
thread.start()
assert sys.stdin.readline() == "fork\\n"
pid = os.fork()
if pid == 0:
    code = 1
    try:
        signal.alarm(40)
        assert run(child)
        code = 0
    finally:
        os._exit(code)
print("child:", os.waitpid(pid, 0)[1], flush=True)
assert run(last)
thread.join()
print("done", flush=True)
"""


def test_a_forked_child_has_its_own_connection_and_courier(
    server: FakeCallbackServer, tmp_path: Path
) -> None:
    def until_cancelled(name: str) -> Payload:
        return Payload(
            server.url,
            tasks.until_cancelled,
            str(tmp_path / f"{name}-started"),
            str(tmp_path / f"{name}-seen"),
        )

    first, last = Payload(server.url, tasks.double, 1), Payload(server.url, tasks.double, 2)
    during, child = until_cancelled("during"), until_cancelled("child")
    texts = [as_text(payload.blob) for payload in (first, during, child, last)]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING],
        env=child_environment(PAYLOADS=json.dumps(texts)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        held = server.beat(during)
        process.stdin.write("fork\n")
        process.stdin.flush()
        # Over a beat of its own: the parent's thread, which holds one, did not cross the fork.
        childs = server.beat(child)
        assert not childs.names(during)
        childs.cancel(child)
        wait_until(lambda: server.outcomes(last), "the parent goes on")
        assert not held.answered.is_set()
        held.cancel(during)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert output.splitlines() == ["child: 0", "done"], errors
    for payload in (first, during, child, last):
        assert len(server.outcomes(payload)) == 1
    peers = {
        name: {request.peer for request in server.events(payload)}
        for name, payload in (("first", first), ("child", child), ("last", last))
    }
    assert peers["child"].isdisjoint(peers["first"])
    assert peers["last"] == peers["first"], "the child's end did not close the parent's"
    pids = [server.taken(payload)[-1]["worker"]["pid"] for payload in (first, child, last)]
    assert pids[0] == pids[2] == process.pid != pids[1]
