"""The futures of a map's calls, and the ids of runs."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from wove.frames import is_run_id
from wove.run_ids import new_run_id
from wove.waiter import Call


def test_a_result_is_handed_out_at_once() -> None:
    seen: list[Any] = []
    call = Call()
    call.add_done_callback(seen.append)
    call.set_result(3)
    assert seen == [call]
    assert (call.done(), call.cancelled(), call.result(), call.exception()) == (True, False, 3, None)


def test_who_comes_late_is_called_at_once() -> None:
    seen: list[Any] = []
    call = Call()
    call.set_exception(ValueError("no"))
    call.add_done_callback(seen.append)
    assert seen == [call]
    with pytest.raises(ValueError, match="no"):
        call.result()


def test_cancelling_cancels_the_run_once() -> None:
    told: list[str] = []
    call = Call(lambda: told.append("cancelled"))
    assert call.cancel()
    assert not call.cancel()
    assert told == ["cancelled"]
    with pytest.raises(asyncio.CancelledError):
        call.result()


def test_what_has_ended_is_not_cancelled() -> None:
    told: list[str] = []
    call = Call(lambda: told.append("cancelled"))
    call.set_result(None)
    assert not call.cancel()
    assert told == []


def test_ids_are_new_each_time() -> None:
    ids = [new_run_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert all(map(is_run_id, ids))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_does_not_hand_out_its_parents_ids() -> None:
    new_run_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, new_run_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    theirs = os.read(reader, 100).decode()
    os.close(reader)
    assert is_run_id(theirs)
    assert theirs not in {new_run_id() for _ in range(600)}
