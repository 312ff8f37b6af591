"""Exceptions across the wire: data first, the exception object where it can be rebuilt.

An exception is described by a list, itself first, then its causes; each entry is a
mapping with ``kind``, ``message``, ``notes``, ``link`` (how the entry before hangs on it:
``"cause"`` or ``"context"``) and, where the object can be carried, ``value``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import (
    EnvironmentExecutionError,
    RemoteTraceback,
    WorkerLostError,
    raised_by_code,
    safe_text,
)
from wove.wire import decode_value, encode_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeGuard

    from typing_extensions import Buffer

#: How many causes of an exception travel with it.
MAX_CHAIN = 8


def encode_exception(
    exc: BaseException, attachments: list[Buffer], *, plain: bool = False
) -> list[dict[str, Any]]:
    """Describe ``exc`` and its causes. Raises nothing that a hostile exception raises.

    Args:
        exc: the exception.
        attachments: those of its message so far.
        plain: describe it by data alone; else its object goes along where it can.
    """
    chain: list[dict[str, Any]] = []
    seen: set[int] = set()
    link = ""
    current: BaseException | None = exc
    while current is not None and id(current) not in seen and len(chain) < MAX_CHAIN:
        seen.add(id(current))
        entry: dict[str, Any] = {
            "kind": type(current).__name__,
            "message": safe_text(current),
            "notes": [safe_text(note, 2_000) for note in _notes(current)[:8]],
            "link": link,
        }
        value = None if plain else _encode_object(current, attachments)
        if value is not None:
            entry["value"] = value
        chain.append(entry)
        current, link = _next_in_chain(current)
    return chain


def _notes(exc: BaseException) -> list[Any]:
    try:
        notes = getattr(exc, "__notes__", None)
    except Exception as failure:
        if not raised_by_code(failure):
            raise
        notes = None  # a class whose __getattr__ fails
    return list(notes) if isinstance(notes, (list, tuple)) else []


def _next_in_chain(exc: BaseException) -> tuple[BaseException | None, str]:
    if exc.__cause__ is not None:
        return exc.__cause__, "cause"
    if exc.__context__ is not None and not exc.__suppress_context__:
        return exc.__context__, "context"
    return None, ""


def _encode_object(exc: BaseException, attachments: list[Buffer]) -> list[Any] | None:
    """Append the exception object in a form that was seen to come back, or return None.

    Only ``Exception``s are carried: a ``SystemExit`` rebuilt in the submitter would end it.
    """
    if not isinstance(exc, Exception):
        return None
    for by_parts in (False, True):
        trial: list[Buffer] = []
        try:
            form = (type(exc), exc.args, exc.__dict__) if by_parts else exc
            descriptor = encode_value(form, trial)
            views = [memoryview(part) for part in trial]
            back = _rebuild(decode_value(descriptor, views))
        except BaseException as failure:
            if not raised_by_code(failure):
                raise
            continue  # the next form, or the text, stands for it
        # An exception that pickles as something else would change its type silently.
        if type(back) is type(exc) and len(attachments) + len(trial) <= 32:
            codec, first, count = descriptor
            descriptor = [codec, first + len(attachments), count]
            attachments.extend(trial)
            return descriptor
    return None


def _rebuild(value: Any) -> BaseException | None:
    if isinstance(value, BaseException):
        return value
    if type(value) is not tuple or len(value) != 3:
        return None
    # Exceptions whose constructor wants other arguments than it keeps in ``args`` cannot
    # be unpickled; made without their constructor they keep type, args and attributes.
    cls, args, state = value
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        return None
    exc: Exception = cls.__new__(cls, *args)
    exc.args = args
    exc.__dict__.update(state)
    return exc


def decode_exception(chain: Any, attachments: Sequence[memoryview]) -> Exception | None:
    """Rebuild the exception that :func:`encode_exception` described (verified bytes only).

    Returns:
        The exception with its causes attached, or None where its own type cannot be rebuilt.
    """
    if type(chain) is not list or not chain:
        return None
    head = _decode_entry(chain[0], attachments)
    if not _raisable(head):
        return None
    earlier: BaseException = head
    for entry in chain[1:MAX_CHAIN]:
        if type(entry) is not dict:
            break
        later = _decode_entry(entry, attachments)
        try:
            if entry.get("link") == "cause":
                earlier.__cause__ = later
            else:
                earlier.__context__ = later
        except Exception:
            break  # an exception that lets nothing be set on it
        earlier = later
    return head


def _raisable(exc: BaseException | None) -> TypeGuard[Exception]:
    # Python itself gives these another meaning when they leave a coroutine.
    return (
        isinstance(exc, Exception)
        and type(exc) is not _Unrebuilt
        and not isinstance(exc, (StopIteration, StopAsyncIteration))
    )


class _Unrebuilt(EnvironmentExecutionError):
    """Stands for an entry whose object did not travel."""


def _decode_entry(entry: Any, attachments: Sequence[memoryview]) -> BaseException:
    if type(entry) is not dict:
        return _Unrebuilt({"kind": "Error", "message": "malformed exception"})
    exc: BaseException | None = None
    if "value" in entry:
        try:
            exc = _rebuild(decode_value(entry["value"], attachments))
        except BaseException as failure:
            if not raised_by_code(failure):
                raise
            # Its class does not exist here, or unpickling it exits: the text stands for it.
            exc = None
    if exc is None:
        return _Unrebuilt({"kind": safe_text(entry.get("kind")), "message": safe_text(entry.get("message"))})
    return exc


def error_from_frame(frame: Mapping[str, Any], *, where: str = "") -> Exception:
    """Build the exception that the waiter of a failed run gets.

    Args:
        frame: a ``task_error`` event; its ``exception``, when present, is the rebuilt object.
        where: the sentence that names worker, backend job and attempt.

    Returns:
        The remote exception itself with the remote traceback as the end of its causes,
        or an :class:`EnvironmentExecutionError` (:class:`WorkerLostError`) with the data.
    """
    error = frame["error"]
    exc = frame.get("exception")
    if _raisable(exc):
        try:
            return _explained(exc, error, where)
        except Exception:  # noqa: S110 - one that lets nothing be set on it: the data stands for it
            pass
    lost = error.get("kind") == WorkerLostError.__name__ and error.get("source") == "backend"
    return _explained(WorkerLostError(error) if lost else EnvironmentExecutionError(error), error, where)


def _explained(exc: Exception, error: Mapping[str, Any], where: str) -> Exception:
    text = error.get("traceback")
    if isinstance(text, str) and text and exc.__traceback__ is None:
        last: BaseException = exc
        for _ in range(MAX_CHAIN):
            if last.__cause__ is None:
                break
            last = last.__cause__
        if not isinstance(last, RemoteTraceback):
            context = last.__context__
            last.__cause__ = RemoteTraceback(text)
            last.__context__ = context
    if where:
        exc.add_note(where)
    return exc
