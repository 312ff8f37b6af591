"""The exceptions of Wove, how an exception becomes plain data, and which ones a piece of code raises by itself."""

from __future__ import annotations

import sys
import threading
import traceback as _traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

#: Longest traceback or message text, in characters, that an error payload carries.
MAX_TEXT = 16_000

#: Exceptions by which a worker's backend says, in the middle of anything, that the time of a message is up.
_TIME_LIMITS = frozenset({"SoftTimeLimitExceeded", "TimeLimitExceeded", "JobTimeoutException"})

#: Frames of these modules at the top of a traceback tell users nothing about their task.
_OWN_MODULES = ("wove.worker.", "wove.executors.", "wove.threads", "wove.adapters.")


class WoveError(RuntimeError):
    """Root of every exception that Wove itself raises."""


class MissingDispatchFeatureError(WoveError):
    """An optional dependency, or a feature this version does not carry, is needed."""


class ConfigurationError(WoveError, ValueError):
    """A definition or ``executor_config`` holds a key or value that cannot be used."""


class ProtocolError(WoveError):
    """Bytes or a frame do not follow the wire format."""


class EncodeError(WoveError, TypeError):
    """A value cannot be carried to the other side; the message names its type."""


class PayloadRejectedError(WoveError):
    """A worker refused a payload: it is not signed with a secret the worker knows, say.

    ``reason`` is one word of ``malformed``, ``signature``, ``callback``, ``environment``, ``expired``, ``version``,
    ``function`` and ``pickle``.
    """

    def __init__(self, message: str, *, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


class SubmitError(WoveError):
    """The backend did not accept a run.

    Attributes:
        maybe_accepted: it may have: the answer was lost.
        submission: then, what an adapter's ``submit`` would have returned, where that is known.
    """

    def __init__(self, message: str, *, maybe_accepted: bool = False, submission: Any = None) -> None:
        super().__init__(message)
        self.maybe_accepted = maybe_accepted
        self.submission = submission


class DeliveryTimeoutError(WoveError, TimeoutError):
    """A delivery deadline passed before the run's outcome (or its start) arrived."""

    # TimeoutError is an OSError, whose ``__str__`` wants errno and strerror.
    __str__ = RuntimeError.__str__


class DeliveryOrphanedError(WoveError):
    """The environment was stopped while the run was open; nobody waits for it now."""


class EnvironmentExecutionError(WoveError):
    """A run failed on the other side and its own exception could not be rebuilt here.

    ``payload`` is the dictionary that :func:`normalize_exception` makes:
    ``kind message traceback retryable source``.
    """

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.payload: dict[str, Any] = dict(payload)
        kind = self.payload.get("kind") or "Error"
        message = self.payload.get("message") or ""
        own = message and kind == type(self).__name__  # it would stand there twice
        super().__init__(message if own else f"{kind}: {message}" if message else str(kind))

    @property
    def kind(self) -> str:
        """The name of the remote exception's class."""
        return str(self.payload.get("kind") or "")

    def __reduce__(self) -> tuple[type[EnvironmentExecutionError], tuple[dict[str, Any]]]:
        return (type(self), (self.payload,))


class WorkerLostError(EnvironmentExecutionError):
    """The worker died, or was lost from sight, before it reported an outcome.

    Its message names the worker's host and process, the attempt, the last sign of life and the
    backend's own word, such as ``signal 9 (SIGKILL)``.
    """

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """How each execution ended: ``attempt``, ``reason``, ``seconds``, and ``host`` and ``pid`` if known."""
        return list(self.payload.get("attempts") or ())


class RemoteTraceback(Exception):
    """Carries the traceback text of the other side as the ``__cause__`` of an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


def safe_text(value: object, limit: int = MAX_TEXT) -> str:
    """Return ``str(value)``, or a stand-in where that raises, cut to ``limit`` characters."""
    try:
        text = str(value)
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        text = f"<{type(value).__name__}: its text failed with {type(exc).__name__}>"
    return cut(text, limit)


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """Shorten ``text`` in the middle: the ends of a traceback tell the most."""
    # Lone surrogates cannot be sent as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    if half < 1:
        return text[: max(0, limit)]
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters cut ...]\n{text[-half:]}"


def normalize_exception(
    exc: BaseException, *, source: str = "task", retryable: bool = False
) -> dict[str, Any]:
    """Turn an exception into plain data.

    Args:
        exc: the exception.
        source: where it arose: ``"task"`` (the user's function), ``"worker"``,
            ``"backend"`` or ``"executor"``.
        retryable: whether sending the run again may help.

    Returns:
        ``{"kind", "message", "traceback", "retryable", "source"}``: the class name,
        the text, the formatted traceback with its causes, a bool and a string.
    """
    return {
        "kind": type(exc).__name__,
        "message": safe_text(exc),
        "traceback": format_traceback(exc),
        "retryable": retryable,
        "source": source,
    }


def lost(message: str, traceback: str = "") -> dict[str, Any]:
    """Return the error of a run whose worker is gone, in the form of :func:`normalize_exception`."""
    return {
        "kind": WorkerLostError.__name__,
        "message": message,
        "traceback": traceback,
        "retryable": True,
        "source": "backend",
    }


def format_traceback(exc: BaseException) -> str:
    """Format ``exc`` with its causes, without the leading frames that are Wove's own."""
    try:
        lines = _traceback.format_exception(type(exc), exc, _user_part(exc.__traceback__))
    except Exception as failure:
        if not raised_by_code(failure):
            raise
        lines = [f"{type(exc).__name__} (its traceback failed with {type(failure).__name__})"]
    return cut("".join(lines))


def _user_part(tb: TracebackType | None) -> TracebackType | None:
    first = tb
    while tb is not None and str(tb.tb_frame.f_globals.get("__name__", "")).startswith(_OWN_MODULES):
        tb = tb.tb_next
    return tb or first


def raised_by_code(exc: BaseException) -> bool:
    """Tell whether the code that was called has raised ``exc`` by itself.

    Ctrl-C or a backend's time limit has struck while it ran, and means the caller: it is to be raised again. These
    come in the main thread alone.
    """
    struck = isinstance(exc, KeyboardInterrupt) or is_time_limit(exc)
    return not struck or threading.get_ident() != threading.main_thread().ident


def is_time_limit(exc: BaseException) -> bool:
    """Tell whether a backend's time limit has struck, wherever that was: no fault of what was being done."""
    return any(kind.__name__ in _TIME_LIMITS for kind in type(exc).__mro__)


def is_cancellation(exc: BaseException) -> bool:
    """Tell whether it is asyncio's CancelledError."""
    # Only a process that has loaded asyncio can have raised it; another thread may be loading it just now.
    kind = getattr(sys.modules.get("asyncio"), "CancelledError", None)
    return kind is not None and isinstance(exc, kind)
