"""What the runs of one ``map`` share crosses the network once for each worker process."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import weakref
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wove_tests import callbacks, tasks
from wove_tests.callbacks import Payload, Sink, open_run
from wove_tests.proxy import TcpProxy
from wove_tests.waiting import until

from wove import ExecutorRuntime, WorkerLostError, frames
from wove.demo.processes import free_port
from wove.errors import PayloadRejectedError, ProtocolError
from wove.shared_parts import SharedCallable
from wove.worker import parts
from wove.worker.execution import run as run_payload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from wove_tests.fleets import Fleets

    from wove.callback_server.hub import Lease
    from wove.handle import EnvironmentHandle
    from wove.shared_parts import Part

MEBIBYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """The memory adapter's workers are in this process: their cache too."""
    yield
    parts.cache().clear()


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    """The way from workers to the callback server; it counts."""
    with TcpProxy("127.0.0.1", free_port()) as weather:
        yield weather


@pytest.fixture
async def fleet(proxy: TcpProxy) -> AsyncIterator[EnvironmentHandle]:
    """Workers in threads of this process, which call back by way of the proxy."""
    async with ExecutorRuntime({"here": here(proxy)}) as runtime:
        yield runtime["here"]
        proxy.up()


def here(proxy: TcpProxy, **changes: Any) -> dict[str, Any]:
    url = {"callback_port": proxy.upstream_port, "callback_url": f"http://127.0.0.1:{proxy.port}"}
    return {
        "executor": "memory",
        "executor_config": {"threads": 4, **url},
        "delivery_timeout": 60,
        **changes,
    }


def open_runs(handle: EnvironmentHandle) -> list[Any]:
    executor: Any = handle._dispatcher.executor
    found: list[Any] = executor._lease.open_runs()
    return found


def cached() -> int:
    return parts.cache().bytes


@pytest.mark.redis
async def test_a_thousand_runs_move_it_once_for_each_process(fleets: Fleets, proxy: TcpProxy) -> None:
    url = {"callback_port": proxy.upstream_port, "callback_url": f"http://127.0.0.1:{proxy.port}"}
    definition = fleets.executor_definition("celery-redis-prefork", executor_config=url, delivery_timeout=110)
    model = np.frombuffer(secrets.token_bytes(8 * MEBIBYTE), dtype=np.uint8)
    expected = [int(model[row]) for row in range(1_000)]
    async with ExecutorRuntime({"fleet": definition}) as runtime:
        handle = runtime["fleet"]
        found = [value async for value in handle.map(partial(tasks.look_up, model), range(1_000))]
        assert [value for value, _ in found] == expected
        processes = len({pid for _, pid in found})
        assert processes <= 2
        # Everything else that came back to a thousand runs is small.
        assert proxy.passed["response"] < processes * model.nbytes + MEBIBYTE
        assert open_runs(handle) == []


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("size", [1, MEBIBYTE])
async def test_every_run_has_objects_of_its_own(batch: int, size: int, proxy: TcpProxy) -> None:
    counts = np.zeros(size, dtype=np.int64)
    definition = here(proxy)
    definition["executor_config"]["batch"] = batch
    async with ExecutorRuntime({"here": definition}) as runtime:
        results = [n async for n in runtime["here"].map(partial(tasks.count_in, counts), range(40))]
    assert results == [1] * 40, "one run saw what another had changed"
    assert not counts.any()
    assert proxy.passed["response"] < counts.nbytes + MEBIBYTE


@pytest.mark.parametrize("batch", [1, 10])
async def test_closures_have_a_state_for_each_run(batch: int) -> None:
    seen: list[int] = []

    def note(number: int) -> int:
        seen.append(number)
        return len(seen)

    definition = {"executor": "memory", "executor_config": {"batch": batch}, "delivery_timeout": 60}
    async with ExecutorRuntime({"here": definition}) as runtime:
        assert [n async for n in runtime["here"].map(note, range(40))] == [1] * 40


async def test_bound_methods_and_closures(fleet: EnvironmentHandle) -> None:
    data = secrets.token_bytes(MEBIBYTE)
    assert [x async for x in fleet.map(tasks.Holder(data).byte_at, range(5))] == list(data[:5])
    assert [x async for x in fleet.map(lambda n: data[n], range(5))] == list(data[:5])


async def test_both_are_large(fleet: EnvironmentHandle) -> None:
    data = secrets.token_bytes(MEBIBYTE)
    items = [secrets.token_bytes(MEBIBYTE) for _ in range(3)]
    assert [x async for x in fleet.map(partial(tasks.join, data), items)] == [
        ((data, item), {}) for item in items
    ]


async def test_it_is_let_go_of_with_the_map(fleet: EnvironmentHandle) -> None:
    model = np.ones(MEBIBYTE)
    gone = weakref.ref(model)
    func = partial(tasks.look_up, model)
    assert len([x async for x in fleet.map(func, range(10))]) == 10
    del model, func
    await until(lambda: gc.collect() >= 0 and gone() is None, "nobody holds the array")


async def test_it_is_let_go_of_when_the_loop_is_left(fleet: EnvironmentHandle) -> None:
    model = np.ones(MEBIBYTE)
    gone = weakref.ref(model)
    async with aclosing(fleet.map(partial(tasks.look_up, model), range(1_000))) as results:
        async for _ in results:
            break
    del model, results
    await until(lambda: open_runs(fleet) == [], "the runs are closed")
    await until(lambda: gc.collect() >= 0 and gone() is None, "nobody holds the array")


async def test_the_next_map_finds_the_same_bytes_there(fleet: EnvironmentHandle, proxy: TcpProxy) -> None:
    model = np.ones(MEBIBYTE)
    for _ in range(2):
        assert [x async for x, _ in fleet.map(partial(tasks.look_up, model), range(3))] == [1, 1, 1]
    assert proxy.passed["response"] < model.nbytes + MEBIBYTE
    model[:] = 2
    # Another map, another encoding: nothing stale is served.
    assert [x async for x, _ in fleet.map(partial(tasks.look_up, model), range(3))] == [2, 2, 2]
    assert proxy.passed["response"] > 2 * model.nbytes


async def test_the_submitter_starts_anew(fleet: EnvironmentHandle, proxy: TcpProxy) -> None:
    model = np.ones(MEBIBYTE)
    func = partial(tasks.look_up, model)
    assert len([x async for x in fleet.map(func, range(3))]) == 3
    await fleet._dispatcher.stop()
    # By the name it is known by; its workers still have it.
    async with ExecutorRuntime({"here": here(proxy)}) as runtime:
        assert len([x async for x in runtime["here"].map(func, range(3))]) == 3
    assert proxy.passed["response"] < model.nbytes + MEBIBYTE


async def test_single_runs_share_nothing(fleet: EnvironmentHandle) -> None:
    model = np.ones(MEBIBYTE)
    func = partial(tasks.look_up, model)
    assert (await fleet.run(func, 0))[0] == 1
    model[:] = 2
    assert (await fleet.run(func, 0))[0] == 2
    assert cached() == 0


async def test_an_array_that_is_changed_meanwhile_is_an_error(fleet: EnvironmentHandle) -> None:
    model = np.ones(MEBIBYTE)

    async def rows() -> AsyncIterator[int]:
        yield 0
        await until(lambda: cached() > 0, "it was fetched")
        parts.cache().clear()
        model[0] = 2
        yield 1

    results = [x async for x in fleet.map(partial(tasks.look_up, model), rows(), return_exceptions=True)]
    assert results[0][0] == 1
    assert isinstance(results[1], ProtocolError)
    assert "do not modify them meanwhile" in str(results[1])


async def test_cut_in_the_middle_of_it(fleet: EnvironmentHandle, proxy: TcpProxy) -> None:
    model = np.ones(MEBIBYTE)
    proxy.cut_after_commit(MEBIBYTE)
    running = asyncio.ensure_future(collect(fleet, partial(tasks.look_up, model), 8))
    await until(lambda: proxy.passed["response"] > 2 * MEBIBYTE, "it was cut, and asked for again")
    assert not running.done()
    proxy.up()
    assert [x for x, _ in await running] == [1] * 8


@pytest.mark.parametrize("batch", [1, 8])
async def test_cancelled_before_it_is_fetched(batch: int, proxy: TcpProxy) -> None:
    model = np.ones(MEBIBYTE)
    proxy.cut_after_commit(MEBIBYTE)
    definition = here(proxy)
    definition["executor_config"]["batch"] = batch
    async with ExecutorRuntime({"here": definition}) as runtime:
        fleet = runtime["here"]
        running = asyncio.ensure_future(collect(fleet, partial(tasks.look_up, model), 8))
        await until(lambda: proxy.passed["response"] > MEBIBYTE, "it was asked for")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        if batch == 1:
            await until(
                lambda: all(run.cancelled for run in open_runs(fleet)), "the listener has heard of it"
            )
        proxy.up()
        # Workers ask once more; those of single runs are answered 410, and all of them say that they stop.
        await until(lambda: open_runs(fleet) == [], "the runs are closed")
        assert batch > 1 or cached() == 0


@pytest.mark.parametrize("batch", [1, 8])
async def test_it_cannot_be_had(batch: int, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0")

    async def reset_soon() -> None:
        await until(lambda: proxy.passed["response"] > MEBIBYTE, "it was cut")
        proxy.up()

    definition = here(proxy, delivery_retries=3)
    definition["executor_config"]["batch"] = batch
    async with ExecutorRuntime({"here": definition}) as runtime:
        proxy.cut_after_commit(MEBIBYTE)
        weather = asyncio.ensure_future(reset_soon())
        # The delivery failed, and is made again, part and all.
        try:
            found = await collect(runtime["here"], partial(tasks.look_up, np.ones(MEBIBYTE)), 2)
        except WorkerLostError as exc:
            pytest.fail(f"retries did not help: {exc}")
        assert [x for x, _ in found] == [1, 1]
        await weather


async def test_a_worker_that_keeps_nothing(
    fleet: EnvironmentHandle, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_caches", {os.getpid(): parts.PartCache(0)})
    model = np.ones(MEBIBYTE)
    assert len(await collect(fleet, partial(tasks.look_up, model), 3)) == 3
    assert proxy.passed["response"] > 3 * model.nbytes


def test_a_worker_that_takes_names_only_fetches_nothing(
    lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WOVE_ALLOW", "wove_tests.tasks:*")
    with TcpProxy("127.0.0.1", lease.port) as proxy:
        func = partial(tasks.look_up, np.ones(MEBIBYTE))
        shared = SharedCallable(func)
        payload = Payload(f"http://127.0.0.1:{proxy.port}", func, 1, shared=shared)
        open_run(lease, sink, run_id=payload.run_id, nonce=payload.nonce, part=shared.part())
        with pytest.raises(PayloadRejectedError, match="this one was sent by value"):
            run_payload(payload.blob)
        assert sink.outcome(payload.run_id)["error"]["kind"] == "PayloadRejectedError"
        assert proxy.passed["response"] < MEBIBYTE


def test_who_knows_the_digest_has_not_got_it(
    lease: Lease, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    func = partial(tasks.look_up, np.ones(MEBIBYTE))
    shared = SharedCallable(func)

    def ends_with(part: Part | None) -> str:
        payload = Payload(f"http://127.0.0.1:{lease.port}", func, 1, shared=shared)
        open_run(lease, sink, run_id=payload.run_id, nonce=payload.nonce, part=part)
        run_payload(payload.blob)
        kind: str = sink.outcome(payload.run_id)["type"]
        return kind

    assert ends_with(shared.part()) == frames.TASK_RESULT
    assert ends_with(None) == frames.TASK_RESULT, "it is there for others of the environment"
    monkeypatch.setattr(callbacks, "ENVIRONMENT", "another")
    assert ends_with(None) == frames.TASK_CANCELLED, "there was nothing to fetch"


async def collect(fleet: EnvironmentHandle, func: Any, count: int) -> list[Any]:
    return [result async for result in fleet.map(func, range(count))]
