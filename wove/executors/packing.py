"""Runs become parcels: encoded, signed, and opened at the listener before the backend has them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from wove import frames
from wove.backend import build_batch, build_payload, encode_row, failure_webhook, job_id
from wove.errors import EncodeError, SubmitError
from wove.executors.watch import WatchedRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from wove.backend import BuiltPayload
    from wove.frames import Frame
    from wove.security import SecretRing
    from wove.shared_parts import Part
    from wove.tables import Row

    #: Called in the caller's loop with what refused a run, or None.
    Done = Callable[[BaseException | None], None]

#: Bytes of arguments in one batch at most.
MAX_BATCH_BYTES = 192 * 1024

NOT_SENT = "cancelled before it was submitted"


class KnownRun(WatchedRun, Protocol):
    """What the callback server knows of a run; see ``wove.callback_server.runs.OpenRun``."""

    task_id: str
    nonce: bytes
    message: list[Buffer] | None


class Listener(Protocol):
    """Where runs are opened; see ``wove.callback_server.hub.Lease``."""

    @property
    def withdrawn(self) -> int | None:
        """How often, so far, it has taken back what was submitted."""

    def find(self, run_id: str) -> KnownRun | None:
        """Return an open run, or batch."""

    def open_new(self, **settings: Any) -> None:
        """Take events for a run."""

    def open_batch(self, **settings: Any) -> None:
        """Take events for a batch and its members."""

    def batch_of(self, run_id: str) -> Any:
        """Return the batch in which an open run travels."""

    def renew_run(
        self, run: Any, attempt: int, message: list[Buffer] | None, part: Part | None = None
    ) -> None:
        """Begin another attempt."""

    def cancel_run(self, run_id: str) -> None:
        """Let the worker of a run, or of a batch's member, hear that it is not wanted any more."""

    def close_run(self, run_id: str) -> None:
        """Take no more events for a run, or batch."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What all payloads of an environment have in common; see :func:`wove.backend.build_payload`."""

    environment: str
    ring: SecretRing
    callback_url: str
    max_body: int
    expires: float | None
    plain: bool
    webhook: bool


class Waiting:
    """A run on its way to the adapter."""

    __slots__ = ("cancelled", "done", "drawn", "frame")

    def __init__(self, frame: Frame, done: Done) -> None:
        self.frame = frame
        self.done = done
        self.cancelled = False
        #: It is being handed over.
        self.drawn = False


class Parcel:
    """One payload for the adapter, with one run or several.

    Attributes:
        members: the runs.
        frame: what the adapter is told.
        together: whether this is a batch.
        built: the payload.
        result: what the adapter knows it by, or what refused it.
    """

    __slots__ = ("built", "frame", "members", "result", "together")

    def __init__(self, members: list[Waiting], frame: Frame, *, together: bool) -> None:
        self.members = members
        self.frame = frame
        self.together = together
        self.built: BuiltPayload | None = None
        self.result: Any = None


class Packer:
    """Makes parcels of runs. Callable from any thread.

    Args:
        terms: what the payloads have in common.
        lease: where runs are opened.
        timing: returns, by a task's name, what takes a worker's word on how long its runs took.
        told: further settings of all runs: what takes their events.
    """

    def __init__(
        self,
        terms: Terms,
        lease: Listener,
        timing: Callable[[str], Callable[[str, int, float], None]],
        **told: Any,
    ) -> None:
        self._terms = terms
        self._lease = lease
        self._timing = timing
        self._told = told

    def message(self, members: list[Waiting]) -> list[Parcel]:
        """Make one payload of runs, or more where they turn out to be large."""
        parcels: list[Parcel] = []
        chunk: list[tuple[Waiting, Row]] = []
        held = 0
        for waiting in members:
            row = None if waiting.cancelled else _row(waiting.frame, plain=self._terms.plain)
            if row is None:
                parcels.append(self.alone(waiting))
                continue
            if held + len(row[2]) > MAX_BATCH_BYTES:
                parcels.extend(self._pack_together(chunk))
                chunk, held = [], 0
            chunk.append((waiting, row))
            held += len(row[2])
        if chunk:
            parcels.extend(self._pack_together(chunk))
        return parcels

    def alone(self, waiting: Waiting) -> Parcel:
        """Make a payload of one run; what cannot be encoded is the parcel's result."""
        terms = self._terms
        parcel = Parcel([waiting], waiting.frame, together=False)
        if waiting.cancelled:
            parcel.result = SubmitError(NOT_SENT)
            return parcel
        try:
            parcel.built = build_payload(
                waiting.frame,
                environment=terms.environment,
                ring=terms.ring,
                callback_url=terms.callback_url,
                max_body=terms.max_body,
                nonce=self._nonce(waiting.frame),
                expires=terms.expires,
                plain=terms.plain,
                withdrawn=self._lease.withdrawn,
            )
        except Exception as exc:
            parcel.result = exc
        except BaseException as exc:
            # An argument whose pickling exits: an error of its own run only.
            parcel.result = EncodeError(f"encoding the arguments raised {type(exc).__name__}: {exc}")
        return parcel

    def _pack_together(self, chunk: list[tuple[Waiting, Row]]) -> list[Parcel]:
        terms = self._terms
        first = chunk[0][0].frame
        frame = {
            "type": frames.RUN_TASK,
            "run_id": secrets.token_hex(16),
            "task_id": first["task_id"],
            "callable": first["callable"],
            "args": {},
            "delivery": first["delivery"],
            "runs": len(chunk),
            "shared": first.get("shared"),
        }
        parcel = Parcel([waiting for waiting, _ in chunk], frame, together=True)
        try:
            parcel.built = build_batch(
                frame,
                [row for _, row in chunk],
                environment=terms.environment,
                ring=terms.ring,
                callback_url=terms.callback_url,
                max_body=terms.max_body,
                expires=terms.expires,
                plain=terms.plain,
                withdrawn=self._lease.withdrawn,
            )
        except BaseException:
            # A callable that is too large to travel with others, or cannot be sent: each run finds out by itself.
            return [self.alone(waiting) for waiting, _ in chunk]
        return [parcel]

    def _nonce(self, frame: Frame) -> bytes | None:
        # What earlier attempts say is signed with keys from the same nonce.
        known = self._lease.find(frame["run_id"])
        return known.nonce if known is not None else None

    def described(self, frame: Frame, built: BuiltPayload) -> Frame:
        """Return what the adapter is told of a payload."""
        terms = self._terms
        if not terms.webhook or frame["delivery"].get("attended") is False:
            return frame
        webhook = failure_webhook(
            frame["run_id"],
            built.nonce,
            environment=terms.environment,
            ring=terms.ring,
            callback_url=terms.callback_url,
            job=job_id(frame),
        )
        return {**frame, "failure_webhook": webhook}

    # --- at the listener -------------------------------------------------------------

    def open(self, parcel: Parcel) -> None:
        """Open what is about to be submitted: a fast worker may report before the broker has answered us.

        Raises:
            SubmitError: there is nobody who waits for it any more.
        """
        if parcel.built is None:
            raise SubmitError("it was not encoded")
        if parcel.together:
            self._open_batch(parcel, parcel.built)
        else:
            self._open_run(parcel.frame, parcel.built)

    def _open_batch(self, parcel: Parcel, built: BuiltPayload) -> None:
        self._lease.open_batch(
            run_ids=[waiting.frame["run_id"] for waiting in parcel.members],
            on_timing=self._timing(parcel.frame["task_id"]),
            **self._settings(parcel.frame, built),
        )

    def _open_run(self, frame: Frame, built: BuiltPayload) -> None:
        delivery = frame.get("delivery") or {}
        if delivery.get("attended") is False:
            return  # nobody waits for it: it was put back on the queue as we stop
        attempt = delivery.get("attempt", 1)
        known = self._lease.find(frame["run_id"])
        if known is None and attempt > 1:
            raise SubmitError("the run has ended meanwhile")
        if known is None:
            self._lease.open_new(**self._settings(frame, built), message=built.message, attempt=attempt)
        elif known.attempt != attempt:
            self._lease.renew_run(known, attempt, built.message, built.part)
        elif not known.cancelled:
            known.message = built.message

    def _settings(self, frame: Frame, built: BuiltPayload) -> dict[str, Any]:
        terms = self._terms
        return {
            "run_id": frame["run_id"],
            "task_id": frame["task_id"],
            "environment": terms.environment,
            "ring": terms.ring,
            "nonce": built.nonce,
            "max_body": terms.max_body,
            "heartbeat": (frame.get("delivery") or {}).get("heartbeat_seconds"),
            "plain": terms.plain,
            "part": built.part,
            **self._told,
        }


def _row(frame: Frame, *, plain: bool) -> Row | None:
    try:
        return encode_row(frame, plain=plain)
    except BaseException:
        return None  # an argument whose pickling exits: alone it is an error of its own run
