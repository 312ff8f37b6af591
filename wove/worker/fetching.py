"""Bytes that a payload names by their digest, and the callback server has."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

from wove.buffers import room
from wove.errors import ProtocolError
from wove.worker.connection import request
from wove.worker.offering import offer, patience

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.worker.assignment import Assignment


class NotWanted(Exception):
    """The callback server knows of the run no more: it was cancelled, or has ended."""


class FetchFailed(ConnectionError):
    """The callback server did not answer for as long as the run was worth: nothing of it ran."""


def claimed(claim: Any, what: str) -> tuple[int, bytes]:
    """Return size and digest as a payload claims them.

    Raises:
        ProtocolError: it claims something else.
    """
    if type(claim) is list and len(claim) == 2 and type(claim[0]) is int and type(claim[1]) is bytes:
        return claim[0], claim[1]
    raise ProtocolError(f"malformed payload: {what}")


def fetch(
    task: Assignment,
    kind: str,
    tag: bytes,
    size: int,
    digest: bytes,
    room: Callable[[int], memoryview] = room,
) -> memoryview:
    """Return bytes of the callback server, verified.

    Args:
        task: the run that they are for.
        kind: ``payloads`` or ``parts``.
        tag: what signs the request.
        size: how many there are.
        digest: their SHA-256, as the run's payload has it.
        room: where they go, if they are many.

    Raises:
        NotWanted: they are not to be had any more.
        FetchFailed: the callback server did not hand them out.
        ProtocolError: they are others.
    """
    headers = {"Wove-Key": task.kid, "Wove-Signature": tag.hex()}
    path = f"{task.path}/wove/v1/{kind}/{task.run_id}"
    reply = offer(
        lambda: request(
            task.origin, "GET", path, headers, timeout=30.0, max_reply=size, hasher=hashlib.sha256, room=room
        ),
        task,
        patience(task, time.monotonic(), cancelled=False),
        "the arguments",
    )
    if reply is None:
        raise FetchFailed(f"the callback server at {task.origin} did not hand out the run's arguments")
    if reply.status == 410:
        raise NotWanted
    # Hashed while it came in; what was too short for that is hashed now.
    found = reply.digest if reply.digest is not None else hashlib.sha256(reply.body).digest()
    if found != digest:
        raise ProtocolError("the run's arguments changed while they were sent: do not modify them meanwhile")
    return memoryview(reply.body)
