"""A payload, verified and opened: what this worker is asked to do."""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import PayloadRejectedError, ProtocolError
from wove.keyring import current_secrets
from wove.security import fetch_tag, open_payload, run_key
from wove.wire import decode_callable, decode_value, unpack_message
from wove.worker.admission import admission
from wove.worker.connection import clock_offset, request, split_url
from wove.worker.offering import offer, patience

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger("wove.worker")

#: The version of the payload format that this worker reads.
VERSION = 1

#: Seconds by which a payload must be too old before it is refused for its age: clocks differ.
EXPIRED_KNOWN = 2.0
EXPIRED_UNKNOWN = 60.0
#: Seconds that a callback server gets to tell the time.
TIME_PATIENCE = 2.0


class NotWanted(Exception):
    """The callback server knows of the run no more: it was cancelled, or has ended."""


class FetchFailed(ConnectionError):
    """The callback server did not answer for as long as the run was worth: nothing of it ran."""


class Assignment:
    """One payload's content. Attributes are plain data; :meth:`load` rebuilds the call."""

    def __init__(self, payload: bytes | str) -> None:
        """Verify and open ``payload``.

        Raises:
            PayloadRejectedError: it is not signed with a secret that this worker knows, or wants a callback to
                where this worker does not call.
            ProtocolError: it is signed, but not in a form that this version reads.
            ConfigurationError: this worker's own settings cannot be used.
        """
        raw = _raw(payload)
        self._admission = admission()
        self.environment, secret, message = open_payload(current_secrets(), raw)
        envelope, self._attachments = unpack_message(message)
        # Only what is needed to report; whatever else is wrong with it is reported by `load`.
        try:
            self.run_id: str = _checked(envelope["run_id"], str)
            self.task_id: str = _checked(envelope["task_id"], str)
            self.attempt: int = _checked(envelope["attempt"], int)
            self.callback: str = _checked(envelope["callback"], str)
            self.sent_at: float = _checked(envelope["sent_at"], float)
            self.heartbeat = _seconds(envelope.get("heartbeat"))
            self.max_body: int | None = envelope.get("max_body")
            self.timeout = _seconds(envelope.get("timeout"))
            self.start_timeout = _seconds(envelope.get("start_timeout"))
            self._expires = _seconds(envelope.get("expires"))
            #: Outcomes are to be plain data: for the submitter's sake, or for that of this worker's list.
            self.plain = envelope.get("plain") is True or self._admission.functions is not None
            self.keep = envelope.get("keep") is True
            self.attended = envelope.get("attended", True) is not False
            #: The idempotency key, by which runs of other processes may share this one's job.
            self.shared_by: str | None = _optional(envelope.get("key"), str)
            nonce = _checked(envelope["nonce"], bytes)
            self.origin, self.path = split_url(self.callback)
        except (KeyError, ValueError) as exc:
            raise ProtocolError(f"malformed payload: {exc}") from None
        if not frames.is_run_id(self.run_id):
            raise ProtocolError("malformed payload: run_id")
        try:
            self._admission.check_origin(self.origin)
        except PayloadRejectedError as exc:
            raise PayloadRejectedError(f"run {self.run_id}: {exc}", reason=exc.reason) from None
        self.kid = secret.kid
        self.key = run_key(secret, self.environment, self.run_id, nonce)
        self._envelope = envelope

    @property
    def job(self) -> str:
        """The id under which the backend knows this attempt; see :func:`wove.backend.job_id`."""
        return self.run_id if self.attempt == 1 else f"{self.run_id}-{self.attempt}"

    def check(self) -> None:
        """Refuse what this worker does not take although it is signed well. Its submitter may be told.

        Raises:
            PayloadRejectedError: another environment's, or too old.
        """
        self._admission.check_environment(self.environment)
        if self._expires is None:
            return
        offset = clock_offset(self.origin)
        if offset is None:
            offset = self._ask_for_the_time()
        age = time.time() + (offset or 0.0) - self.sent_at
        if age > self._expires + (EXPIRED_UNKNOWN if offset is None else EXPIRED_KNOWN):
            raise PayloadRejectedError(
                f"it has expired: it was signed {age:.0f} s ago and is good for {self._expires:g} s "
                '(executor_config["payload_expires"])',
                reason="expired",
            )

    def _ask_for_the_time(self) -> float | None:
        try:
            request(self.origin, "GET", f"{self.path}/healthz", {}, timeout=TIME_PATIENCE)
        except Exception as exc:  # its submitter may be gone: then our own clock has to do
            logger.info(
                "run %s: the time is not known of %s: %s", self.run_id, self.origin, type(exc).__name__
            )
        return clock_offset(self.origin)

    def load(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the callable, its positional and its keyword arguments.

        A large message is first fetched from the callback server.

        Raises:
            Exception: whatever importing or unpickling raises.
            FetchFailed: a large message could not be had.
            NotWanted: it is not to be had any more.
        """
        envelope: Mapping[str, Any] = self._envelope
        attachments = self._attachments
        if envelope.get("v") != VERSION:
            raise PayloadRejectedError(
                f"the payload is of version {envelope.get('v')!r} and this worker reads version {VERSION}: "
                "install the same release of Wove on the submitter and its workers",
                reason="version",
            )
        if "fetch" in envelope:
            envelope, attachments = unpack_message(self._fetch(envelope["fetch"]))
        func, arguments = self._decode(envelope.get("callable"), envelope.get("args"), attachments)
        if type(arguments) is not list or len(arguments) != 2:
            raise ProtocolError("malformed payload: args")
        self._attachments = []
        return func, tuple(arguments[0]), dict(arguments[1])

    def _decode(self, described: Any, arguments: Any, attachments: Sequence[memoryview]) -> tuple[Any, Any]:
        if self._admission.functions is not None:
            from wove.no_pickle import decode_plain

            # The list first: nothing is imported, and nothing decoded, for what is not on it.
            func = self._admission.functions.find(described)
            who = "this worker has WOVE_ALLOW and takes"
            return func, decode_plain(arguments, attachments, "the arguments", who)
        func = decode_callable(described, attachments)
        if not callable(func):
            raise TypeError(f"{described!r} is not callable here, but {type(func).__name__}")
        return func, decode_value(arguments, attachments)

    def _fetch(self, claim: Any) -> bytes | bytearray:
        if (
            type(claim) is not list
            or len(claim) != 2
            or type(claim[0]) is not int
            or type(claim[1]) is not bytes
        ):
            raise ProtocolError("malformed payload: fetch")
        size, digest = claim
        headers = {"Wove-Key": self.kid, "Wove-Signature": fetch_tag(self.key, self.run_id).hex()}
        path = f"{self.path}/wove/v1/payloads/{self.run_id}"
        reply = offer(
            lambda: request(self.origin, "GET", path, headers, timeout=30.0, max_reply=size),
            self,
            patience(self, time.monotonic(), cancelled=False),
            "the arguments",
        )
        if reply is None:
            raise FetchFailed(f"the callback server at {self.origin} did not hand out the run's arguments")
        if reply.status == 410:
            raise NotWanted
        if hashlib.sha256(reply.body).digest() != digest:
            raise ProtocolError(
                "the run's arguments changed while they were sent: do not modify them meanwhile"
            )
        return reply.body

    def overdue(self, clock_offset: float, tolerance: float) -> bool:
        """Tell whether nobody can be waiting for the run to start any more.

        Args:
            clock_offset: the submitter's wall clock minus ours, in seconds.
            tolerance: how wrong that may be, in seconds.
        """
        if self.keep:
            return False
        age = time.time() + clock_offset - self.sent_at
        return any(
            limit is not None and age > limit + tolerance for limit in (self.timeout, self.start_timeout)
        )


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and value > 0 else None


def _raw(payload: bytes | str) -> bytes:
    if isinstance(payload, str):
        try:
            return base64.b64decode(payload, validate=True)
        except ValueError:
            raise PayloadRejectedError("not a Wove payload: neither bytes nor base64 text") from None
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    raise PayloadRejectedError(f"not a Wove payload: {type(payload).__name__}")


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _optional(value: Any, kind: type) -> Any:
    return None if value is None else _checked(value, kind)
