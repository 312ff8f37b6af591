"""The watch over open runs: who is suspected, when the backend is asked, and what its word leads to.

Time jumps here: a minute of waiting takes none.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.clock import Clock, jumping

from wove import frames
from wove.adapters.base import BackendState
from wove.errors import ProtocolError, SubmitError
from wove.executors import watch as watch_module
from wove.executors.watch import (
    AGAIN,
    ASK_AFTER,
    FORGET_CANCELLED,
    GRACE,
    MAX_TOGETHER,
    QUIET,
    TICK,
    UNSTARTED,
    Watch,
    worker_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: How a backend says that a run will not report any more.
OVER = ["lost", "gone", "failed", "done"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the watch and of the loop in which it runs."""
    made = Clock()
    monkeypatch.setattr(watch_module, "time", made.as_time())
    return made


@dataclass(eq=False)
class Run:
    """What the callback server would know of a run, set by the test."""

    clock: Clock
    run_id: str = "a" * 32
    attempt: int = 1
    started: bool = False
    suspect_since: float | None = None
    heartbeat: float | None = None
    cancelled: bool = False
    cancelled_at: float = 0.0
    closed: bool = False
    doubtful: bool = False
    asked_at: float = float("-inf")
    obituary: dict[str, Any] | None = None
    worker: dict[str, Any] = field(default_factory=dict)
    #: What went to the environment, and when.
    told: list[tuple[float, frames.Frame]] = field(default_factory=list)
    forsaken: int = 0
    #: How often the watch looked at it.
    looks: int = 0

    def __post_init__(self) -> None:
        self.opened_at = self.contact = self.clock()
        self.job = self.run_id

    @property
    def last_contact(self) -> float:
        self.looks += 1
        return self.contact if self.started else self.opened_at

    @property
    def kinds(self) -> list[str]:
        """The types of the events that went to the environment."""
        return [frame["type"] for _, frame in self.told]

    def heard(self) -> None:
        """Its worker speaks of it, over a connection that stays open."""
        self.started, self.contact, self.suspect_since = True, self.clock(), None

    def lose_connection(self, watch: Watch) -> None:
        """The last connection of its worker ends."""
        self.suspect_since = self.clock()
        watch.suspect(self)

    def renew(self, watch: Watch) -> None:
        """Another attempt is opened."""
        self.attempt += 1
        self.job = f"{self.run_id}-{self.attempt}"
        self.opened_at = self.clock()
        self.started, self.suspect_since = False, None
        watch.opened(self)

    def sink(self, batch: Iterable[frames.Frame]) -> bool:
        for frame in batch:
            self.told.append((self.clock(), frame))
            # As the environment does with a run that has ended.
            self.closed = self.closed or frame["type"] in frames.TERMINAL
        return True

    def event(self, kind: str, **fields: Any) -> frames.Frame:
        return frames.event(kind, self.run_id, "app.task", self.attempt, 2**31, **fields)

    def forsake(self) -> None:
        self.forsaken += 1
        self.started, self.suspect_since = False, None


class Backend:
    """A backend that says what the test has it say, and remembers when it was asked."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        #: What it says of a job: the last word again and again, the others once.
        self.words: dict[str, list[str | BackendState]] = {}
        self.failure: BaseException | None = None
        #: Set to make it think for ever, or until set again.
        self.thinking: asyncio.Event | None = None
        self.asked: list[tuple[float, list[str]]] = []
        self.closed: list[str] = []
        #: Who asks: a loop holds what waits in it weakly.
        self.askers: list[Watch] = []
        self.parked: list[tuple[str, bytes]] = []
        self.parked_failure: Exception | None = None

    def says(self, *words: str | BackendState, of: str = "a" * 32) -> None:
        """Say this, one after the other, then the last for ever."""
        self.words[of] = list(words)

    async def probe(self, jobs: Sequence[str]) -> dict[str, BackendState]:
        self.asked.append((self._clock(), list(jobs)))
        if self.thinking is not None:
            await self.thinking.wait()
        if self.failure is not None:
            raise self.failure
        return {job: self._state(self.words[job]) for job in jobs if job in self.words}

    def _state(self, words: list[str | BackendState]) -> BackendState:
        word = words.pop(0) if len(words) > 1 else words[0]
        return BackendState(word, f"it is {word}") if isinstance(word, str) else word

    async def take_parked(self, run_id: str, blob: bytes) -> None:
        self.parked.append((run_id, blob))
        if self.parked_failure is not None:
            raise self.parked_failure

    def times(self, job: str = "a" * 32) -> list[float]:
        """When it was asked about a job, in seconds after the beginning of the test."""
        return [round(when - 1000, 6) for when, jobs in self.asked if job in jobs]


@pytest.fixture
def backend(clock: Clock) -> Backend:
    """Whom the watch asks."""
    return Backend(clock)


@pytest.fixture
def run(clock: Clock) -> Run:
    """The run that is watched."""
    return Run(clock)


def watching(backend: Backend, *runs: Run) -> Watch:
    """Begin to watch runs, in the running loop and until it ends."""
    watch = Watch("reports", backend.closed.append, backend.probe, backend.take_parked)
    backend.askers.append(watch)
    for run in runs:
        watch.opened(run)
    return watch


async def suspected(backend: Backend, run: Run) -> Watch:
    """Watch a run whose worker has spoken, and has just lost its connection."""
    watch = watching(backend, run)
    run.heard()
    run.lose_connection(watch)
    return watch


async def pass_time(seconds: float) -> None:
    """Let seconds go by for everybody."""
    await asyncio.sleep(seconds)


class TestSuspicion:
    """A lost connection makes a run suspect; the backend's word, after a moment, decides."""

    @jumping
    async def test_what_is_gone_is_asked_for_twice(self, backend: Backend, run: Run) -> None:
        # Whoever saw it end may be about to say so, in better words.
        backend.says("gone")
        await suspected(backend, run)
        await pass_time(600)
        ((when, frame),) = run.told
        assert (frame["type"], frame["error"]["message"]) == (frames.TASK_ERROR, "it is gone")
        assert when - 1000 == pytest.approx(GRACE + AGAIN[0])
        assert len(backend.times()) == 2

    @pytest.mark.parametrize("word", sorted({*OVER} - {"gone"}))
    @jumping
    async def test_it_ends_once_when_the_backend_says_that_it_is_over(
        self, backend: Backend, run: Run, word: str
    ) -> None:
        backend.says(word)
        await suspected(backend, run)
        await pass_time(600)
        ((when, frame),) = run.told
        assert (frame["type"], frame["attempt"]) == (frames.TASK_ERROR, 1)
        assert frame["error"] == {
            "kind": "WorkerLostError",
            "message": f"it is {word}",
            "traceback": "",
            "retryable": True,
            "source": "backend",
        }
        assert when - 1000 == pytest.approx(GRACE)
        assert backend.times() == [pytest.approx(ASK_AFTER)]
        assert run.forsaken == 1

    @jumping
    async def test_a_backend_that_gives_no_reason_is_quoted_all_the_same(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says(BackendState("gone"))
        await suspected(backend, run)
        await pass_time(10)
        assert run.told[0][1]["error"]["message"] == "gone"

    @pytest.mark.parametrize("moment", [0.1, ASK_AFTER + 0.1, GRACE - 0.05])
    @jumping
    async def test_a_worker_that_comes_back_within_the_grace_is_cleared(
        self, backend: Backend, run: Run, moment: float
    ) -> None:
        backend.says("lost", "running")
        await suspected(backend, run)
        await pass_time(moment)
        run.heard()
        for _ in range(100):
            await pass_time(5)
            run.heard()
        assert (run.told, run.forsaken) == ([], 0)
        assert len(backend.asked) == (moment > ASK_AFTER)

    @jumping
    async def test_one_that_runs_is_alive_although_it_cannot_reach_us(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("running")
        await suspected(backend, run)
        await pass_time(60)
        assert set(run.kinds) == {frames.HEARTBEAT}
        times = [when for when, _ in run.told]
        # Often enough for any reasonable delivery_heartbeat_seconds.
        assert max(later - earlier for earlier, later in pairwise(times)) < 7
        run.heard()
        told = len(run.told)
        for _ in range(10):
            await pass_time(5)
            run.heard()
        assert len(run.told) == told

    @jumping
    async def test_one_that_dies_later_is_found_out_later(self, backend: Backend, run: Run) -> None:
        backend.says("running", "running", "lost")
        await suspected(backend, run)
        await pass_time(60)
        assert run.kinds == [frames.HEARTBEAT, frames.HEARTBEAT, frames.TASK_ERROR]

    @jumping
    async def test_one_that_is_queued_again_is_retried_by_the_backend(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("queued")
        watch = await suspected(backend, run)
        await pass_time(600)
        ((_, frame),) = run.told
        assert frames.check_event(frame)
        assert frame["type"] == frames.TASK_RETRY
        assert (frame["error"]["kind"], frame["error"]["source"]) == ("Requeued", "backend")
        assert frame["error"]["message"] == "the backend runs it again: it is queued"
        assert run.forsaken == 1
        # Its next execution is watched like the first one.
        backend.says("lost")
        run.heard()
        run.lose_connection(watch)
        await pass_time(60)
        assert run.kinds == [frames.TASK_RETRY, frames.TASK_ERROR]

    @pytest.mark.parametrize("word", ["unknown", "", "no word at all"])
    @jumping
    async def test_no_knowledge_ends_nothing_and_is_asked_for_again(
        self, backend: Backend, run: Run, word: str
    ) -> None:
        if word != "no word at all":
            backend.says(word)
        await suspected(backend, run)
        await pass_time(30)
        assert (run.told, run.forsaken) == ([], 0)
        first, *later = [when - GRACE for when in backend.times()[1:]]
        assert first == pytest.approx(AGAIN[0])
        pauses = [after - before for before, after in pairwise([first, *later])]
        assert pauses[0] == pytest.approx(AGAIN[1], abs=0.1)
        assert pauses[1:] == pytest.approx([AGAIN[2]] * len(pauses[1:]), abs=0.1)

    @jumping
    async def test_many_suspects_are_asked_about_together(self, clock: Clock, backend: Backend) -> None:
        runs = [Run(clock, run_id=f"{number:032x}") for number in range(2 * MAX_TOGETHER + 10)]
        watch = watching(backend)
        for run in runs:
            backend.says("lost", of=run.run_id)
            run.heard()
            run.lose_connection(watch)
        await pass_time(60)
        assert [run.kinds for run in runs] == [[frames.TASK_ERROR]] * len(runs)
        assert sorted(len(jobs) for _, jobs in backend.asked) == [10, MAX_TOGETHER, MAX_TOGETHER]

    @jumping
    async def test_another_attempt_has_nothing_to_do_with_the_word_on_the_last(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        backend.says("running", of=f"{run.run_id}-2")
        watch = await suspected(backend, run)
        await pass_time(ASK_AFTER + 0.1)
        run.renew(watch)
        run.heard()
        await pass_time(5)
        run.heard()
        assert run.told == []
        run.lose_connection(watch)
        await pass_time(GRACE + 0.5)
        assert backend.asked[-1][1] == [f"{run.run_id}-2"]
        assert run.kinds == [frames.HEARTBEAT]

    @jumping
    async def test_nor_when_it_is_suspect_itself(self, backend: Backend, run: Run) -> None:
        backend.says("lost")
        backend.says("running", of=f"{run.run_id}-2")
        watch = await suspected(backend, run)
        await pass_time(ASK_AFTER + 0.1)
        run.renew(watch)
        run.heard()
        await pass_time(GRACE - ASK_AFTER - 0.2)
        run.lose_connection(watch)  # a moment before the first word counts
        await pass_time(0.2)
        assert run.told == []
        await pass_time(GRACE + 0.5)
        assert run.kinds == [frames.HEARTBEAT]


class TestSilence:
    """A connection that is open speaks for its worker; silence alone is no proof."""

    @pytest.mark.parametrize("word", OVER)
    @jumping
    async def test_a_quiet_run_is_given_up_on_the_second_word_in_a_row(
        self, backend: Backend, run: Run, word: str
    ) -> None:
        backend.says(word)
        run.heard()
        watching(backend, run)
        await pass_time(QUIET + TICK)
        assert (len(backend.asked), run.told) == (1, [])
        await pass_time(AGAIN[0] + TICK)
        assert (len(backend.asked), run.kinds) == (2, [frames.TASK_ERROR])
        assert run.told[0][1]["error"]["message"] == f"it is {word}"
        await pass_time(600)
        assert len(run.told) == 1

    @pytest.mark.parametrize("between", ["running", "queued", "unknown"])
    @jumping
    async def test_two_words_with_another_between_them_are_one_each(
        self, backend: Backend, run: Run, between: str
    ) -> None:
        backend.says("lost", between, "lost", between)
        run.heard()
        watching(backend, run)
        await pass_time(60)
        assert len(backend.asked) > 4
        assert run.told == []

    @jumping
    async def test_a_sign_of_life_while_the_backend_thinks_makes_its_word_void(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        run.heard()
        watching(backend, run)
        for _ in range(10):
            backend.thinking = asyncio.Event()
            await pass_time(QUIET + TICK)
            run.heard()
            backend.thinking.set()
            await pass_time(0.1)
        assert len(backend.asked) == 10
        assert run.told == []

    @jumping
    async def test_a_run_that_speaks_is_never_asked_about(self, backend: Backend, run: Run) -> None:
        watching(backend, run)
        for _ in range(100):
            run.heard()
            await pass_time(QUIET - 0.5)
        assert backend.asked == []

    @pytest.mark.parametrize(
        ("heartbeat", "first"), [(None, QUIET), (60.0, QUIET), (15.0, QUIET), (5.0, 3.0), (1.0, 0.6)]
    )
    @jumping
    async def test_the_backend_is_asked_before_the_silence_is_too_long(
        self, clock: Clock, backend: Backend, heartbeat: float | None, first: float
    ) -> None:
        run = Run(clock, heartbeat=heartbeat)
        run.heard()
        watching(backend, run)
        # It is looked at first when one that never starts would be.
        await pass_time(UNSTARTED[0] + QUIET + TICK)
        assert backend.times()[0] == pytest.approx(max(first, UNSTARTED[0]))


class TestRunsThatDoNotStart:
    """A queue may be long: the backend is asked, later and later."""

    @jumping
    async def test_it_is_asked_about_later_and_later(self, backend: Backend, run: Run) -> None:
        backend.says("queued")
        watching(backend, run)
        await pass_time(130)
        assert backend.times() == pytest.approx([5, 15, 35, 65, 95, 125], abs=0.1)
        assert run.told == []

    @pytest.mark.parametrize("word", OVER)
    @jumping
    async def test_it_is_given_up_on_the_second_word_in_a_row(
        self, backend: Backend, run: Run, word: str
    ) -> None:
        backend.says("queued", word)
        watching(backend, run)
        await pass_time(15.5)
        assert (len(backend.asked), run.told) == (2, [])
        await pass_time(2)
        assert (len(backend.asked), run.kinds) == (3, [frames.TASK_ERROR])

    @jumping
    async def test_one_that_starts_is_a_started_one_from_then_on(self, backend: Backend, run: Run) -> None:
        watching(backend, run)
        await pass_time(6)
        run.heard()
        await pass_time(QUIET + 10)
        assert backend.times()[:2] == pytest.approx([5, 15], abs=0.1)  # it was to be asked about at 15
        assert backend.times()[2] == pytest.approx(16, abs=2.1)

    @jumping
    async def test_a_new_attempt_is_new(self, backend: Backend, run: Run) -> None:
        watch = watching(backend, run)
        await pass_time(70)
        assert len(backend.asked) == 4
        run.renew(watch)
        await pass_time(20)
        assert backend.times(f"{run.run_id}-2") == pytest.approx([75, 85], abs=0.1)

    @jumping
    async def test_what_the_backend_may_never_have_had_is_not_asked_about(
        self, clock: Clock, backend: Backend, run: Run
    ) -> None:
        backend.says("gone", "queued")
        run.doubtful = True
        watch = watching(backend, run)
        await pass_time(60)
        assert (backend.asked, run.told) == ([], [])
        run.doubtful = False
        run.opened_at = clock()
        watch.opened(run)
        await pass_time(UNSTARTED[0] + TICK)
        assert len(backend.asked) == 1

    @jumping
    async def test_once_a_worker_has_spoken_there_is_no_doubt(self, backend: Backend, run: Run) -> None:
        backend.says("lost")
        run.doubtful = True
        await suspected(backend, run)
        await pass_time(10)
        assert run.kinds == [frames.TASK_ERROR]


class TestBackendsThatDoNotAnswer:
    """Whatever the backend does, it ends no run and the watching goes on."""

    @pytest.mark.parametrize(
        "failure",
        [SubmitError("probe() took longer"), OSError("no broker"), TimeoutError(), NotImplementedError()],
        ids=repr,
    )
    @jumping
    async def test_a_probe_that_fails_is_tried_again(
        self, backend: Backend, run: Run, failure: Exception
    ) -> None:
        backend.says("lost")
        backend.failure = failure
        await suspected(backend, run)
        await pass_time(60)
        assert len(backend.asked) > 5
        assert (run.told, run.forsaken) == ([], 0)
        backend.failure = None
        await pass_time(AGAIN[-1] + GRACE)
        assert run.kinds == [frames.TASK_ERROR]

    @jumping
    async def test_a_probe_that_hangs_holds_up_nobody_else(
        self, clock: Clock, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        backend.thinking = thinking = asyncio.Event()
        watch = await suspected(backend, run)
        await pass_time(60)
        assert len(backend.asked) == 1  # it is not asked twice at a time
        backend.thinking = None
        other = Run(clock, run_id="b" * 32)
        backend.says("lost", of=other.run_id)
        watch.opened(other)
        other.heard()
        other.lose_connection(watch)
        await pass_time(GRACE + TICK)
        assert (run.told, other.kinds) == ([], [frames.TASK_ERROR])
        thinking.set()
        await pass_time(TICK)
        assert run.kinds == [frames.TASK_ERROR]

    @jumping
    async def test_an_answer_that_comes_after_the_worker_does_is_void(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        backend.thinking = asyncio.Event()
        await suspected(backend, run)
        await pass_time(4)
        run.heard()
        backend.thinking.set()
        await pass_time(1)
        assert run.told == []

    @jumping
    async def test_an_answer_about_others_is_none(self, backend: Backend, run: Run) -> None:
        asked = []

        async def confused(jobs: Sequence[str]) -> dict[str, BackendState]:
            asked.extend(jobs)
            return {"b" * 32: BackendState("lost"), "": BackendState("gone")}

        watch = Watch("reports", backend.closed.append, confused, backend.take_parked)
        run.heard()
        run.lose_connection(watch)
        await pass_time(60)
        assert set(asked) == {run.run_id}
        assert run.told == []

    @jumping
    async def test_a_run_that_cannot_be_told_harms_no_other(self, clock: Clock, backend: Backend) -> None:
        runs = [Run(clock, run_id=f"{number:032x}") for number in range(3)]
        watch = watching(backend)

        def broken(batch: Iterable[frames.Frame]) -> bool:
            raise RuntimeError("nobody listens")

        runs[1].sink = broken
        for run in runs:
            backend.says("lost", of=run.run_id)
            run.heard()
            run.lose_connection(watch)
        await pass_time(GRACE + TICK)
        assert [run.kinds for run in runs] == [[frames.TASK_ERROR], [], [frames.TASK_ERROR]]


class TestParkedOutcomes:
    """An outcome that nobody took waits with the backend."""

    @pytest.mark.parametrize("state", ["done", "failed", "unknown", "running"])
    @jumping
    async def test_it_is_taken_and_no_loss(self, backend: Backend, run: Run, state: str) -> None:
        backend.says(BackendState(state, outcome=b"signed"))
        await suspected(backend, run)
        await pass_time(GRACE + TICK)
        assert backend.parked == [(run.run_id, b"signed")]
        assert run.told == []

    @jumping
    async def test_also_that_of_a_run_that_never_spoke(self, backend: Backend, run: Run) -> None:
        backend.says("queued", BackendState("done", outcome=b"signed"))
        watching(backend, run)
        await pass_time(16)
        assert backend.parked == [(run.run_id, b"signed")]
        run.closed = True  # as its outcome has been taken
        await pass_time(300)
        assert (len(backend.parked), len(backend.asked)) == (1, 2)

    @jumping
    async def test_runs_of_a_batch_of_which_it_does_not_speak_are_lost(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says(BackendState("done", outcome=b"of the others"))
        watching(backend, run)
        await pass_time(120)
        assert len(backend.parked) == 1
        assert run.kinds == [frames.TASK_ERROR]

    @jumping
    async def test_also_when_the_backend_itself_has_said_that_it_failed(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says(BackendState("failed", outcome=b"of the others"))
        watch = watching(backend)
        run.obituary = {"kind": "WorkerLost", "message": "failed", "source": "backend"}
        watch.suspect(run)
        await pass_time(5)
        assert len(backend.parked) == 1
        assert run.kinds == [frames.TASK_ERROR]

    @pytest.mark.parametrize(("state", "kinds"), [("unknown", []), ("done", [frames.TASK_ERROR])])
    @jumping
    async def test_one_that_cannot_be_taken_counts_for_nothing(
        self, backend: Backend, run: Run, state: str, kinds: list[str]
    ) -> None:
        backend.says(BackendState(state, outcome=b"of somebody else"))
        backend.parked_failure = ProtocolError("not signed with its key")
        await suspected(backend, run)
        await pass_time(60)
        assert run.kinds == kinds


class TestForgetting:
    """Nothing is watched for longer than anybody waits for it."""

    @jumping
    async def test_a_cancelled_run_is_forgotten_after_a_while(
        self, clock: Clock, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        watch = watching(backend, run)
        run.heard()
        run.cancelled, run.cancelled_at = True, clock()
        await pass_time(FORGET_CANCELLED - 1)
        assert backend.closed == []
        await pass_time(2)
        assert backend.closed == [run.run_id]
        assert (backend.asked, run.told) == ([], [])
        assert watch._agenda == []

    @jumping
    async def test_not_while_its_worker_speaks_of_it(self, clock: Clock, backend: Backend, run: Run) -> None:
        watching(backend, run)
        run.cancelled, run.cancelled_at = True, clock()
        for _ in range(60):
            await pass_time(5)
            run.heard()
        assert backend.closed == []
        await pass_time(FORGET_CANCELLED + TICK)
        assert backend.closed == [run.run_id]

    @jumping
    async def test_a_closed_run_is_not_looked_at_again(self, backend: Backend, run: Run) -> None:
        watch = watching(backend, run)
        await pass_time(6)
        assert len(backend.asked) == 1
        run.closed = True
        await pass_time(60)
        assert len(backend.asked) == 1
        assert (watch._agenda, list(watch._new), watch._looks) == ([], [], {})

    @jumping
    async def test_a_run_that_ends_while_it_is_asked_about_is_left_alone(
        self, backend: Backend, run: Run
    ) -> None:
        backend.says("lost")
        watch = await suspected(backend, run)
        await pass_time(ASK_AFTER + 0.1)
        assert len(backend.asked) == 1
        run.closed = True
        await pass_time(60)
        assert run.told == []
        assert (watch._agenda, watch._looks, watch._questions) == ([], {}, set())

    @jumping
    async def test_thousands_of_runs_that_speak_cost_little(self, clock: Clock, backend: Backend) -> None:
        runs = [Run(clock, run_id=f"{number:032x}") for number in range(3000)]
        watch = watching(backend)
        for run in runs:
            watch.opened(run)
        for _ in range(60):
            for run in runs:
                run.heard()
            await pass_time(5)
        assert backend.asked == []
        assert len(watch._agenda) == len(runs)
        # One look for each silence that might have become too long, and not one for each turn.
        assert max(run.looks for run in runs) <= 300 / (QUIET - 5)
        assert sum(run.looks for run in runs) <= len(runs) * 70
        for run in runs:
            run.closed = True
        await pass_time(QUIET + TICK)
        assert (watch._agenda, watch._looks) == ([], {})

    @jumping
    async def test_a_connection_that_comes_and_goes_does_not_fill_the_agenda(
        self, backend: Backend, run: Run
    ) -> None:
        watch = watching(backend, run)
        for _ in range(500):
            run.heard()
            run.lose_connection(watch)
            run.heard()
        await pass_time(QUIET + TICK)
        assert len(watch._agenda) <= 1
        assert len(backend.asked) == 1


class TestLife:
    """The watch itself: woken from any thread, stopped at any moment."""

    @pytest.mark.parametrize("call", ["opened", "suspect"])
    @jumping
    async def test_another_thread_wakes_a_watch_that_has_nothing_to_do(
        self, clock: Clock, backend: Backend, run: Run, call: str
    ) -> None:
        watch = watching(backend)
        await pass_time(1)
        assert watch._idle
        run.heard()
        run.suspect_since = clock() if call == "suspect" else None
        speaker = threading.Thread(target=getattr(watch, call), args=(run,))
        speaker.start()
        while not backend.asked:
            await pass_time(0.1 if watch._agenda else 0)
        speaker.join()
        assert backend.times()[0] >= ASK_AFTER

    @jumping
    async def test_what_goes_wrong_with_one_look_does_not_end_the_watch(
        self, clock: Clock, backend: Backend, run: Run, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Run):
            @property
            def last_contact(self) -> float:
                raise RuntimeError("no such thing")

        watch = watching(backend)
        watch.opened(Broken(clock, run_id="b" * 32, started=True))
        await pass_time(6)
        assert "looking at run" in caplog.text
        backend.says("lost")
        run.heard()
        run.lose_connection(watch)
        await pass_time(GRACE + TICK)
        assert run.kinds == [frames.TASK_ERROR]

    @pytest.mark.parametrize("moment", [0.0, ASK_AFTER + 0.1, GRACE + 0.1])
    @pytest.mark.parametrize("hangs", [True, False])
    @jumping
    async def test_stopping_leaves_no_task_whatever_it_is_at(
        self, backend: Backend, run: Run, moment: float, hangs: bool
    ) -> None:
        backend.thinking = asyncio.Event() if hangs else None
        watch = await suspected(backend, run)
        await pass_time(moment)
        await watch.stop()
        await pass_time(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # Whoever has not heard of it yet is no trouble.
        watch.opened(run)
        watch.suspect(run)

    @jumping
    async def test_a_loop_that_has_ended_is_told_nothing(self, backend: Backend, run: Run) -> None:
        def elsewhere() -> Watch:
            async def begin() -> Watch:
                watch = watching(backend)
                await asyncio.sleep(0)
                await watch.stop()
                return watch

            return asyncio.run(begin())

        made: list[Watch] = []
        thread = threading.Thread(target=lambda: made.append(elsewhere()))
        thread.start()
        thread.join()
        made[0].suspect(run)
        made[0].opened(run)


class TestWorkers:
    """Adapters ask who runs a job."""

    @pytest.mark.parametrize("job", ["a" * 32, "a" * 32 + "-2", "a" * 32 + "-17"])
    def test_every_attempt_of_a_run_leads_to_its_worker(self, job: str) -> None:
        run = Run(Clock(), worker={"host": "w1", "pid": 7})
        find: Callable[[str], Any] = {run.run_id: run}.get
        assert worker_of(find)(job) == {"host": "w1", "pid": 7}

    def test_nobody_runs_what_is_unknown(self) -> None:
        assert worker_of({}.get)("b" * 32) == {}
