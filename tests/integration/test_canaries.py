"""P18: secrets and passwords are nowhere that anybody reads: logs at DEBUG, reprs, tracebacks, the broker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import secrets
import traceback
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from redis import Redis
from wove_tests import tasks
from wove_tests.services import SUPPORT

from wove import ExecutorRuntime
from wove.callback_server.runs import OpenRun
from wove.demo.processes import CeleryWorker, RedisServer, RqWorker
from wove.errors import ConfigurationError
from wove.keyring import Secret, SecretRing, current_secrets
from wove.security import find_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.redis


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    """The secret of this test, by its own name."""
    value = f"canary{secrets.token_hex(20)}"
    monkeypatch.setenv("WOVE_SECRET", f"now:{value}")
    return value


@pytest.fixture
def password() -> str:
    """The password of the broker."""
    return f"password{secrets.token_hex(8)}"


@pytest.fixture
def broker(password: str) -> Iterator[str]:
    """A Redis server that wants it."""
    with RedisServer() as server:
        with Redis.from_url(server.url) as connection:
            connection.config_set("requirepass", password)
        yield f"redis://:{password}@127.0.0.1:{server.port}/0"


def _dump(url: str) -> bytes:
    """Return all that stands in Redis."""
    with Redis.from_url(url) as connection:
        pieces = []
        for key in connection.keys():
            pieces += [key, connection.dump(key)]
            kind = connection.type(key)
            if kind == b"hash":
                pieces += [part for pair in connection.hgetall(key).items() for part in pair]
            elif kind == b"list":
                pieces += connection.lrange(key, 0, -1)
        return b"\n".join(filter(None, pieces))  # a key may expire meanwhile


@pytest.mark.parametrize("backend", ["celery", "rq"])
async def test_nothing_shows_a_secret(
    backend: str, broker: str, canary: str, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path}
    if backend == "celery":
        # The later -l counts.
        worker: Any = CeleryWorker(broker, queue="canary", concurrency=1, env=env, extra_args=["-l", "DEBUG"])
        config: dict[str, Any] = {"broker_url": broker, "queue": "canary"}
    else:
        worker = RqWorker(broker, queues=["canary"], env=env, extra_args=["--logging_level", "DEBUG"])
        config = {"redis_url": broker, "queue_name": "canary"}
    definition = {"executor": backend, "executor_config": config, "delivery_timeout": 30}
    texts: list[str] = []
    dumps: list[bytes] = []

    async def look(awaitable: Any) -> None:
        try:
            texts.append(repr(await awaitable))
        except BaseException as exc:
            texts.append(
                "".join(traceback.TracebackException.from_exception(exc, capture_locals=False).format())
            )
            texts.append(repr(exc))

    async with ExecutorRuntime({"reports": definition}) as runtime:
        reports = runtime["reports"]
        # Without a worker: what the broker keeps.
        waiting = [asyncio.ensure_future(reports.run(tasks.echo, n)) for n in range(3)]
        large = asyncio.ensure_future(reports.run(len, b"x" * 500_000))
        with Redis.from_url(broker) as connection:
            queue = "canary" if backend == "celery" else "rq:queue:canary"
            while connection.llen(queue) < 4:
                await asyncio.sleep(0.01)
        dumps.append(_dump(broker))
        with worker:
            for task in (*waiting, large):
                await look(task)
            await look(reports.run(divmod, 1, 0))
            await look(reports.run(tasks.make_point, 1, 2))
            await look(reports.run(lambda: 1))
            await look(reports.run(os._exit, 3))
            await look(reports.run(_looks_around))
            dumps.append(_dump(broker))
        texts += [
            repr(runtime),
            repr(reports),
            repr(find_secrets()),
            repr(current_secrets()),
        ]
        texts += _reprs()
    # A worker with another secret, whose errors are about secrets; a broker that is not there.
    worker._env = {**worker._env, "WOVE_SECRET": f"now:{secrets.token_hex(20)}"}
    with worker:
        async with ExecutorRuntime({"reports": {**definition, "delivery_start_timeout": 2}}) as runtime:
            await look(runtime["reports"].run(tasks.echo, 1))
    key = "broker_url" if backend == "celery" else "redis_url"
    nowhere = broker.partition("@127.0.0.1:")[0] + "@127.0.0.1:1/0"
    dead = {**definition, "executor_config": {**config, key: nowhere}}
    with contextlib.suppress(Exception):
        async with ExecutorRuntime({"reports": {**dead, "delivery_timeout": 4}}) as runtime:
            await look(runtime["reports"].run(tasks.echo, 1))
    texts += [caplog.text, worker.log_text()]
    for record in caplog.records:
        texts.append(f"{record.msg!r} {record.args!r}")
    everything = "\n".join(texts)
    assert "ZeroDivisionError" in everything
    for hidden in (canary, canary[6:30]):
        assert hidden not in everything
        assert hidden.encode() not in b"".join(dumps)
    # Of the password, only what is Wove's: other libraries' objects and their logs are theirs.
    ours = [text for text in texts[:-2] if password in text]
    assert ours == []
    assert password not in "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("wove"))
    # The keys of runs are derived, and stay where they were derived as well.
    derived = current_secrets().primary.derive("wove/1 payload", "reports")
    for form in (derived, derived.hex().encode()):
        assert form not in b"".join(dumps)
        assert form not in everything.encode("utf-8", "surrogateescape")


def _looks_around() -> str:
    """Fail on the worker, with all that is to be seen there in the message."""
    raise LookupError("\n".join(_reprs())[:20_000])


def _reprs() -> list[str]:
    """Return how every object of Wove's in this process shows itself."""
    ours = [thing for thing in gc.get_objects() if str(type(thing).__module__).startswith("wove.")]
    shown = []
    for thing in ours:
        with contextlib.suppress(Exception):  # one that is half made, say
            shown.append(repr(thing))
    return shown


def test_held_objects_do_not_pickle_secrets(canary: str) -> None:
    ring = find_secrets()
    run = OpenRun(
        run_id="a" * 32,
        task_id="t",
        environment="e",
        ring=ring,
        nonce=b"n" * 16,
        sink=lambda batch: True,
        max_body=1,
    )
    for thing in (ring, ring.primary, run, [ring], {"ring": ring}):
        for dumps in (pickle.dumps, cloudpickle.dumps):
            with pytest.raises(TypeError, match="a Secret is never pickled"):
                dumps(thing)
        assert canary not in repr(thing)
    for kind in (Secret, SecretRing):
        assert not hasattr(kind, "__dataclass_fields__")


@pytest.mark.parametrize("how", ["variable", "file"])
def test_a_traceback_with_local_variables_shows_none(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A good one, and one that is refused.
    text = f"{secrets.token_hex(20)},{secrets.token_hex(6)}"
    if how == "variable":
        monkeypatch.setenv("WOVE_SECRET", text)
    else:
        monkeypatch.delenv("WOVE_SECRET")
        monkeypatch.setenv("WOVE_SECRET_FILE", str(tmp_path / "secret"))
        (tmp_path / "secret").write_text(text)
        (tmp_path / "secret").chmod(0o600)
    with pytest.raises(ConfigurationError) as caught:
        find_secrets()
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(repr(frame.locals) for frame in frames.stack[1:])
    assert "source" in shown
    for part in text.split(","):
        assert part not in shown
    assert caught.value.__context__ is None
