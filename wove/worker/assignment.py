"""A payload, verified and opened: what this worker is asked to do."""

from __future__ import annotations

import base64
import copy
import logging
import time
from types import FunctionType
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.buffers import Original
from wove.errors import PayloadRejectedError, ProtocolError, is_time_limit
from wove.keyring import current_secrets
from wove.security import fetch_tag, open_payload, run_key
from wove.wire import decode_callable, decode_value, unpack_message
from wove.worker.admission import admission
from wove.worker.connection import clock_offset, request, split_url
from wove.worker.fetching import claimed, fetch
from wove.worker.parts import shared_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wove.tables import Row

    #: A description with the attachments that belong to it, or a part that holds both.
    _Source = tuple[Any, Sequence[memoryview]] | Original

logger = logging.getLogger("wove.worker")

#: The version of the payload format that this worker reads.
VERSION = 1

#: Seconds by which a payload must be too old before it is refused for its age: clocks differ.
EXPIRED_KNOWN = 2.0
EXPIRED_UNKNOWN = 60.0
#: Seconds that a callback server gets to tell the time.
TIME_PATIENCE = 2.0


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
            #: The callback server's count of withdrawals when the payload was made.
            self.withdrawn: int | None = _optional(envelope.get("withdrawn"), int)
            #: Outcomes are to be plain data: for the submitter's sake, or for that of this worker's list.
            self.plain = envelope.get("plain") is True or self._admission.functions is not None
            self.keep = envelope.get("keep") is True
            self.attended = envelope.get("attended", True) is not False
            self.ask = envelope.get("ask") is True
            described = envelope.get("callable")
            #: The function's name, as far as it is known; calls may have names of their own.
            self.function: str = described if type(described) is str else self.task_id
            #: The idempotency key, by which runs of other processes may share this one's job.
            self.shared_by: str | None = _optional(envelope.get("key"), str)
            #: How many runs travel together; None for a single one, whose ids are then those of the batch.
            self.batch: int | None = _optional(envelope.get("batch"), int)
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
        self._secret, self._nonce = secret, nonce
        self.key = run_key(secret, self.environment, self.run_id, nonce)
        self._envelope = envelope
        #: What the callable of a batch is decoded from, where it goes by value.
        self._function_source: _Source | None = None

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
        except Exception as exc:
            if is_time_limit(exc):
                raise
            # Its submitter may be gone: then our own clock has to do.
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
        self._check_version()
        if "fetch" in envelope:
            envelope, attachments = unpack_message(self._fetch(envelope["fetch"]))
        func, arguments = self._decode(envelope, attachments)
        if type(arguments) is not list or len(arguments) != 2:
            raise ProtocolError("malformed payload: args")
        self._attachments = []
        return func, tuple(arguments[0]), dict(arguments[1])

    def _check_version(self) -> None:
        version = self._envelope.get("v")
        if version != VERSION:
            raise PayloadRejectedError(
                f"the payload is of version {version!r} and this worker reads version {VERSION}: "
                "install the same release of Wove on the submitter and its workers",
                reason="version",
            )

    def load_batch(self) -> tuple[Any, list[Row]]:
        """Return the callable of a batch, and for each of its runs the id and the encoded arguments.

        Raises:
            Exception: whatever importing or unpickling the callable raises.
        """
        from wove.tables import unpack_table

        self._check_version()
        attachments, self._attachments = self._attachments, []
        if not attachments:
            raise ProtocolError("malformed payload: a batch without its table")
        rows = unpack_table(attachments[0], str)
        if not rows or not all(frames.is_run_id(row[0]) for row in rows):
            raise ProtocolError("malformed payload: the table of a batch")
        if self._admission.functions is not None:
            return self._admission.functions.find(self._envelope.get("callable")), rows
        source = self._source(self._envelope, attachments)
        if type(self._envelope.get("callable")) is not str:
            self._function_source = source
        return _function_of(source), rows

    def decode_row(self, row: Row) -> tuple[Any, Any]:
        """Return the positional and the keyword arguments of one run of a batch.

        Raises:
            Exception: whatever unpickling them raises.
        """
        described, data = [row[1], 0, 1], [memoryview(row[2])]
        if self._admission.functions is not None:
            from wove.no_pickle import decode_plain

            arguments = decode_plain(described, data, "the arguments", "this worker has WOVE_ALLOW and takes")
        else:
            arguments = decode_value(described, data)
        if type(arguments) is not list or len(arguments) != 2:
            raise ProtocolError("malformed payload: args")
        return arguments[0], arguments[1]

    def member(self, run_id: str) -> Assignment:
        """Return the assignment of one run of a batch, by which it can be reported alone."""
        alone = copy.copy(self)
        alone.run_id = run_id
        alone.batch = None
        alone.key = run_key(self._secret, self.environment, run_id, self._nonce)
        return alone

    def _decode(self, call: Mapping[str, Any], attachments: Sequence[memoryview]) -> tuple[Any, Any]:
        described, arguments = call.get("callable"), call.get("args")
        if self._admission.functions is not None:
            from wove.no_pickle import decode_plain

            # The list first: nothing is imported, and nothing decoded, for what is not on it.
            func = self._admission.functions.find(described)
            who = "this worker has WOVE_ALLOW and takes"
            return func, decode_plain(arguments, attachments, "the arguments", who)
        return _function_of(self._source(call, attachments)), decode_value(arguments, attachments)

    def _source(self, call: Mapping[str, Any], attachments: Sequence[memoryview]) -> _Source:
        """Return what the callable is decoded from."""
        return shared_part(self, call["part"]) if "part" in call else (call.get("callable"), attachments)

    def another(self, func: Any) -> Any:
        """Return the callable for another run of a batch: it shares no state with ``func``, the first one's.

        Raises:
            Exception: whatever importing or unpickling it raises.
        """
        source = self._function_source
        if source is None or is_bare(func):
            return func
        return _function_of(source)

    def _fetch(self, claim: Any) -> memoryview:
        size, digest = claimed(claim, "fetch")
        return fetch(self, "payloads", fetch_tag(self.key, self.run_id), size, digest)

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


def _function_of(source: _Source) -> Any:
    attachments: Sequence[memoryview]
    if isinstance(source, Original):
        # A copy for each: what one changes in place, no other sees.
        part, attachments = unpack_message(source.copy())
        described = part.get("callable")
    else:
        described, attachments = source
    func = decode_callable(described, attachments)
    if not callable(func):
        raise TypeError(f"{described!r} is not callable here, but {type(func).__name__}")
    return func


def is_bare(func: Any) -> bool:
    """Tell whether a function that came by value brought nothing with it that it could change."""
    return (
        type(func) is FunctionType
        and not (func.__closure__ or func.__defaults__ or func.__kwdefaults__ or func.__dict__)
        and all(name.startswith("__") for name in func.__globals__)
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
