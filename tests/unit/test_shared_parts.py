"""The function of a ``map`` is encoded once; a large one is a part that payloads name by its digest."""

from __future__ import annotations

import hashlib
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wove_tests import tasks

from wove import EncodeError, frames
from wove.backend import build_payload
from wove.security import find_secrets, open_payload
from wove.shared_parts import FETCH_FROM, SharedCallable, as_part, size_of
from wove.wire import decode_callable, decode_value, unpack_message

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from wove.backend import BuiltPayload
    from wove.frames import Frame


class Counted:
    """Counts how often it is pickled."""

    def __init__(self) -> None:
        self.pickled = 0

    def __call__(self, number: int) -> int:
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        self.pickled += 1
        return partial, (tasks.double,)


def frame_of(shared: SharedCallable, func: Any, *args: Any, **delivery: Any) -> Frame:
    return {
        "type": frames.RUN_TASK,
        "run_id": secrets.token_hex(16),
        "task_id": "tests.task",
        "callable": func,
        "positional": args,
        "args": {},
        "delivery": {"attempt": 1, **delivery},
        "shared": shared,
    }


def build(frame: Frame, **changes: Any) -> BuiltPayload:
    return build_payload(
        frame, environment="tests", ring=find_secrets(), callback_url="http://127.0.0.1:1", **changes
    )


def opened(blob: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    return unpack_message(open_payload(find_secrets(), blob)[2])


def joined(message: list[Buffer]) -> bytearray:
    return bytearray(b"".join(message))


def test_by_name_nothing_is_shared() -> None:
    shared = SharedCallable(tasks.double)
    attachments: list[Buffer] = []
    assert shared.describe(attachments) == "wove_tests.tasks:double"
    assert attachments == []
    assert shared.part() is None


def test_a_small_one_is_encoded_once_and_goes_with_every_payload() -> None:
    func = Counted()
    shared = SharedCallable(func)
    for number in range(3):
        built = build(frame_of(shared, func, number))
        assert built.part is None
        envelope, attachments = opened(built.blob)
        assert decode_callable(envelope["callable"], attachments)(number) == 2 * number
        assert decode_value(envelope["args"], attachments) == [[number], {}]
    assert func.pickled == 1


def test_it_finds_its_place_behind_other_attachments() -> None:
    attachments: list[Buffer] = [b"x", b"y"]
    described = SharedCallable(partial(tasks.echo, 5)).describe(attachments)
    assert decode_callable(described, [memoryview(part) for part in attachments])() == 5


def test_a_large_one_is_a_part() -> None:
    array = np.arange(FETCH_FROM, dtype=np.float64)
    func = partial(tasks.join, weights=array)
    shared = SharedCallable(func)
    builds = [build(frame_of(shared, func, number)) for number in range(2)]
    part = builds[0].part
    assert part is not None
    assert builds[1].part is part
    assert any(np.shares_memory(np.asarray(piece), array) for piece in part.message), "it is not copied"
    assert part.size == size_of(part.message) == len(joined(part.message))
    assert part.digest == hashlib.sha256(joined(part.message)).digest()
    for number, built in enumerate(builds):
        assert len(built.blob) < 2_000
        assert built.message is None
        envelope, attachments = opened(built.blob)
        assert "callable" not in envelope
        assert envelope["part"] == [part.size, part.digest]
        assert decode_value(envelope["args"], attachments) == [[number], {}]
    envelope, attachments = unpack_message(joined(part.message))
    (_, keywords) = decode_callable(envelope["callable"], attachments)()
    assert np.array_equal(keywords["weights"], array)


def test_beside_a_large_argument() -> None:
    func = partial(tasks.join, secrets.token_bytes(FETCH_FROM))
    built = build(frame_of(SharedCallable(func), func, b"x" * FETCH_FROM))
    assert built.part is not None
    assert built.message is not None
    envelope, _ = opened(built.blob)
    assert "part" not in envelope
    envelope, attachments = unpack_message(joined(built.message))
    assert envelope["part"] == built.part.claim
    assert decode_value(envelope["args"], attachments) == [[b"x" * FETCH_FROM], {}]


def test_work_that_may_outlive_its_submitter_has_it_with_it() -> None:
    data = secrets.token_bytes(FETCH_FROM)
    func = partial(tasks.echo, data)
    built = build(frame_of(SharedCallable(func), func, keep=True))
    assert built.part is None
    assert built.message is None
    envelope, attachments = opened(built.blob)
    assert decode_callable(envelope["callable"], attachments)() == data


def test_in_no_pickle_mode_functions_go_by_name() -> None:
    func = partial(tasks.echo, secrets.token_bytes(FETCH_FROM))
    shared = SharedCallable(func)
    with pytest.raises(EncodeError, match="functions go by name only here"):
        build(frame_of(shared, func), plain=True)
    built = build(frame_of(SharedCallable(tasks.double), tasks.double, 1), plain=True)
    assert opened(built.blob)[0]["callable"] == "wove_tests.tasks:double"


def test_what_cannot_be_sent_is_an_error_of_every_run() -> None:
    func = partial(tasks.echo, (number for number in range(3)))
    shared = SharedCallable(func)
    for _ in range(2):
        with pytest.raises(EncodeError, match="generator"):
            build(frame_of(shared, func))


def test_a_part_of_several_pieces() -> None:
    part = as_part([b"ab", bytearray(b"c"), memoryview(b"def")])
    assert part.claim == [6, hashlib.sha256(b"abcdef").digest()]
