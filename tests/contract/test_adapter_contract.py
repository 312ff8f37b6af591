"""One contract, one test body, every adapter: what an executor may rely on when it drives one directly."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
import traceback
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, NoReturn

import kombu.pools
import pytest
from celery import Celery
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from wove_tests import tasks
from wove_tests.callbacks import ENVIRONMENT, Payload, Sink
from wove_tests.chaos.vitals import own_time
from wove_tests.fleets import FLEETS, fleet_params
from wove_tests.waiting import until, until_exists

from wove import ConfigurationError, ExecutorRuntime, MissingDispatchFeatureError, SubmitError, frames
from wove.adapters import celery as celery_adapter
from wove.adapters import rq as rq_adapter
from wove.adapters.registry import adapter_names, load_adapter
from wove.backend import failure_webhook
from wove.demo.processes import free_port
from wove.executors.adapter import BackendAdapterEnvironmentExecutor
from wove.security import find_secrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.adapters.base import BackendAdapter
    from wove.callback_server.hub import Lease
    from wove.frames import Frame

#: The fleets whose adapters are under test, and how many tasks each runs at once.
SLOTS = {
    "memory": 2,
    # Not the threads pool: it hands prefetched tasks on at once, where a revocation does not reach them any
    # more. There the worker's own question before it starts is what stops a cancelled run.
    "celery-redis-prefork": 2,
    "celery-rabbitmq-prefork": 2,
    "rq-worker": 1,
    "rq-json": 1,
}
#: Those that can say for certain that a queued job will never start.
SURE = ("memory", "rq-worker", "rq-json")
PROBES = SURE

SHIPPED = ("celery", "memory", "rq")

#: A database of the private Redis server that no worker listens to.
DATABASE = 9


@pytest.fixture(params=fleet_params(*SLOTS))
def fleet(request: pytest.FixtureRequest) -> str:
    """The name of the fleet under test."""
    return str(request.param)


@pytest.fixture
def config(fleet: str, fleets: Fleets) -> dict[str, Any]:
    """Its ``executor_config``."""
    if FLEETS[fleet].broker is None:
        return {"threads": SLOTS[fleet]}
    config: dict[str, Any] = fleets.executor_definition(fleet)["executor_config"]
    return config


@asynccontextmanager
async def started(name: str, config: dict[str, Any], port: int = 1) -> AsyncIterator[BackendAdapter]:
    """An adapter from start to close."""
    adapter = new_adapter(name, config, port)
    try:
        await adapter.start()
        yield adapter
    finally:
        await adapter.close()
        adapter.release_threads()


def new_adapter(name: str, config: dict[str, Any], port: int = 1) -> BackendAdapter:
    return load_adapter(name)(
        name=ENVIRONMENT, config=config, callback_url=f"http://127.0.0.1:{port}", run_config={}
    )


@pytest.fixture
async def adapter(fleet: str, config: dict[str, Any], lease: Lease) -> AsyncIterator[BackendAdapter]:
    """The started adapter of the fleet."""
    async with started(FLEETS[fleet].executor, config, lease.port) as running:
        yield running


class Caller:
    """Builds payloads whose runs are open on the listener."""

    def __init__(self, lease: Lease, sink: Sink) -> None:
        self.lease = lease
        self.sink = sink

    def new(self, func: Any, *args: Any) -> tuple[bytes, Frame]:
        """Return what an adapter is given for one call."""
        url = f"http://127.0.0.1:{self.lease.port}"
        payload = Payload(url, func, *args)
        payload.open_on(self.lease, self.sink)
        webhook = failure_webhook(
            payload.run_id, payload.nonce, environment=ENVIRONMENT, ring=find_secrets(), callback_url=url
        )
        return payload.blob, {**payload.frame, "failure_webhook": webhook}

    async def outcome(self, frame: Frame) -> Frame:
        """Wait for a run's outcome."""
        return await asyncio.to_thread(self.sink.outcome, frame["run_id"])


@pytest.fixture
def caller(lease: Lease, sink: Sink) -> Caller:
    """Builds payloads."""
    return Caller(lease, sink)


def unsubmitted(**delivery: Any) -> Frame:
    """Return the frame of a call that no worker will see."""
    return {
        "type": frames.RUN_TASK,
        "run_id": secrets.token_hex(16),
        "task_id": "shop.pricing.quote",
        "positional": ("s3cret",),
        "args": {"country": "s3cret"},
        "delivery": delivery,
    }


class TestSubmitting:
    """What is handed over arrives, once, under the run's own id."""

    async def test_one(self, adapter: BackendAdapter, caller: Caller) -> None:
        payload, frame = caller.new(tasks.double, 21)
        await adapter.submit(payload, frame)
        outcome = await caller.outcome(frame)
        assert outcome["result"] == 42
        assert outcome["worker"]["job"] == frame["run_id"]
        assert caller.sink.kinds(frame["run_id"]).count("task_started") == 1

    async def test_many(self, adapter: BackendAdapter, caller: Caller) -> None:
        batch = [caller.new(tasks.double, number) for number in range(20)]
        submissions = await adapter.submit_many(batch)
        assert len(submissions) == 20
        assert not [each for each in submissions if isinstance(each, Exception)]
        assert [(await caller.outcome(frame))["result"] for _, frame in batch] == [2 * n for n in range(20)]

    async def test_none(self, adapter: BackendAdapter) -> None:
        assert await adapter.submit_many([]) == []

    async def test_a_bad_one_among_others(self, adapter: BackendAdapter, caller: Caller, fleet: str) -> None:
        batch = [caller.new(tasks.double, number) for number in range(3)]
        payload, frame = batch[1]
        # What a backend's client library would choke on; memory has none, and misses the id.
        broken = {**frame, "delivery": {"timeout": "soon"}}
        if fleet == "memory":
            del broken["run_id"]
        batch[1] = (payload, broken)
        first, bad, last = await adapter.submit_many(batch)
        assert isinstance(bad, Exception)
        assert not isinstance(first, Exception)
        assert not isinstance(last, Exception)
        for place in (0, 2):
            assert (await caller.outcome(batch[place][1]))["result"] == 2 * place
        with pytest.raises(type(bad)):
            await adapter.submit(*batch[1])
        assert caller.sink.of(frame["run_id"]) == []


class TestCancelling:
    """A queued job is kept from starting."""

    async def test_while_queued(
        self, adapter: BackendAdapter, caller: Caller, fleet: str, fleets: Fleets, tmp_path: Path
    ) -> None:
        release, never = tmp_path / "release", tmp_path / "never"
        blockers = []
        for number in range(SLOTS[fleet]):
            busy = tmp_path / f"started{number}"
            blockers.append(caller.new(tasks.touch_and_wait, str(busy), str(release)))
            await adapter.submit(*blockers[-1])
            await until_exists(busy)
        payload, frame = caller.new(tasks.touch, str(never))
        submission = await adapter.submit(payload, frame)
        sure = await adapter.cancel(frame["run_id"], submission, frame)
        assert sure is (fleet in SURE)
        if not sure:
            # A broadcast: it works from the moment that the worker has heard it.
            flagged = f"flagged as revoked: {frame['run_id']}"
            await asyncio.to_thread(fleets.worker(fleet).wait_for_log, flagged)
        await adapter.cancel(frame["run_id"], submission, frame)
        release.touch()
        for _, blocker in blockers:
            assert (await caller.outcome(blocker))["result"] == "released"
        # Whatever was queued behind the blockers has had its turn when these are done.
        for _ in range(2 * SLOTS[fleet]):
            after = caller.new(tasks.double, 1)
            await adapter.submit(*after)
            await caller.outcome(after[1])
        assert not never.exists()
        reported = caller.sink.kinds(frame["run_id"])
        assert reported == ([] if sure else ["task_started", "task_cancelled"])

    async def test_after_the_end(self, adapter: BackendAdapter, caller: Caller) -> None:
        payload, frame = caller.new(tasks.double, 21)
        submission = await adapter.submit(payload, frame)
        await caller.outcome(frame)
        assert await adapter.cancel(frame["run_id"], submission, frame) is False

    async def test_what_was_never_submitted(self, adapter: BackendAdapter) -> None:
        frame = unsubmitted()
        assert await adapter.cancel(frame["run_id"], None, frame) is False


@pytest.mark.parametrize("fleet", fleet_params(*PROBES))
class TestProbing:
    """What a backend knows of its jobs."""

    async def test_queued_running_and_gone(
        self, adapter: BackendAdapter, caller: Caller, fleet: str, tmp_path: Path
    ) -> None:
        release = tmp_path / "release"
        batch = []
        for number in range(SLOTS[fleet]):
            busy = tmp_path / f"started{number}"
            batch.append(caller.new(tasks.touch_and_wait, str(busy), str(release)))
            await adapter.submit(*batch[-1])
            await until_exists(busy)
        batch.append(caller.new(tasks.double, 1))
        await adapter.submit(*batch[-1])
        ids = [frame["run_id"] for _, frame in batch]
        unknown = secrets.token_hex(16)
        states = await adapter.probe([*ids, unknown])
        found = [states[run_id].state for run_id in [*ids, unknown]]
        assert found == [*["running"] * SLOTS[fleet], "queued", "gone"]
        release.touch()
        for _, frame in batch:
            await caller.outcome(frame)
        deadline = time.monotonic() + 10
        while {state.state for state in (await adapter.probe(ids)).values()} != {"gone"}:
            assert time.monotonic() < deadline, "results are not kept"
            await asyncio.sleep(0.01)

    async def test_nothing(self, adapter: BackendAdapter) -> None:
        assert await adapter.probe([]) == {}

    async def test_failed(self, adapter: BackendAdapter, caller: Caller, fleet: str) -> None:
        payload, frame = caller.new(tasks.fail_builtin)
        await adapter.submit(payload, frame)
        assert (await caller.outcome(frame))["error"]["kind"] == "ValueError"
        # Where the backend keeps failures it knows of this one: the exception was raised in its job.
        ends = {"memory": "gone"}
        deadline = time.monotonic() + 10
        while (await adapter.probe([frame["run_id"]]))[frame["run_id"]].state != ends.get(fleet, "failed"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


class TestClosing:
    """What was opened here is closed, what was given is not."""

    async def test_twice(self, fleet: str, config: dict[str, Any]) -> None:
        adapter = new_adapter(FLEETS[fleet].executor, config)
        await adapter.start()
        await adapter.submit_many([])
        await adapter.close()
        await adapter.close()
        adapter.release_threads()
        adapter.release_threads()

    async def test_its_threads_end(self, adapter: BackendAdapter, caller: Caller, fleet: str) -> None:
        payload, frame = caller.new(tasks.double, 21)
        await adapter.submit(payload, frame)
        await caller.outcome(frame)
        names = tuple(f"wove-{kind}-{ENVIRONMENT}" for kind in ("adapter", "probe", "memory"))

        def mine() -> list[str]:
            return [t.name for t in threading.enumerate() if t.name.startswith(names)]

        assert mine()
        await adapter.close()
        adapter.release_threads()
        await until(lambda: not mine(), "its threads have ended")

    async def test_a_second_one_goes_on(
        self, adapter: BackendAdapter, fleet: str, config: dict[str, Any], caller: Caller
    ) -> None:
        async with started(FLEETS[fleet].executor, config) as other:
            payload, frame = caller.new(tasks.double, 1)
            await other.submit(payload, frame)
        payload, frame = caller.new(tasks.double, 21)
        await adapter.submit(payload, frame)
        assert (await caller.outcome(frame))["result"] == 42


# --- what is found in the broker ------------------------------------------------


@pytest.fixture
def broker(fleets: Fleets, redis_server: object) -> Iterator[Redis]:
    """A database without a worker, empty before and after."""
    with closing(Redis.from_url(fleets.redis_url(DATABASE))) as client:
        client.flushdb()
        yield client
        # Kombu keeps the connections of every app, by URL, until the process ends.
        kombu.pools.reset()
        client.flushdb()


def clients_of(broker: Redis) -> set[str]:
    """Return the ids of the connections to that database, but for the one that asks."""
    asking = broker.client_id()
    listed = broker.client_list()
    return {each["id"] for each in listed if each["db"] == str(DATABASE) and int(each["id"]) != asking}


def own_config(name: str, fleets: Fleets, key: str | None = None) -> dict[str, Any]:
    return {key or {"celery": "broker_url", "rq": "redis_url"}[name]: fleets.redis_url(DATABASE)}


@pytest.mark.parametrize("name", ["celery", "rq"])
class TestOwnership:
    """Connections to the broker."""

    async def test_its_own_are_closed(self, name: str, fleets: Fleets, broker: Redis) -> None:
        before = clients_of(broker)
        async with started(name, own_config(name, fleets)) as adapter:
            frame = unsubmitted()
            submission = await adapter.submit(b"payload", frame)
            await adapter.cancel(frame["run_id"], submission, frame)
            assert clients_of(broker) > before
        await until(lambda: clients_of(broker) <= before, "its connections are closed", patience=3)

    async def test_the_users_are_not(
        self, name: str, fleets: Fleets, broker: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = fleets.redis_url(DATABASE)
        closed: list[str] = []
        if name == "celery":
            app = Celery("mine", broker=url, set_as_current=False)
            config: dict[str, Any] = {"app": app}
            monkeypatch.setattr(app, "close", lambda: closed.append("app"))
            pool = app.producer_pool
        else:
            client = Redis.from_url(url)
            config = {"queue": Queue("mine", connection=client)}
            monkeypatch.setattr(client, "close", lambda: closed.append("client"))
            monkeypatch.setattr(client.connection_pool, "disconnect", lambda *_, **__: closed.append("pool"))
        async with started(name, config) as adapter:
            await adapter.submit(b"payload", unsubmitted())
            mine = clients_of(broker)
            assert mine
        assert closed == []
        assert mine <= clients_of(broker)
        if name == "celery":
            assert app.producer_pool is pool
            app.send_task("mine")
            assert clients_of(broker) == mine, "by the connection it had"
            monkeypatch.undo()
            app.close()
        else:
            monkeypatch.undo()
            client.close()


class TestMessages:
    """What dashboards, logs and workers see."""

    async def test_celery(self, fleets: Fleets, broker: Redis) -> None:
        options = {"send_task_options": {"priority": 3}, "queue": "slow"}
        async with started("celery", {**own_config("celery", fleets), **options}) as adapter:
            frame = unsubmitted(timeout=20.5)
            await adapter.submit(b"\x00payload", frame)
        (raw,) = [item for key in broker.keys("slow*") for item in broker.lrange(key, 0, -1)]
        message = json.loads(raw)
        headers = message["headers"]
        assert message["content-type"] == "application/json", "which every fleet accepts"
        assert (headers["id"], headers["task"]) == (frame["run_id"], "wove.run")
        assert headers["shadow"] == "shop.pricing.quote"
        assert headers["ignore_result"] is True
        assert headers["expires"] is not None
        assert message["properties"]["priority"] == 3
        assert "country=<str>" in headers["argsrepr"]
        assert "s3cret" not in raw.decode(), "arguments are shown by type"

    async def test_celery_without_a_deadline(self, fleets: Fleets, broker: Redis) -> None:
        async with started(
            "celery", {**own_config("celery", fleets), "task_name": "ours", "queue": "slow"}
        ) as adapter:
            await adapter.submit(b"payload", unsubmitted(timeout=None))
        headers = json.loads(broker.lrange("slow", 0, -1)[0])["headers"]
        assert headers["expires"] is None
        assert headers["task"] == "ours"

    async def test_celery_app_by_name(
        self, fleets: Fleets, broker: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = f"project_{secrets.token_hex(4)}"
        (tmp_path / f"{name}.py").write_text(
            "from celery import Celery\n"
            f"app = Celery('p', broker={fleets.redis_url(DATABASE)!r}, set_as_current=False)\n"
            "app.conf.task_default_queue = 'of-the-project'\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        for reference in (f"{name}:app", name):
            async with started("celery", {"app": reference}) as adapter:
                await adapter.submit(b"payload", unsubmitted())
        assert broker.llen("of-the-project") == 2

    @pytest.mark.parametrize("serializer", [None, JSONSerializer], ids=["pickle", "json"])
    async def test_rq(self, fleets: Fleets, broker: Redis, serializer: Any) -> None:
        queue = Queue("slow", connection=broker, serializer=serializer)
        async with started("rq", {"queue": queue, "enqueue_options": {"meta": {"team": "shop"}}}) as adapter:
            frame = unsubmitted(timeout=20.5)
            frame["failure_webhook"] = {"url": "http://127.0.0.1:1/wove/v1/failed/x", "token": "t0ken"}
            await adapter.submit(b"\x00payload", frame)
        (job,) = queue.jobs
        assert job.id == frame["run_id"]
        assert job.func_name == "wove.worker.rq.run"
        assert job.description.startswith("shop.pricing.quote(<str>, country=<str>)")
        assert "s3cret" not in job.description
        assert list(job.args) == [b"\x00payload" if serializer is None else "AHBheWxvYWQ="]
        assert (job.result_ttl, job.failure_ttl) == (0, rq_adapter.FAILURE_TTL)
        assert (job.timeout, job.ttl) == (22, 22)
        assert job.meta == {"team": "shop"}
        assert job.webhooks[0].headers == {"Authorization": "Bearer t0ken"}

    async def test_rq_without_a_deadline(self, fleets: Fleets, broker: Redis) -> None:
        config = {**own_config("rq", fleets), "queue_name": "slow"}
        async with started("rq", {**config, "enqueue_options": {"failure_ttl": 7}}) as adapter:
            await adapter.submit(b"payload", unsubmitted(timeout=None))
        (job,) = Queue("slow", connection=broker).jobs
        assert (job.timeout, job.ttl, job.failure_ttl) == (-1, None, 7)
        assert Job.exists(job.id, connection=broker)

    async def test_rq_refuses_what_rq_does_not_take(self, fleets: Fleets, broker: Redis) -> None:
        config = {**own_config("rq", fleets), "enqueue_options": {"jobtimeout": 3}}
        async with started("rq", config) as adapter:
            with pytest.raises(ConfigurationError, match="jobtimeout"):
                await adapter.submit(b"payload", unsubmitted())
        assert broker.keys("rq:job:*") == []


# --- settings ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
class TestSettings:
    """What cannot work is refused before anything listens or is submitted."""

    async def test_an_unknown_key_names_the_nearest(self, name: str) -> None:
        wrong, right = {
            "celery": ("brokerurl", "broker_url"),
            "memory": ("thread", "threads"),
            "rq": ("queue_nam", "queue_name"),
        }[name]
        await self.refused(name, {wrong: 1}, ConfigurationError, f"'{wrong}'; did you mean '{right}'")
        await self.refused(name, {"callbackport": 1}, ConfigurationError, "did you mean 'callback_port'")

    async def test_a_missing_library(self, name: str) -> None:
        extra = {"celery": "wove[celery]", "memory": "wove[dispatch]", "rq": "wove[rq]"}[name]
        executor = BackendAdapterEnvironmentExecutor(name, required_modules=("json", "no_such_module"))
        with pytest.raises(MissingDispatchFeatureError) as caught:
            await executor.start(environment_name="tests", environment_config={}, run_config={})
        await executor.stop()
        assert f'{name} executor needs no_such_module: pip install "{extra}"' in str(caught.value)
        assert "json" not in str(caught.value)
        assert no_listener()

    async def test_what_it_needs_is_declared(self, name: str) -> None:
        adapter_class = load_adapter(name)
        assert {"aiohttp", "cloudpickle", "msgpack"} <= set(adapter_class.required_modules)
        assert adapter_class.install_hint.startswith('pip install "wove[')
        assert name in adapter_names()

    async def test_settings_that_cannot_be(self, name: str) -> None:
        url = "redis://127.0.0.1:1/0"
        refused = {
            "memory": [({"threads": 0}, "threads"), ({"threads": "two"}, "threads")],
            "celery": [
                ({}, "broker_url"),
                ({"app": Celery(set_as_current=False), "broker_url": url}, "either"),
                ({"app": "no_such_project.celery:app"}, "no_such_project.celery:app"),
                ({"app": "json:no_such_app"}, "json:no_such_app"),
                ({"app": 7}, '"app"'),
                ({"broker_url": url, "send_task_options": ["x"]}, "send_task_options"),
                ({"broker_url": "nosuchbroker://:hunter2@127.0.0.1:1/0"}, "broker_url"),
                # As it comes out of a password generator: the part after the # is no port.
                ({"broker_url": "redis://:hunter2#x@127.0.0.1:1/0"}, "broker_url"),
            ],
            "rq": [
                ({}, "redis_url"),
                ({"queue": 7, "redis_url": url}, "either"),
                ({"queue": 7}, "rq.Queue"),
                ({"redis_url": url, "enqueue_options": ["x"]}, "enqueue_options"),
                ({"redis_url": "nosuchbroker://:hunter2@127.0.0.1:1/0"}, "redis_url"),
                ({"redis_url": "redis://:hunter2#x@127.0.0.1:1/0"}, "redis_url"),
            ],
        }[name]
        for config, says in refused:
            await self.refused(name, config, ConfigurationError, says)

    async def refused(self, name: str, config: dict[str, Any], error: type[Exception], says: str) -> None:
        runtime = ExecutorRuntime({"tests": {"executor": name, "executor_config": config}})
        try:
            with pytest.raises(error) as caught:
                await runtime.start()
        finally:
            await runtime.stop()
        assert says in str(caught.value), config
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
        assert "while starting environment 'tests'" in caught.value.__notes__
        assert no_listener()

    async def test_a_failed_start_is_closed_without_a_word(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        # The error was raised already; a second one in the log would be looked into instead.
        url = "nosuchbroker://:hunter2@127.0.0.1:1/0"
        wrong = {"memory": {"threads": 0}, "celery": {"broker_url": url}, "rq": {"redis_url": url}}[name]
        for config in ({"callback_host": ""}, wrong, *([{}] if name != "memory" else [])):
            with pytest.raises(ConfigurationError):
                await ExecutorRuntime({"tests": {"executor": name, "executor_config": config}}).start()
        assert [record.getMessage() for record in caplog.records] == []


def no_listener() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("wove-callback")]


# --- brokers that are not there -----------------------------------------------------

DOWN = [
    pytest.param("celery", "broker_url", "redis", id="celery-redis"),
    pytest.param("celery", "broker_url", "amqp", id="celery-amqp"),
    pytest.param("rq", "redis_url", "redis", id="rq"),
]


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """Measure how long the loop was held up; the list holds the gaps between its turns."""
    gaps: list[float] = []

    async def tick() -> None:
        last = own_time()
        while True:
            await asyncio.sleep(0.005)
            now = own_time()
            gaps.append(now - last)
            last = now

    ticker = asyncio.create_task(tick())
    try:
        yield gaps
    finally:
        ticker.cancel()


@pytest.mark.parametrize(("name", "key", "scheme"), DOWN)
class TestBrokerDown:
    """A broker that is not there costs a caller an error, and nobody else anything."""

    PASSWORD = "hunter2-hunter2"

    def config(self, key: str, scheme: str, port: int) -> dict[str, Any]:
        return {key: f"{scheme}://someone:{self.PASSWORD}@127.0.0.1:{port}/0"}

    def check(self, error: BaseException) -> None:
        assert isinstance(error, SubmitError)
        everything = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__)
        assert self.PASSWORD not in everything
        assert "did not accept the run" in str(error)

    async def test_refused(self, name: str, key: str, scheme: str) -> None:
        async with started(name, self.config(key, scheme, free_port())) as adapter:
            begun = time.monotonic()
            async with ticking() as gaps:
                with pytest.raises(SubmitError) as caught:
                    await adapter.submit(b"payload", unsubmitted())
                with pytest.raises(Exception, match=r"(?i)refused"):
                    await adapter.cancel(secrets.token_hex(16), None, unsubmitted())
            assert time.monotonic() - begun < 10
            assert max(gaps, default=0) < 0.3
            self.check(caught.value)
            assert "refused" in str(caught.value)

    async def test_a_batch(self, name: str, key: str, scheme: str) -> None:
        # It fails as one: waiting for the broker once per run would take longer than the deadline.
        async with started(name, self.config(key, scheme, free_port())) as adapter:
            begun = time.monotonic()
            results = await adapter.submit_many([(b"payload", unsubmitted()) for _ in range(8)])
            assert time.monotonic() - begun < 3
            assert len(results) == 8
            for result in results:
                self.check(result)

    async def test_silent(self, name: str, key: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # It accepts connections and says nothing, as behind a firewall that forgets.
        monkeypatch.setattr(celery_adapter, "BROKER_TIMEOUT", 0.3)
        monkeypatch.setattr(rq_adapter, "REDIS_TIMEOUT", 0.3)
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            async with started(name, self.config(key, scheme, silent.getsockname()[1])) as adapter:
                begun = time.monotonic()
                async with ticking() as gaps:
                    with pytest.raises(SubmitError) as caught:
                        await adapter.submit(b"payload", unsubmitted())
                assert time.monotonic() - begun < 10
                assert max(gaps) < 0.3
                self.check(caught.value)
                assert caught.value.maybe_accepted is True

    async def test_an_error_that_names_the_url(
        self, name: str, key: str, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = self.config(key, scheme, free_port())[key]

        def fail(*_: Any, **__: Any) -> NoReturn:
            raise ConnectionError(f"cannot reach {url}, sorry")

        if name == "celery":
            config: dict[str, Any] = {"app": Celery("mine", broker=url, set_as_current=False)}
            monkeypatch.setattr(config["app"], "send_task", fail)
        else:
            config = {"queue": Queue("mine", connection=Redis.from_url(url))}
            monkeypatch.setattr(config["queue"].connection, "pipeline", fail)
        async with started(name, config) as adapter:
            with pytest.raises(SubmitError) as caught:
                await adapter.submit(b"payload", unsubmitted())
        self.check(caught.value)
        assert "cannot reach" in str(caught.value)
        assert "@127.0.0.1" in str(caught.value), "what is no secret is shown"

    async def test_by_the_executor(self, name: str, key: str, scheme: str) -> None:
        # The same, as a caller sees it: within the deadline, and nothing stays open.
        definition = {"executor": name, "executor_config": self.config(key, scheme, free_port())}
        async with ExecutorRuntime({"tests": definition}) as runtime:
            begun = time.monotonic()
            async with ticking() as gaps:
                with pytest.raises(SubmitError) as caught:
                    await runtime["tests"].options(delivery_timeout=10).run(tasks.double, 1)
            assert time.monotonic() - begun < 10
            assert max(gaps, default=0) < 0.3
            self.check(caught.value)
            assert len(runtime["tests"]._dispatcher.table) == 0
