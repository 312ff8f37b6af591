"""A batch at the listener: what is said of it, and of its members, and what is left of it."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from wove_tests.callbacks import Sink

from wove import frames
from wove.callback_server.batches import OpenBatch
from wove.callback_server.run_table import OpenRuns
from wove.errors import lost
from wove.security import find_secrets

Table = OpenRuns


@pytest.fixture
def runs() -> OpenRuns:
    return OpenRuns()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def batch(runs: OpenRuns, sink: Sink) -> OpenBatch:
    opened = OpenBatch(
        run_ids=[secrets.token_hex(16) for _ in range(4)],
        on_timing=lambda *_: None,
        run_id=secrets.token_hex(16),
        task_id="tests.task",
        environment="tests",
        ring=find_secrets("s" * 32),
        nonce=secrets.token_bytes(16),
        sink=sink,
        max_body=1_000,
    )
    runs.add_batch(opened)
    return opened


def test_what_is_said_of_it_is_said_of_each_member(batch: OpenBatch, runs: OpenRuns, sink: Sink) -> None:
    runs.close_member(batch, batch.run_ids[1])
    batch.sink([batch.event(frames.HEARTBEAT)])
    assert [frame["run_id"] for frame in sink.frames] == [batch.run_ids[i] for i in (0, 2, 3)]


def test_a_loss_names_the_worker_that_had_it(batch: OpenBatch, sink: Sink) -> None:
    batch.last_worker = {"host": "there", "pid": 7}
    batch.forsake()
    batch.sink([batch.event(frames.TASK_ERROR, error=lost("signal 9"))])
    kinds = sink.kinds(batch.run_ids[0])
    assert kinds == [frames.TASK_STARTED, frames.TASK_ERROR]
    assert sink.of(batch.run_ids[0])[0]["worker"] == {"host": "there", "pid": 7}


def test_nothing_is_left_when_all_members_have_ended(batch: OpenBatch, runs: OpenRuns) -> None:
    assert all(runs.close_member(batch, run_id) for run_id in batch.run_ids)
    assert len(runs) == 0
    assert batch.closed
    assert all(runs.has_ended(run_id) for run_id in (*batch.run_ids, batch.run_id))


def test_a_member_ends_once(batch: OpenBatch, runs: OpenRuns) -> None:
    assert runs.close_member(batch, batch.run_ids[0])
    assert not runs.close_member(batch, batch.run_ids[0])
    assert runs.get(batch.run_ids[0]) is None


def test_closing_it_closes_its_members(batch: OpenBatch, runs: OpenRuns) -> None:
    member = runs.get(batch.run_ids[0])
    runs.close(batch.run_id)
    assert len(runs) == 0
    assert member is not None
    assert member.closed


def test_a_member_alone_is_the_same_each_time_and_shares_the_executions(
    batch: OpenBatch, runs: OpenRuns
) -> None:
    member = runs.get(batch.run_ids[2])
    assert member is not None
    assert member is runs.get(batch.run_ids[2])
    assert not member.started
    batch.execution("it", 1)
    assert member.started
    member.forsake()
    assert batch.started  # the others are still there
    assert not member.started


def test_a_member_has_the_key_of_its_own_id(batch: OpenBatch, runs: OpenRuns) -> None:
    keys = {runs.get(run_id).key(batch.ring.primary.kid) for run_id in (*batch.run_ids, batch.run_id)}
    assert len(keys) == 5
    assert None not in keys


def test_a_cancelled_member_is_withdrawn_and_stays_until_its_worker_says_so(
    batch: OpenBatch, runs: OpenRuns
) -> None:
    runs.cancel(batch.run_ids[3])
    runs.cancel(batch.run_ids[3])
    assert batch.withdrawn == [3]
    assert batch.run_ids[3] in batch.pending
    runs.close(batch.run_ids[3])
    assert batch.withdrawn == [3]
    assert batch.run_ids[3] not in batch.pending


def test_one_that_is_submitted_again_goes_its_own_way(batch: OpenBatch, runs: OpenRuns, sink: Sink) -> None:
    member: Any = runs.get(batch.run_ids[1])
    batch.execution("it", 1)
    member.renew(2, None)
    assert runs.get(batch.run_ids[1]) is member
    assert runs.batch_of(batch.run_ids[1]) is None
    assert batch.withdrawn == [1]
    assert not member.started
    batch.sink([batch.event(frames.TASK_ERROR, error=lost("signal 9"))])
    assert sink.of(batch.run_ids[1]) == []
    runs.close(batch.run_id)
    assert len(runs) == 1
