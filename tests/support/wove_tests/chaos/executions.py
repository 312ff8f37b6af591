"""Reads what the executions noted, and compares it with what the callers heard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from wove_tests.chaos.ledger import Ledger


#: Seconds that an outcome may take, when the network fails meanwhile.
DELIVERY_SECONDS = 6.0


class Line(NamedTuple):
    """One line of :mod:`wove_tests.chaos.tasks`."""

    key: int
    run_id: str
    attempt: int
    phase: str
    pid: int
    parent: int
    at: float


def read(log: Path) -> Iterator[Line]:
    """Yield the lines in the order they were written; a killed process may have left half of one."""
    with open(log, encoding="ascii") as file:
        for text in file:
            words = text.split()
            if len(words) == 7 and text.endswith("\n"):
                key, run_id, attempt, phase, pid, parent, at = words
                yield Line(int(key), run_id, int(attempt), phase, int(pid), int(parent), float(at))


@dataclass
class Executions:
    """What the executions say."""

    started: int = 0
    #: Executions of one attempt beyond its first.
    duplicates: int = 0
    #: Executions of attempts after the first.
    retried: int = 0
    #: Started although their cancellation had been acknowledged.
    zombies: list[str] = field(default_factory=list)
    #: Started after the call had ended some other way: work that nobody waited for.
    started_late: Counter[str] = field(default_factory=Counter)
    #: WorkerLostError of a worker that nobody had killed.
    false_alarms: list[str] = field(default_factory=list)

    #: DeliveryTimeoutError where WorkerLostError was due: whoever ran it was killed.
    unnoticed: list[str] = field(default_factory=list)
    #: DeliveryTimeoutError although the task had ended well before.
    undelivered: list[str] = field(default_factory=list)

    @classmethod
    def check(cls, log: Path, ledger: Ledger, killed: Mapping[int, float]) -> Executions:
        """Read the file, once everything has come to rest; ``killed`` says when a process was killed."""
        found = cls()
        seen: Counter[tuple[str, int]] = Counter()
        last: dict[int, Line] = {}
        for line in read(log):
            if line.key in ledger.worker_lost or line.key in ledger.timed_out:
                last[line.key] = line
            if line.phase == "start":
                found._started(line, ledger)
                seen[line.run_id, line.attempt] += 1
        found.duplicates = sum(count - 1 for count in seen.values())
        found.retried = sum(count for (_, attempt), count in seen.items() if attempt > 1)
        for _, line in sorted(last.items()):
            # Processes live on, and their ids come again: only a kill between this line and the outcome counts.
            # That a worker had ended by itself may be found out after its callers have heard of it.
            ended = float("inf") if line.key in ledger.worker_lost else ledger.ended[line.key]
            dead = any(line.at <= killed.get(pid, 0.0) <= ended for pid in (line.pid, line.parent))
            found._ended(line, ledger, dead=dead)
        return found

    def _ended(self, line: Line, ledger: Ledger, *, dead: bool) -> None:
        """Compare the last sign of an execution with the delivery error that its caller got."""
        if line.key in ledger.worker_lost:
            call, text = ledger.worker_lost[line.key]
            if not dead:
                when = f"{line.phase} at +{line.at - call.begun:.2f} s in pid {line.pid}, which nobody killed"
                self.false_alarms.append(f"{call}: {when}: {text}")
            return
        call = ledger.timed_out[line.key]
        what = (
            f"{call}: run {line.run_id} attempt {line.attempt}: {line.phase} at +{line.at - call.begun:.2f} s"
        )
        if line.phase == "start":
            if dead:
                self.unnoticed.append(f"{what}, then pid {line.pid} was killed")
        elif line.at < call.begun + call.deadline - DELIVERY_SECONDS:
            self.undelivered.append(what + (f", then pid {line.pid} was killed" if dead else ""))

    def _started(self, line: Line, ledger: Ledger) -> None:
        self.started += 1
        ended = ledger.ended[line.key] if line.key < len(ledger.ended) else 0.0
        if not ended or line.at <= ended:
            return
        call = ledger.acknowledged.get(line.key)
        if call is None:
            self.started_late["no matter"] += 1
            return
        self.zombies.append(
            f"{call}: run {line.run_id} attempt {line.attempt} started {line.at - ended:.3f} s after the "
            f"acknowledgement, in pid {line.pid}"
        )
