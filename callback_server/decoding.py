"""Verified bytes become frames; only here does the callback server decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import ProtocolError
from wove.exchange import decode_result
from wove.no_pickle import decode_plain
from wove.plain_data import from_tagged
from wove.remote_errors import decode_exception
from wove.security import event_tag, same
from wove.wire import decode_value, unpack_json, unpack_message, unpark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wove.callback_server.runs import OpenRun
    from wove.frames import Frame

JSON = "application/json"
MSGPACK = "application/msgpack"

#: Longest name of an execution, in characters.
MAX_EXECUTION = 64

_PLAIN_ONLY = 'the environment has "pickle": False and takes'


def decode_batch(
    body: bytearray, codec: str, run_id: str, *, final: bool, plain: bool = False
) -> list[Frame]:
    """Decode the body of an events request whose signature was verified.

    Args:
        body: the request's body.
        codec: its content type.
        run_id: the run that every frame has to name.
        final: whether the last frame has to be an outcome.
        plain: whether nothing may be unpickled, although it is signed.

    Returns:
        At least one checked frame; unknown types are among them.

    Raises:
        ProtocolError: the body is malformed.
    """
    if codec == JSON:
        batch = _decode_json(body)
    elif codec == MSGPACK:
        batch = _decode_msgpack(body, plain)
    else:
        raise ProtocolError(f"a body is {MSGPACK} or {JSON}")
    _check_batch(run_id, batch, final)
    return batch


def open_parked(run: OpenRun, blob: bytes) -> list[Frame]:
    """Verify and decode an outcome that a worker has left with the backend.

    Args:
        run: the run it is said to be of.
        blob: as :func:`wove.wire.park` makes it.

    Raises:
        ProtocolError: it is not signed with the run's key, or malformed.
    """
    kid, tag, body = unpark(blob)
    key = run.key(kid)
    if key is None or not same(event_tag(key, run.run_id, MSGPACK, True, [body]), tag):
        raise ProtocolError(f"the outcome that was parked for run {run.run_id} is not signed with its key")
    return decode_batch(bytearray(body), MSGPACK, run.run_id, final=True, plain=run.plain)


def _check_batch(run_id: str, batch: list[Frame], final: bool) -> None:
    for index, frame in enumerate(batch):
        frames.check_event(frame)
        if frame["run_id"] != run_id:
            raise ProtocolError("a frame names another run than the request")
        terminal = frame["type"] in frames.TERMINAL
        if terminal and not (final and index == len(batch) - 1):
            raise ProtocolError("an outcome is the last frame of a request marked Wove-Final: 1")
    if final and (not batch or batch[-1]["type"] not in frames.TERMINAL):
        raise ProtocolError("a request marked Wove-Final: 1 ends with an outcome")
    if not batch:
        raise ProtocolError("no frames")


def _frames_of(message: dict[str, Any]) -> list[Frame]:
    batch = message.get("frames")
    if type(batch) is not list or not all(type(frame) is dict for frame in batch):
        raise ProtocolError("frames is a list of mappings")
    worker = message.get("worker")
    execution = message.get("execution")
    for frame in batch:
        # By whom it was sent is said once per request, and not by a frame itself.
        frame.pop("execution", None)
        if type(worker) is dict:
            frame["worker"] = worker
        if type(execution) is str and len(execution) <= MAX_EXECUTION:
            frame["execution"] = execution
    return batch


def _decode_msgpack(body: bytearray, plain: bool) -> list[Frame]:
    envelope, attachments = unpack_message(body)
    batch = _frames_of(envelope)
    for frame in batch:
        if "result" in frame:
            decode_result(frame, attachments, _plain_value if plain else decode_value)
        if plain:
            frame.pop("exception", None)  # its text stands in the error
        elif "exception" in frame:
            frame["exception"] = decode_exception(frame["exception"], attachments)
    return batch


def _plain_value(described: Any, attachments: Sequence[memoryview]) -> Any:
    return decode_plain(described, attachments, "a pickle was sent", _PLAIN_ONLY)


def _decode_json(body: bytearray) -> list[Frame]:
    batch = _frames_of(unpack_json(body))
    for frame in batch:
        frame.pop("exception", None)  # objects need a pickle, which JSON peers do not send
        if "result" in frame:
            frame["result"] = from_tagged(frame["result"])
    return batch
