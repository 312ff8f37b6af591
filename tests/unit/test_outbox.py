"""Runs that travel together, as the outbox keeps account of them; no thread sends anything here."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.clock import Clock

from wove import frames
from wove.errors import SubmitError
from wove.executors import sending
from wove.executors.batching import Batching
from wove.executors.outbox import MAX_TOGETHER, Outbox
from wove.executors.packing import Parcel, Terms, Waiting
from wove.executors.sending import AT_ONCE, HandOver
from wove.keyring import SecretRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

A, B = "a" * 32, "b" * 32
BATCH = "c" * 32


@dataclass
class Known:
    """What the listener knows of a batch."""

    task_id: str
    started: bool = False
    attempt: int = 1
    job: str = BATCH
    doubtful: bool = False
    opened_at: float = 0.0


@dataclass
class Listener:
    """Knows what the test opened."""

    runs: dict[str, Known] = field(default_factory=dict)
    batches: dict[str, str] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    withdrawn: int = 0

    def find(self, run_id: str) -> Any:
        return self.runs.get(run_id)

    def batch_of(self, run_id: str) -> Any:
        return self.batches.get(run_id)

    def close_run(self, run_id: str) -> None:
        self.closed.append(run_id)

    def open_new(self, **settings: Any) -> None:
        self.runs[settings["run_id"]] = Known(settings["task_id"])

    def open_batch(self, **settings: Any) -> None:
        self.open_new(**settings)
        self.batches.update(dict.fromkeys(settings["run_ids"], settings["run_id"]))


@dataclass
class Channel:
    """Keeps what it is told."""

    told: list[frames.Frame] = field(default_factory=list)

    def put(self, batch: Iterable[frames.Frame]) -> bool:
        self.told.extend(batch)
        return True


class Watcher:
    def opened(self, run: Any) -> None:
        """A run was handed over."""

    def suspect(self, run: Any) -> None:
        """A process that ran it is gone."""


def task() -> None:
    """Is called by nobody."""


def frame_of(run_id: str, *, again: bool = False) -> frames.Frame:
    delivery = {"attempt": 1, "again": again, "mapped": True}
    return {
        "type": frames.RUN_TASK,
        "run_id": run_id,
        "task_id": "task",
        "callable": task,
        "args": {},
        "delivery": delivery,
    }


def make(listener: Listener, channel: Channel, adapter: Any = None) -> Outbox:
    ring = SecretRing.parse("s" * 32, "a test")
    terms = Terms("reports", ring, "http://127.0.0.1:1", 1 << 20, None, plain=False, webhook=False)
    nobody: Any = adapter
    opened_at: Any = listener
    sink: Any = channel
    watcher: Any = Watcher()
    return Outbox(terms, nobody, nobody, opened_at, sink, watcher, Batching(None))


def travelling(outbox: Outbox, listener: Listener, *, again: bool = False) -> tuple[Parcel, list[Any]]:
    """Let two runs be on their way in one batch; return the parcel, and what their callers hear."""
    heard: list[Any] = []
    members = [Waiting(frame_of(run_id, again=again), heard.append) for run_id in (A, B)]
    listener.runs[BATCH] = Known("task")
    for member in members:
        member.drawn = True
        run_id = member.frame["run_id"]
        outbox.set(run_id, None)
        outbox._on_the_way[run_id] = member
        listener.runs[run_id] = Known("task")
        listener.batches[run_id] = BATCH
    parcel = Parcel(members, {**members[0].frame, "run_id": BATCH}, together=True)
    outbox._members.register(parcel)
    return parcel, heard


class Backend:
    """Keeps what it is handed."""

    submits_blocking = True

    def __init__(self) -> None:
        self.taken: list[frames.Frame] = []

    def submit_blocking(self, batch: Sequence[tuple[bytes, frames.Frame]]) -> list[Any]:
        self.taken.extend(frame for _, frame in batch)
        return [frame["run_id"] for _, frame in batch]


class Meanwhile:
    """Does something the first time that it is encoded, as whoever calls from another thread might."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.acts = [act]

    def __reduce__(self) -> tuple[Any, ...]:
        while self.acts:
            self.acts.pop()()
        return (int, ())


def on_the_way(outbox: Outbox, run_id: str, **args: Any) -> Waiting:
    waiting = Waiting({**frame_of(run_id), "args": args}, lambda refusal: None)
    waiting.drawn = True
    outbox._on_the_way[run_id] = waiting
    return waiting


async def test_a_run_that_is_cancelled_while_it_is_encoded_is_not_handed_over() -> None:
    listener, backend = Listener(), Backend()
    outbox = make(listener, Channel(), backend)
    first = on_the_way(outbox, A, value=Meanwhile(lambda: outbox.recall(A)))
    second = on_the_way(outbox, B)
    late: list[tuple[str, Any]] = []
    outbox.on_late_cancel = lambda frame, result: late.append((frame["run_id"], str(result)))
    for parcel in outbox._sender._send(HandOver([first, second], [])):
        outbox._settle(parcel)
    assert [frame["run_id"] for frame in backend.taken] == [B]
    assert late == [(A, "cancelled before it was submitted")]
    assert listener.closed == [A]
    outbox.stop()


async def test_who_is_cancelled_while_a_batch_is_encoded_does_not_leave_with_it() -> None:
    listener, backend = Listener(), Backend()
    outbox = make(listener, Channel(), backend)
    members = [on_the_way(outbox, A), on_the_way(outbox, B, value=Meanwhile(lambda: outbox.recall(A)))]
    parcels = outbox._sender._send(HandOver([], [members]))
    assert [frame["runs"] for frame in backend.taken] == [1]
    assert {waiting.frame["run_id"]: str(p.result) for p in parcels for waiting in p.members} == {
        A: "cancelled before it was submitted",
        B: backend.taken[0]["run_id"],
    }
    assert listener.batches == {B: backend.taken[0]["run_id"]}
    outbox.stop()


async def test_messages_of_other_callables_that_wait_for_a_worker_hold_up_nobody() -> None:
    listener = Listener({str(n): Known("busy") for n in range(20)} | {BATCH: Known("task")})
    outbox = make(listener, Channel())
    for task_id, batch in [("task", BATCH), *(("busy", str(n)) for n in range(20))]:
        frame = {**frame_of(A), "run_id": batch, "task_id": task_id}
        outbox._members.register(Parcel([Waiting(frame_of(batch), print)], frame, together=True))
    assert outbox._count_unstarted("task") == 1
    outbox.stop()


async def test_the_message_of_a_batch_is_not_what_its_runs_are_known_by() -> None:
    listener = Listener()
    outbox = make(listener, Channel())
    parcel, heard = travelling(outbox, listener)
    late: list[tuple[str, Any]] = []
    outbox.on_late_cancel = lambda frame, result: late.append((frame["run_id"], result))
    outbox.recall(A)
    parcel.result = BATCH
    outbox._settle(parcel)
    assert late == [(A, None)]
    assert heard == [None]
    assert outbox.take(B) is None
    outbox.stop()


async def test_a_run_that_is_cancelled_while_it_is_given_back_is_not_submitted_again() -> None:
    listener, channel = Listener(), Channel()
    outbox = make(listener, channel)
    parcel, _ = travelling(outbox, listener)
    parcel.result = BATCH
    outbox._settle(parcel)
    outbox.take(A)
    outbox.take_back(A, "task")
    assert [frame["type"] for frame in channel.told] == [frames.TASK_CANCELLED]
    assert A not in outbox._on_the_way
    outbox.stop()


async def test_runs_of_a_batch_that_may_have_been_accepted_are_made_anew() -> None:
    listener = Listener()
    outbox = make(listener, Channel())
    parcel, heard = travelling(outbox, listener, again=True)
    parcel.result = SubmitError("no answer", maybe_accepted=True, submission=BATCH)
    outbox._settle(parcel)
    assert [refusal.maybe_accepted for refusal in heard] == [False, False]
    assert not any(known.doubtful for known in listener.runs.values())
    assert listener.closed == []
    assert not outbox._members
    assert not outbox._members.is_wanted(BATCH)
    assert outbox._members.batches_of("task") == ()
    outbox.stop()


def many(count: int) -> list[frames.Frame]:
    return [{**frame_of(f"{number:032x}"), "delivery": {"attempt": 1}} for number in range(count)]


async def test_workers_need_not_wait_for_the_last_of_many_arguments_to_be_encoded() -> None:
    backend = Backend()
    outbox = make(Listener(), Channel(), backend)
    taken_before: list[int] = []
    waiting = [on_the_way(outbox, frame["run_id"]) for frame in many(3 * AT_ONCE)]
    last = Meanwhile(lambda: taken_before.append(len(backend.taken)))
    waiting[-1].frame["args"]["value"] = last
    outbox._sender._send(HandOver(waiting, []))
    assert taken_before == [2 * AT_ONCE]
    assert len(backend.taken) == 3 * AT_ONCE
    outbox.stop()


async def test_many_runs_begin_to_leave_before_the_loop_has_its_next_turn() -> None:
    backend = Backend()
    outbox = make(Listener(), Channel(), backend)
    heard: list[Any] = []
    first, *others = many(AT_ONCE + 1)
    for frame in others:
        outbox.post(frame, heard.append)
    began = outbox._last
    assert began is not None
    began.packed.result(10)  # no turn of the loop in between
    assert backend.taken == others
    outbox.post(first, heard.append)
    while len(heard) <= AT_ONCE:
        await asyncio.sleep(0)
    assert heard == [None] * (AT_ONCE + 1)
    assert backend.taken == [*others, first]
    while outbox._flushing is not None and not outbox._flushing.done():
        await asyncio.sleep(0)
    assert outbox._last is None
    outbox.stop()


class Refuses(Backend):
    """A backend that takes some tasks only, and says so at once or later."""

    def __init__(self, clock: Clock, seconds: float, but: str = "") -> None:
        super().__init__()
        self.clock = clock
        self.seconds = seconds
        self.but = but
        self.calls: list[int] = []

    def submit_blocking(self, batch: Sequence[tuple[bytes, frames.Frame]]) -> list[Any]:
        self.calls.append(len(batch))
        self.clock.advance(self.seconds)
        return [self.answer(frame["run_id"]) for _, frame in batch]

    def answer(self, run_id: str) -> Any:
        refusal = SubmitError("no answer", maybe_accepted=True, submission=run_id)
        return run_id if run_id == self.but else refusal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sending.time, "monotonic", clock)
    return clock


async def test_a_backend_that_does_not_answer_is_tried_once_for_all_that_leave_together(clock: Clock) -> None:
    backend = Refuses(clock, seconds=sending.OUTAGE_AFTER + 1)
    outbox = make(Listener(), Channel(), backend)
    waiting = [on_the_way(outbox, frame["run_id"]) for frame in many(3 * AT_ONCE)]
    parcels = outbox._sender._send(HandOver(waiting, []))
    assert backend.calls == [AT_ONCE]
    assert [str(parcel.result) for parcel in parcels] == ["no answer"] * (3 * AT_ONCE)
    assert len({id(parcel.result) for parcel in parcels}) == 3 * AT_ONCE
    # Nobody takes the backend's name for one run to be that of another.
    known_by = {parcel.frame["run_id"]: parcel.result.submission for parcel in parcels}
    assert {run_id for run_id, name in known_by.items() if name not in (run_id, None)} == set()
    outbox.stop()


async def test_one_that_refuses_at_once_may_take_what_comes_after_all_the_same(clock: Clock) -> None:
    waiting = [frame["run_id"] for frame in many(4 * AT_ONCE)]
    backend = Refuses(clock, seconds=0.1, but=waiting[-1])
    outbox = make(Listener(), Channel(), backend)
    parcels = outbox._sender._send(HandOver([on_the_way(outbox, run_id) for run_id in waiting], []))
    assert backend.calls == [AT_ONCE, 3 * AT_ONCE]
    assert [parcel.result for parcel in parcels if not isinstance(parcel.result, SubmitError)] == [
        waiting[-1]
    ]
    outbox.stop()


async def test_where_the_system_has_no_thread_left_everybody_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = Backend()
    outbox = make(Listener(), Channel(), backend)
    heard: list[Any] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for frame in many(AT_ONCE + 5):
            outbox.post(frame, heard.append)
    while len(heard) < AT_ONCE:
        await asyncio.sleep(0)
    assert {str(refusal) for refusal in heard[:AT_ONCE]} == {
        "nothing can be submitted: can't start new thread"
    }
    while len(heard) < AT_ONCE + 5:
        await asyncio.sleep(0)
    # Those that came later leave by a thread that could be started; the others are not run after all.
    assert heard[AT_ONCE:] == [None] * 5
    assert len(backend.taken) == 5
    outbox.stop()


async def test_more_than_are_handed_over_together_leave_one_after_the_other() -> None:
    outbox = make(Listener(), Channel(), Backend())
    outbox._last = HandOver([], [])
    outbox._last.packed = Future()
    heard: list[Any] = []
    posted = many(MAX_TOGETHER + AT_ONCE)
    for frame in posted[:-1]:
        outbox.post(frame, heard.append)
    outbox._last.packed.set_result([])
    outbox.post(posted[-1], heard.append)
    assert [len(under_way.alone) for under_way in outbox._begun] == [MAX_TOGETHER]
    while len(heard) < len(posted):
        await asyncio.sleep(0)
    assert heard == [None] * len(posted)
    outbox.stop()


async def test_runs_that_were_begun_early_are_told_when_the_environment_stops() -> None:
    backend = Backend()
    outbox = make(Listener(), Channel(), backend)
    heard: list[Any] = []
    for frame in many(AT_ONCE):
        outbox.post(frame, heard.append)
    await asyncio.sleep(0)
    outbox.stop()
    while len(heard) < AT_ONCE:
        await asyncio.sleep(0)
    assert {str(refusal) for refusal in heard} <= {"None", "the environment was stopped"}
