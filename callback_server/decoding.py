"""Verified bytes become frames; only here does the callback server decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from wove import frames
from wove.errors import ProtocolError, normalize_exception
from wove.exchange import decode_result
from wove.no_pickle import decode_plain
from wove.plain_data import from_tagged
from wove.remote_errors import decode_exception
from wove.security import event_tag, same
from wove.tables import CANCELLED, ERROR, RETURNED, unpack_table
from wove.wire import decode_value, unpack_json, unpack_message, unpark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from wove.callback_server.batches import OpenBatch
    from wove.callback_server.runs import OpenRun
    from wove.frames import Frame
    from wove.tables import Row

JSON = "application/json"
MSGPACK = "application/msgpack"

#: Longest name of an execution, in characters.
MAX_EXECUTION = 64

_PLAIN_ONLY = 'the environment has "pickle": False and takes'


def decode_batch(body: Buffer, codec: str, run_id: str, *, final: bool, plain: bool = False) -> list[Frame]:
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


class BatchNews(NamedTuple):
    """What a worker says of a batch in one request.

    Attributes:
        frames: events of the batch itself, or of one member; an outcome of the batch is that of all members.
        outcomes: one frame for each member that has ended.
        returned: ids of members that the worker gives back.
        heard: how many withdrawals it has heard of.
        timing: its slot, how many members it has executed since it last said so, and in how many seconds.
        execution: the name of its execution.
        worker: what it says of itself.
    """

    frames: list[Frame]
    outcomes: list[Frame]
    returned: list[str]
    heard: int
    timing: tuple[str, int, float] | None
    execution: str
    worker: dict[str, Any]


def decode_news(body: Buffer, codec: str, batch: OpenBatch, *, final: bool) -> BatchNews:
    """Decode the body of an events request of a batch whose signature was verified.

    Raises:
        ProtocolError: the body is malformed.
    """
    if codec != MSGPACK:
        raise ProtocolError(f"news of a batch are {MSGPACK}")
    envelope, attachments = unpack_message(body)
    has_table = envelope.get("outcomes") is True
    spoken = _frames_of(envelope)
    for index, frame in enumerate(spoken):
        if "exception" in frame:
            described = frame.pop("exception")
            if not batch.plain and not has_table:
                frame["exception"] = decode_exception(described, attachments)
        frames.check_event(frame)
        whole = frame["run_id"] == batch.run_id
        if not whole and frame["run_id"] not in batch.run_ids:
            raise ProtocolError("a frame names a run of another batch than the request")
        if frame["type"] in frames.TERMINAL and not (whole and final and index == len(spoken) - 1):
            raise ProtocolError("an outcome of a batch is the last frame of a request marked Wove-Final: 1")
    rows = _rows(attachments, final) if has_table else []
    outcomes, returned = _decode_outcomes(rows, envelope, batch)
    heard = envelope.get("heard", 0)
    if type(heard) is not int or heard < 0:
        raise ProtocolError("heard is a whole number")
    execution, worker = envelope.get("execution"), envelope.get("worker")
    return BatchNews(
        spoken,
        outcomes,
        returned,
        heard,
        _timing(envelope.get("timing")),
        execution if type(execution) is str and len(execution) <= MAX_EXECUTION else "",
        worker if type(worker) is dict else {},
    )


def _rows(attachments: list[memoryview], final: bool) -> list[Row]:
    if not final or len(attachments) != 1:
        raise ProtocolError("outcomes of a batch are one attachment of a request marked Wove-Final: 1")
    return unpack_table(attachments[0], int)


def _timing(value: Any) -> tuple[str, int, float] | None:
    if value is None:
        return None
    if type(value) is list and [type(part) for part in value] == [str, int, float]:
        slot, count, seconds = value
        if count > 0 and 0 <= seconds < 1e9:
            return slot, count, seconds
    raise ProtocolError("timing is [slot, count, seconds]")


def _decode_outcomes(
    rows: list[Row], envelope: dict[str, Any], batch: OpenBatch
) -> tuple[list[Frame], list[str]]:
    common = {"type": frames.TASK_RESULT, "task_id": batch.task_id, "attempt": 1, "seq": 2**31}
    for key, kind in (("worker", dict), ("execution", str)):
        if type(envelope.get(key)) is kind:
            common[key] = envelope[key]
    outcomes, returned = [], []
    for place, codec, data in rows:
        if not 0 <= place < len(batch.run_ids):
            raise ProtocolError("an outcome names a place that the batch does not have")
        run_id = batch.run_ids[place]
        if run_id not in batch.pending:
            continue  # it has ended, or goes its own way: nothing of this is looked at
        frame = {**common, "run_id": run_id}
        if codec == RETURNED:
            returned.append(run_id)
        elif codec == CANCELLED:
            outcomes.append({**frame, "type": frames.TASK_CANCELLED})
        elif codec == ERROR:
            outcomes.append(_decode_error(frame, data, plain=batch.plain))
        else:
            frame["result"] = [codec, 0, 1]
            _decode_member(frame, data, batch.plain)
            outcomes.append(frame)
    return outcomes, returned


def _decode_member(frame: Frame, data: bytes, plain: bool) -> None:
    try:
        decode_result(frame, [memoryview(data)], _plain_value if plain else decode_value)
    except Exception as exc:
        # Malformed, or a pickle where none is taken: its own run's error, and nobody else's.
        frame.pop("result", None)
        frame.update(type=frames.TASK_ERROR, error=normalize_exception(exc, source="worker"))


def _decode_error(frame: Frame, data: bytes, *, plain: bool) -> Frame:
    try:
        described, attachments = unpack_message(data)
        error = described.get("error")
        if type(error) is not dict or type(error.get("kind")) is not str:
            raise ProtocolError("error is not a mapping with a kind")
    except ProtocolError as exc:
        return {**frame, "type": frames.TASK_ERROR, "error": normalize_exception(exc, source="worker")}
    frame = {**frame, "type": frames.TASK_ERROR, "error": error}
    if not plain and "exception" in described:
        frame["exception"] = decode_exception(described["exception"], attachments)
    return frame


def open_parked(run: OpenRun, blob: bytes) -> list[Frame]:
    """Verify and decode an outcome that a worker has left with the backend.

    Args:
        run: the run it is said to be of.
        blob: as :func:`wove.wire.park` makes it.

    Raises:
        ProtocolError: it is not signed with the run's key, or malformed.
    """
    return decode_batch(_verified(run, blob), MSGPACK, run.run_id, final=True, plain=run.plain)


def open_parked_news(batch: OpenBatch, blob: bytes) -> BatchNews:
    """Verify and decode outcomes of a batch that a worker has left with the backend; as :func:`open_parked`."""
    return decode_news(_verified(batch, blob), MSGPACK, batch, final=True)


def _verified(run: OpenRun, blob: bytes) -> bytearray:
    kid, tag, body = unpark(blob)
    key = run.key(kid)
    if key is None or not same(event_tag(key, run.run_id, MSGPACK, True, [body]), tag):
        raise ProtocolError(f"the outcome that was parked for run {run.run_id} is not signed with its key")
    return bytearray(body)


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


def _decode_msgpack(body: Buffer, plain: bool) -> list[Frame]:
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


def _decode_json(body: Buffer) -> list[Frame]:
    batch = _frames_of(unpack_json(body))
    for frame in batch:
        frame.pop("exception", None)  # objects need a pickle, which JSON peers do not send
        if "result" in frame:
            frame["result"] = from_tagged(frame["result"])
    return batch
