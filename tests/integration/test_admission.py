"""What real Celery and RQ workers refuse, whom they tell, and how secrets are rotated under them."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis
from wove_tests import tasks
from wove_tests.services import SUPPORT
from wove_tests.waiting import until

from wove import DeliveryTimeoutError, EncodeError, EnvironmentExecutionError, ExecutorRuntime
from wove.backend import build_payload
from wove.callback_server import hub
from wove.demo.processes import CeleryWorker, RqWorker
from wove.security import SecretRing, find_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.demo.managed import ManagedProcess

pytestmark = pytest.mark.redis

# Redis databases that no fleet of the contract tests uses.
DATABASES = {"celery": 8, "rq": 9}
BACKENDS = pytest.mark.parametrize("backend", ["celery", "rq"])


def worker(backend: str, fleets: Fleets, **env: str) -> ManagedProcess:
    """Return a worker with settings of its own, not started yet."""
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    url = fleets.redis_url(DATABASES[backend])
    if backend == "celery":
        return CeleryWorker(url, queue="admission", concurrency=1, env={"PYTHONPATH": path, **env})
    return RqWorker(url, queues=["admission"], env={"PYTHONPATH": path, **env})


def definition(backend: str, fleets: Fleets, **config: Any) -> dict[str, Any]:
    """Return the environment whose runs that worker takes."""
    url = fleets.redis_url(DATABASES[backend])
    place = {"broker_url": url, "queue": "admission"} if backend == "celery" else {
        "redis_url": url, "queue_name": "admission", "enqueue_options": {"failure_ttl": 1},
    }  # fmt: skip
    return {"executor": backend, "executor_config": {**place, **config}, "delivery_timeout": 60}


def push(backend: str, fleets: Fleets, payload: bytes) -> None:
    """Put a payload on the queue, as somebody does who can write to the broker and has read the documentation."""
    text = base64.b64encode(payload).decode()
    with Redis.from_url(fleets.redis_url(DATABASES[backend])) as connection:
        if backend == "rq":
            from rq import Queue

            queue = Queue("admission", connection=connection)
            queue.enqueue("wove.worker.rq.run", text, result_ttl=0, failure_ttl=1)
            return
        job = secrets.token_hex(16)
        body = base64.b64encode(json.dumps([[text], {}, {}]).encode()).decode()
        message = {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": "wove.run", "id": job, "root_id": job, "retries": 0},
            "properties": {
                "correlation_id": job,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "admission"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": secrets.token_hex(16),
            },
        }
        connection.lpush("admission", json.dumps(message))


class _Recorder(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.seen.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(204)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[Any]:
    """A server that payloads name as their callback; ``seen`` holds what it was asked for."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Recorder)
    server.seen = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def forged(path: Path, url: str, ring: SecretRing, environment: str = "reports", **options: Any) -> bytes:
    """Return a payload that creates a file when it is run."""
    frame = {
        "run_id": secrets.token_hex(16),
        "task_id": "tests.touch",
        "callable": os.mkdir,
        "args": {},
        "positional": (str(path),),
    }
    return build_payload(frame, environment=environment, ring=ring, callback_url=url, **options).blob


@BACKENDS
async def test_what_a_worker_refuses(
    backend: str, fleets: Fleets, tmp_path: Path, stranger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: by whoever can write to the broker; nothing runs, and nothing is said but to who may hear it."""
    ours = find_secrets()
    theirs = SecretRing.parse(secrets.token_hex(32), "somebody else's")
    port_of_another = "http://127.0.0.1:1"
    env = {"WOVE_CALLBACK_ALLOW": stranger.url, "WOVE_ENVIRONMENTS": "reports, mail-*"}
    with worker(backend, fleets, **env) as running:

        async def refused(words: str, payload: bytes, *, told: bool) -> None:
            before, log = set(stranger.seen), len(running.log_text())
            push(backend, fleets, payload)
            await until(lambda: words in running.log_text()[log:], f"the worker says {words!r}")
            # What comes after it on the queue finds the worker well, and all that was to be said said.
            push(backend, fleets, forged(tmp_path / f"done-{log}", stranger.url, ours))
            await until((tmp_path / f"done-{log}").exists, "the next payload is run")
            assert not (tmp_path / "entered").exists()
            spoken_of = {path for path in set(stranger.seen) - before if path.startswith("/wove/v1/events/")}
            assert len(spoken_of) == (2 if told else 1)

        entered = tmp_path / "entered"
        url = stranger.url
        await refused("not a Wove payload", b"\x80\x04K\x01.", told=False)
        await refused("does not have", forged(entered, url, theirs), told=False)
        changed = bytearray(forged(entered, url, ours))
        changed[-1] ^= 1
        await refused("signature is wrong", bytes(changed), told=False)
        await refused("does not list", forged(entered, port_of_another, ours), told=False)
        await refused(
            "belongs to the environment 'finance'", forged(entered, url, ours, "finance"), told=True
        )
        past = time.time() - 1_000
        monkeypatch.setattr("wove.backend.time.time", lambda: past)
        old = forged(entered, url, ours, expires=60.0)
        monkeypatch.undo()
        await refused("it has expired", old, told=True)


@BACKENDS
async def test_the_caller_is_told_what_the_worker_does_not_take(backend: str, fleets: Fleets) -> None:
    environments = {
        "reports": definition(backend, fleets),
        "finance": definition(backend, fleets),
        "plain": definition(backend, fleets, pickle=False),
    }
    env = {"WOVE_ALLOW": "wove_tests.tasks:*", "WOVE_ENVIRONMENTS": "reports,plain"}
    with worker(backend, fleets, **env):
        async with ExecutorRuntime(environments) as runtime:
            with pytest.raises(EnvironmentExecutionError, match=r"environment 'finance'.*WOVE_ENVIRONMENTS"):
                await runtime["finance"].run(tasks.double, 2)
            reports, plain = runtime["reports"], runtime["plain"]
            for handle in (reports, plain):
                assert await handle.run(tasks.double, 4) == 8
                assert await handle.run(tasks.echo, {"a": (1, {2}), "b": b"x"}) == {"a": (1, {2}), "b": b"x"}
                with pytest.raises(
                    EnvironmentExecutionError, match=r"os:getpid|posix:getpid is not allowed.*WOVE_ALLOW"
                ):
                    await handle.run(os.getpid)
                with pytest.raises(EnvironmentExecutionError, match=r"Point.*only plain data travels here"):
                    await handle.run(tasks.make_point, 1, 2)
                with pytest.raises(EnvironmentExecutionError) as caught:
                    await handle.run(tasks.double, None)
                assert "TypeError" in str(caught.value), "as data, and not as itself"
            # What the submitter could have known.
            with pytest.raises(EnvironmentExecutionError, match="functions by name only"):
                await reports.run(lambda: 1)
            with pytest.raises(
                EnvironmentExecutionError, match="the arguments: this worker has WOVE_ALLOW and takes"
            ):
                await reports.run(tasks.echo, tasks.Point(1, 2))
            with pytest.raises(EncodeError, match="functions go by name only"):
                await plain.run(lambda: 1)
            with pytest.raises(EncodeError, match=r"argument 0: it is of type wove_tests\.tasks\.Point"):
                await plain.run(tasks.echo, tasks.Point(1, 2))


@BACKENDS
async def test_a_submitter_without_pickles_reads_none(
    backend: str, fleets: Fleets, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker knows nothing of it: it has no list, and is made to send what it was asked not to.
    loaded: list[Any] = []
    import wove.wire

    monkeypatch.setattr(wove.wire.pickle, "loads", lambda *a, **k: loaded.append(a))
    with worker(backend, fleets):
        async with ExecutorRuntime({"plain": definition(backend, fleets, pickle=False)}) as runtime:
            with pytest.raises(EnvironmentExecutionError, match="a pickle was sent"):
                await runtime["plain"].run(tasks.disobey, 1)
    assert loaded == []


@BACKENDS
async def test_secrets_are_rotated_without_a_pause(
    backend: str, fleets: Fleets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of docs/security.md, with calls under way all the time and a worker that is never restarted."""
    old, new = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    file = tmp_path / "secret"

    def write(text: str) -> None:
        draft = tmp_path / "draft"
        draft.write_text(text)
        draft.chmod(0o600)
        draft.replace(file)

    write(f"# 2026\nold:{old}\n")
    monkeypatch.delenv("WOVE_SECRET")
    with worker(backend, fleets, WOVE_SECRET_FILE=str(file)) as running:

        async def submitter(text: str, calls: int) -> None:
            async with ExecutorRuntime({"reports": definition(backend, fleets, security=text)}) as runtime:
                slow = asyncio.ensure_future(runtime["reports"].run(time.sleep, 0.5))
                assert [await runtime["reports"].run(tasks.double, n) for n in range(calls)] == [
                    2 * n for n in range(calls)
                ]
                await slow

        pid = running.pid
        await submitter(f"old:{old}", 2)
        write(f"old:{old}\nnew:{new}\n")  # 1: workers know the new one too
        await submitter(f"old:{old}", 2)
        await submitter(f"new:{new},old:{old}", 2)  # 2: submitters sign with it
        write(f"new:{new}\n")  # 3: the old one goes
        await submitter(f"new:{new}", 2)
        async with ExecutorRuntime(
            {"reports": {**definition(backend, fleets, security=f"old:{old}"), "delivery_start_timeout": 3}}
        ) as runtime:
            # RQ says itself that the job failed; with Celery the caller's own deadline speaks.
            with pytest.raises((DeliveryTimeoutError, EnvironmentExecutionError)):
                await runtime["reports"].run(tasks.double, 1)
        assert running.pid == pid
        assert old not in running.log_text()
        assert new not in running.log_text()


def test_no_listener_is_left() -> None:
    assert not hub._listeners
