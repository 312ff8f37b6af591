"""The frame vocabulary: what the submitter and a worker say to each other.

A frame is a dictionary with a ``type``. Commands go to an executor, events come back.

Commands:
    ``run_task``: ``run_id``, ``task_id``, ``callable``, ``args`` (mapping of keyword
    arguments), ``positional`` (tuple, only where there are any), ``delivery`` (mapping);
    ``shared`` only for executors that take it (see ``wove/shared_parts.py``).
    ``cancel_task``: ``run_id``, ``task_id``, ``delivery``.
    ``shutdown``: nothing else.
Events, each with ``run_id``, ``task_id``, ``attempt`` (from 1) and ``seq`` (from 1):
    ``task_started``, ``heartbeat``, ``progress`` (``fraction``, ``message``), ``log``
    (``message``), ``task_retry`` (``error``: the backend itself runs the payload again, later),
    ``task_result`` (``result``), ``task_error`` (``error``, optional ``exception``),
    ``task_cancelled``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

Frame = dict[str, Any]

RUN_TASK = "run_task"
CANCEL_TASK = "cancel_task"
SHUTDOWN = "shutdown"

TASK_STARTED = "task_started"
HEARTBEAT = "heartbeat"
PROGRESS = "progress"
LOG = "log"
TASK_RETRY = "task_retry"
#: Within the executor: a worker has not begun the run, and gives it back to be submitted again.
TASK_RETURNED = "task_returned"
TASK_RESULT = "task_result"
TASK_ERROR = "task_error"
TASK_CANCELLED = "task_cancelled"

#: Exactly one of these ends a run.
TERMINAL = frozenset({TASK_RESULT, TASK_ERROR, TASK_CANCELLED})
EVENTS = TERMINAL | {TASK_STARTED, HEARTBEAT, PROGRESS, LOG, TASK_RETRY}

#: A run id is 32 hexadecimal characters: valid as a Celery task id, an RQ job id, a part of a URL.
RUN_ID_LENGTH = 32
_HEX = "0123456789abcdef"


def is_run_id(value: object) -> bool:
    """Tell whether ``value`` has the form of a run id."""
    # Nothing is left where every character is one of them.
    return isinstance(value, str) and len(value) == RUN_ID_LENGTH and not value.strip(_HEX)


def event(kind: str, run_id: str, task_id: str, attempt: int, seq: int, **fields: Any) -> Frame:
    """Build an event frame."""
    return {"type": kind, "run_id": run_id, "task_id": task_id, "attempt": attempt, "seq": seq, **fields}


def check_event(frame: Any) -> bool:
    """Check the form of an event.

    Returns:
        True for an event of this vocabulary, False for a type that is unknown here
        (a newer peer's: to be counted and ignored).

    Raises:
        ProtocolError: the frame is malformed; the message names the field.
    """
    if type(frame) is not dict:
        raise ProtocolError(f"a frame is a mapping, not {type(frame).__name__}")
    kind = frame.get("type")
    if type(kind) is not str:
        raise ProtocolError("a frame's type is a string")
    if not is_run_id(frame.get("run_id")):
        raise ProtocolError(f"{kind[:40]}: run_id is not 32 hexadecimal characters")
    _check_whole(frame, "attempt")
    _check_whole(frame, "seq")
    if kind not in EVENTS:
        return False
    _check_fields(kind, frame)
    return True


def is_whole_result(frame: Any) -> bool:
    """Tell whether this is a ``task_result`` with all that it needs; its run need not be known."""
    if type(frame) is not dict or frame.get("type") != TASK_RESULT or "result" not in frame:
        return False
    attempt, seq = frame.get("attempt"), frame.get("seq")
    whole = type(attempt) is int and type(seq) is int and 0 < attempt < 2**53 and 0 < seq < 2**53
    return whole and type(frame.get("run_id")) is str


def _check_whole(frame: Mapping[str, Any], key: str) -> None:
    value = frame.get(key)
    if type(value) is not int or not 0 < value < 2**53:
        raise ProtocolError(f"{frame['type'][:40]}: {key} is not a whole number from 1")


def _check_fields(kind: str, frame: Mapping[str, Any]) -> None:
    if kind == TASK_RESULT and "result" not in frame:
        raise ProtocolError("task_result: the result is missing")
    if kind in (TASK_ERROR, TASK_RETRY):
        error = frame.get("error")
        if type(error) is not dict or type(error.get("kind")) is not str:
            raise ProtocolError(f"{kind}: error is not a mapping with a kind")
    if kind == PROGRESS:
        fraction = frame.get("fraction")
        if fraction is not None and (type(fraction) not in (int, float) or not 0 <= fraction <= 1):
            raise ProtocolError("progress: fraction is not a number from 0 to 1")
    if kind in (PROGRESS, LOG) and not isinstance(frame.get("message", ""), str):
        raise ProtocolError(f"{kind}: message is not a string")
