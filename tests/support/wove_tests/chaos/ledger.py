"""Counts what became of each call, and keeps only what looks wrong."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import wove.run_state
from wove import DeliveryTimeoutError, SubmitError, WorkerLostError
from wove_tests.chaos.tasks import ChaosError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

#: Seconds after a deadline within which an outcome must have come.
GRACE = 2.0
#: Examples of each defect that the report shows.
EXAMPLES = 8

#: What a run may end with that its task did not raise.
_DELIVERY_ERRORS = (WorkerLostError, DeliveryTimeoutError, SubmitError)


@dataclass(slots=True)
class Call:
    """One call by one caller; times are monotonic, ``expected`` is a value or the exception's arguments."""

    key: int
    environment: str
    kind: str
    expected: Any
    begun: float
    deadline: float
    settings: dict[str, Any]
    cancelled_at: float | None = None
    cancel_mode: str = "best_effort"
    cancel_timeout: float = 0.0
    waiters: int = 1
    ended: float = 0.0
    outcome: str = ""

    @property
    def fails(self) -> bool:
        """Whether the task is meant to raise."""
        return self.kind == "fail"

    @property
    def due(self) -> float:
        """The latest moment for its outcome, without the grace."""
        due = self.begun + self.deadline
        if self.cancelled_at is not None:
            wait = self.cancel_timeout if self.cancel_mode == "require_ack" else 0.0
            due = min(due, self.cancelled_at + wait)
        return due

    @property
    def acknowledged(self) -> bool:
        """Whether a cancellation came back before any of the clocks could have ended the wait."""
        return (
            self.outcome == "cancelled"
            and self.cancelled_at is not None
            and self.cancel_mode == "require_ack"
            and self.waiters == 1
            and self.ended < self.due - 0.1
        )

    def __str__(self) -> str:
        cancel = ""
        if self.cancelled_at is not None:
            cancel = f", {self.cancel_mode} cancel at +{self.cancelled_at - self.begun:.2f} s"
        took = f"{self.ended - self.begun:.2f} s" if self.ended else "no end"
        return f"call {self.key} ({self.kind}, {self.environment}, {self.settings}{cancel}; begun at {self.begun:.2f}, {took})"


@dataclass
class Ledger:
    """What became of the calls. Every list of a defect holds all of its cases, as text."""

    lost: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    submitted: int = 0
    #: By environment, then by outcome.
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    #: Seconds to the outcome by environment and kind, of calls that ended with what their task did.
    seconds: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    max_overshoot: float = 0.0
    late: Call | None = None
    #: By key, when a cancellation was acknowledged.
    acknowledged: dict[int, Call] = field(default_factory=dict)
    #: By key, calls that ended with WorkerLostError, with its text.
    worker_lost: dict[int, tuple[Call, str]] = field(default_factory=dict)
    #: By key, calls that ended with DeliveryTimeoutError.
    timed_out: dict[int, Call] = field(default_factory=dict)
    #: By key, when the call ended.
    ended: array[float] = field(default_factory=lambda: array("d"))
    shared: int = 0

    def note_end(self, call: Call) -> None:
        """Remember when the calls of a key ended: the latest of them."""
        self.ended.extend([0.0] * (call.key + 1 - len(self.ended)))
        self.ended[call.key] = max(self.ended[call.key], call.ended)

    def note_lost(self, call: Call, why: str) -> None:
        """A call has no outcome although its time is over."""
        call.outcome = "lost"
        self.outcomes[call.environment]["lost"] += 1
        self.lost.append(f"{call}: {why}")

    def note(self, call: Call, task: asyncio.Task[Any]) -> None:
        """A call has ended: say how, and check it."""
        call.outcome = self._judge(call, task)
        self.outcomes[call.environment][call.outcome] += 1
        call.expected = None  # large, and some calls are kept
        self.note_end(call)
        if call.acknowledged:
            self.acknowledged[call.key] = call
        if call.outcome in ("result", "task error"):
            taken = call.ended - call.begun
            self.seconds["all"].append(taken)
            self.seconds[f"{call.environment} {call.kind}"].append(taken)
        overshoot = call.ended - call.begun - call.deadline
        if overshoot > self.max_overshoot:
            self.max_overshoot, self.late = overshoot, call

    def _judge(self, call: Call, task: asyncio.Task[Any]) -> str:
        if task.cancelled():
            if call.cancelled_at is None:
                return self._wrong(call, "CancelledError that nobody asked for")
            return "cancelled"
        exception = task.exception()
        if exception is None:
            if call.fails or task.result() != call.expected:
                return self._wrong(call, f"returned {task.result()!r:.200}, not {call.expected!r:.100}")
            return "result"
        if isinstance(exception, ChaosError):
            if not call.fails or (exception.key, exception.number) != call.expected:
                return self._wrong(call, f"raised {exception!r}, which is not its own")
            return "task error"
        if isinstance(exception, _DELIVERY_ERRORS):
            if isinstance(exception, WorkerLostError):
                self.worker_lost[call.key] = (call, str(exception))
            elif isinstance(exception, DeliveryTimeoutError):
                self.timed_out[call.key] = call
            return type(exception).__name__
        notes = "; ".join(getattr(exception, "__notes__", []))
        return self._wrong(call, f"{type(exception).__name__}: {exception!s:.500} [{notes:.700}]")

    def _wrong(self, call: Call, what: str) -> str:
        self.wrong.append(f"{call}: {what}")
        return "wrong"

    def compare(self, calls: list[Call]) -> None:
        """Callers that share a run must have got the same outcome, but for those who cancelled."""
        self.shared += 1
        kinds = {call.outcome for call in calls if call.cancelled_at is None}
        if len(kinds) > 1:
            self.double.append(f"{calls[0]}: its {len(calls)} callers got {sorted(kinds)}")


def watch_outcomes(note: Callable[[str], None]) -> Callable[[], int]:
    """Call ``note`` with the id of each run that is closed a second time; return a counter of all closings.

    A caller sees one outcome at most, since an awaited call ends once; so this looks at the table of runs.
    """
    seen: set[int] = set()
    outcome_class = wove.run_state.Outcome
    original = outcome_class.__init__

    def counting(self: Any, run: Any, *args: Any, **kwargs: Any) -> None:
        original(self, run, *args, **kwargs)
        number = int(run.run_id[:15], 16)
        if number in seen:
            note(f"run {run.run_id} was closed twice")
        seen.add(number)

    outcome_class.__init__ = counting
    return lambda: len(seen)


def quantiles(values: array[float]) -> tuple[float, float, float]:
    """Return median, 99th percentile and maximum."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], ordered[-1]


def totals(outcomes: dict[str, Counter[str]]) -> Iterator[tuple[str, int]]:
    """Yield how often each outcome came, over all environments, the most frequent first."""
    yield from sum(outcomes.values(), Counter()).most_common()
