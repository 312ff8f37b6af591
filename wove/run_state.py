"""What a run is while it is open, and what may become of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.policy import DeliveryPolicy

_NOBODY: Mapping[str, Any] = MappingProxyType({})


class RunState(StrEnum):
    """Where an open run is."""

    QUEUED = "queued"
    SUBMITTED = "submitted"
    STARTED = "started"
    LOST = "lost"
    CANCELLING = "cancelling"


@dataclass(slots=True)
class Run:
    """One call, while it is open. Times are those of the table's clock, in seconds."""

    run_id: str
    task_id: str
    policy: DeliveryPolicy
    opened_at: float
    state: RunState = RunState.QUEUED
    attempt: int = 1
    #: How often it was submitted again: each new attempt is one, and each time that the backend's answer was lost.
    repeats: int = 0
    #: Whether the backend may have the current attempt, and may not: it is to be submitted once more.
    doubtful: bool = False
    #: When the current attempt was decided on.
    attempt_at: float = 0.0
    submitted_at: float | None = None
    started_at: float | None = None
    #: Whether any attempt has ever started: then the time to start is no longer the question.
    ever_started: bool = False
    last_seen: float | None = None
    cancel_by: float | None = None
    worker: Mapping[str, Any] = field(default_factory=lambda: _NOBODY)
    #: How earlier attempts ended: ``attempt``, ``reason``, ``host``, ``pid``, ``seconds``.
    history: list[dict[str, Any]] | tuple[()] = ()
    #: Per execution, the number of its last event.
    seqs: Mapping[str, int] = field(default_factory=lambda: _NOBODY)


@dataclass(slots=True)
class Outcome:
    """How a run ended: exactly one per run.

    ``kind`` is ``result``, ``error``, ``cancelled`` or ``timeout``; ``cancel_work`` says
    that the work may still be going on and is to be stopped.
    """

    run: Run
    kind: str
    value: Any = None
    exception: BaseException | None = None
    cancel_work: bool = False


@dataclass(frozen=True, slots=True)
class Resubmission:
    """The delivery of a run failed, and it has retries left: it is to be submitted again."""

    run: Run
    reason: str


class Applied(NamedTuple):
    """What became of an event: whether its run took it, and what is to be done about it."""

    taken: bool
    outcome: Outcome | None = None
    again: Resubmission | None = None
