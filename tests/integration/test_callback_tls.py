"""Listeners that speak TLS: whom they take, what clashes, and real workers that verify them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import tasks
from wove_tests.callbacks import listening
from wove_tests.services import SUPPORT, Certificates, make_certificates
from wove_tests.waiting import until, until_states

from wove import DeliveryTimeoutError, ExecutorRuntime
from wove.callback_server import door, hub
from wove.callback_server.tls import read_tls
from wove.demo.processes import CeleryWorker, RqWorker, free_port
from wove.errors import ConfigurationError, WorkerLostError
from wove.worker import transport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove_tests.fleets import Fleets

    from wove.callback_server.hub import Lease

# Redis databases that no fleet of the contract tests uses.
DATABASES = {"celery": 13, "rq": 14}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A throw-away authority, and a certificate of it for 127.0.0.1."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another authority's."""
    return make_certificates(tmp_path_factory.mktemp("other-tls"))


def setting(certificates: Certificates, **more: str) -> dict[str, str]:
    """Return ``callback_tls``."""
    return {"certificate": certificates.certificate, "key": certificates.key, **more}


@pytest.fixture(params=["server", "mutual"])
def lease(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Lease]:
    """A share of a listener that speaks TLS."""
    more = {"ca": certificates.authority} if request.param == "mutual" else {}
    with listening(read_tls(setting(certificates, **more))) as shared:
        yield shared


@pytest.fixture
def trusting(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's workers trust the authority, and have a certificate of it."""
    monkeypatch.setenv("WOVE_CA", certificates.authority)
    monkeypatch.setenv("WOVE_CERT", certificates.certificate)
    monkeypatch.setenv("WOVE_KEY", certificates.key)


def memory(tls: Any, **config: Any) -> dict[str, Any]:
    """Return the definition of an environment whose worker is in this process."""
    return {
        "executor": "memory",
        "executor_config": {"callback_tls": tls, **config},
        "delivery_timeout": 20,
    }


class TestInThisProcess:
    """The memory adapter's workers speak to the listener as any others do."""

    @pytest.mark.usefixtures("trusting")
    @pytest.mark.parametrize("mutual", [False, True])
    async def test_calls(self, certificates: Certificates, mutual: bool) -> None:
        tls = setting(certificates, **({"ca": certificates.authority} if mutual else {}))
        async with ExecutorRuntime({"here": memory(tls)}) as runtime:
            assert await runtime["here"].run(abs, -3) == 3
            assert len(await runtime["here"].run(bytes, 5_000_000)) == 5_000_000
            assert await runtime["here"].run(len, b"x" * 3_000_000) == 3_000_000

    @pytest.mark.usefixtures("trusting")
    async def test_a_context_of_the_users_own(self, certificates: Certificates) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.certificate, certificates.key)
        async with ExecutorRuntime({"here": memory(context)}) as runtime:
            assert await runtime["here"].run(abs, -3) == 3

    @pytest.mark.usefixtures("trusting")
    async def test_beats_are_held_and_cancel_at_once(
        self, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from wove.worker import courier

        monkeypatch.setattr(courier, "BEAT_AFTER", 0.05)
        definition = memory(setting(certificates))
        async with ExecutorRuntime(
            {"here": {**definition, "delivery_cancel_mode": "require_ack"}}
        ) as runtime:
            call = asyncio.ensure_future(runtime["here"].run(asyncio.sleep, 25))
            await until_states(runtime["here"], "started")
            await until(_a_beat_is_held, "a beat is held")
            # TLS's own records have come by now; none of them ended the beat.
            held = _beats_seen()
            await asyncio.sleep(0.3)
            assert _beats_seen() <= held + 1
            begun = time.monotonic()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert time.monotonic() - begun < 3, "by the beat that was open, not by the next one"

    async def test_a_worker_without_the_authority_delivers_nothing(
        self, certificates: Certificates, others: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_CA", others.authority)
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0")
        async with ExecutorRuntime(
            {"here": {**memory(setting(certificates)), "delivery_timeout": 2}}
        ) as runtime:
            with pytest.raises(DeliveryTimeoutError, match="delivery_timeout"):
                await runtime["here"].run(abs, -3)


def _runs() -> list[Any]:
    return [run for shared in hub._listeners.values() for run in list(shared.listener.runs._runs.values())]


def _a_beat_is_held() -> bool:
    return any(run.watchers for run in _runs())


def _beats_seen() -> int:
    return sum(execution.beats for run in _runs() for execution in run.executions.values())


class TestStrangers:
    """Who does not speak TLS, or has no certificate, is not heard."""

    def test_plain_http_is_not_answered(self, lease: Lease) -> None:
        with socket.create_connection((lease.host, lease.port), timeout=10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert not connection.recv(4096).startswith(b"HTTP")

    def test_mutual_tls_refuses_who_has_no_certificate(self, certificates: Certificates) -> None:
        with listening(read_tls(setting(certificates, ca=certificates.authority))) as shared:
            context = ssl.create_default_context(cafile=certificates.authority)
            connection = http.client.HTTPSConnection(shared.host, shared.port, timeout=10, context=context)
            with contextlib.closing(connection), pytest.raises((ssl.SSLError, ConnectionError)):
                connection.request("GET", "/healthz")
                connection.getresponse()
            context.load_cert_chain(certificates.certificate, certificates.key)
            connection = http.client.HTTPSConnection(shared.host, shared.port, timeout=10, context=context)
            with contextlib.closing(connection):
                connection.request("GET", "/healthz")
                assert connection.getresponse().status == 200

    def test_old_versions_are_refused(self, certificates: Certificates) -> None:
        with listening(read_tls(setting(certificates))) as shared:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(certificates.authority)
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            with pytest.warns(DeprecationWarning):
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            with socket.create_connection((shared.host, shared.port), timeout=10) as plain:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(plain, server_hostname="127.0.0.1")

    def test_those_who_do_not_shake_hands_lock_nobody_out(
        self, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from wove.callback_server import guard

        monkeypatch.setattr(guard, "MAX_CONNECTIONS", 40)
        monkeypatch.setattr(door, "CROWDED_SECONDS", 0.05)
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(listening(read_tls(setting(certificates))))
            for _ in range(150):
                stack.enter_context(socket.create_connection((shared.host, shared.port), timeout=10))
            context = ssl.create_default_context(cafile=certificates.authority)
            for _ in range(3):
                connection = http.client.HTTPSConnection(
                    shared.host, shared.port, timeout=10, context=context
                )
                with contextlib.closing(connection):
                    connection.request("GET", "/healthz")
                    assert connection.getresponse().status == 200

    @pytest.mark.parametrize("state", ["shaking hands", "idle", "refused"])
    def test_nobody_outlives_the_listener(self, certificates: Certificates, state: str) -> None:
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(listening(read_tls(setting(certificates))))
            plain = stack.enter_context(socket.create_connection((shared.host, shared.port), timeout=10))
            if state == "shaking hands":
                plain.sendall(b"\x16\x03\x01")
            else:
                _speak(plain, certificates, keep=state == "idle")
            shared.release()
            # The peer never says goodbye. What the listener has sent comes, and then the end.
            plain.settimeout(5)
            with contextlib.suppress(ConnectionError):
                while plain.recv(65536):
                    pass

    def test_handshakes_end(self, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(door, "HEAD_SECONDS", 0.2)
        with listening(read_tls(setting(certificates))) as shared:
            with socket.create_connection((shared.host, shared.port), timeout=10) as connection:
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""


def _speak(plain: socket.socket, certificates: Certificates, *, keep: bool) -> None:
    """Make one request over TLS; ``keep`` tells whether the listener is to keep the connection after it."""
    context = ssl.create_default_context(cafile=certificates.authority)
    arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(arrived, leaving, server_hostname="127.0.0.1")

    def done(step: Any) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                plain.sendall(leaving.read())
                arrived.write(plain.recv(65536))
            finally:
                plain.sendall(leaving.read())

    done(tls.do_handshake)
    idle = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    refused = b"POST /wove/v1/events/nobody HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabcdefghi"
    done(lambda: tls.write(idle if keep else refused))
    answer = done(lambda: tls.read(65536))
    assert answer.startswith(b"HTTP/1.1 200" if keep else b"HTTP/1.1 410")


class TestSettings:
    """What cannot work does not start, and says what to set."""

    def test_two_ways_of_speaking_on_one_port_clash(
        self, certificates: Certificates, others: Certificates
    ) -> None:
        port = free_port()
        first = hub.acquire("127.0.0.1", port, read_tls(setting(certificates)))
        try:
            for tls, words in ((None, "plain HTTP"), (setting(others), "TLS by these")):
                with pytest.raises(
                    ConfigurationError, match=rf"callback_port {port} .*{words}.*callback_tls"
                ):
                    hub.acquire("127.0.0.1", port, read_tls(tls))
            again = hub.acquire("127.0.0.1", port, read_tls(setting(certificates)))
            assert again.port == first.port
            again.release()
        finally:
            first.release()

    def test_any_port_serves_both(self, certificates: Certificates) -> None:
        with listening(read_tls(setting(certificates))) as secure, listening() as plain:
            assert secure.port != plain.port

    @pytest.mark.parametrize(
        ("tls", "message"),
        [
            ("cert.pem", r'is \{"certificate": path'),
            ({}, 'needs a "certificate"'),
            ({"certificat": "x"}, "unknown key 'certificat'.*certificate"),
            ({"certificate": 5}, "'certificate' is a path, not int"),
            ({"certificate": "/nowhere.pem"}, "No such file"),
        ],
    )
    def test_unusable_settings(self, tls: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=rf'executor_config\["callback_tls"\].*{message}'):
            read_tls(tls)

    def test_files_that_do_not_fit(self, certificates: Certificates, others: Certificates) -> None:
        with pytest.raises(ConfigurationError, match="belong together"):
            read_tls({"certificate": certificates.certificate, "key": others.key})
        with pytest.raises(ConfigurationError, match=r'the "ca" .* cannot be used'):
            read_tls(setting(certificates, ca=certificates.key))
        with pytest.raises(ConfigurationError, match="is a context for clients"):
            read_tls(ssl.create_default_context())

    async def test_workers_are_not_sent_to_a_tls_listener_by_plain_http(
        self, certificates: Certificates
    ) -> None:
        definition = memory(setting(certificates), callback_url="http://{hostname}:{port}")
        with pytest.raises(ConfigurationError, match="begins with https://"):
            async with ExecutorRuntime({"here": definition}) as runtime:
                await runtime["here"].run(abs, 1)

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"WOVE_CA": "/nowhere.pem"}, "WOVE_CA /nowhere.pem cannot be used"),
            ({"WOVE_CERT": "/nowhere.pem"}, "WOVE_CERT /nowhere.pem"),
            ({"WOVE_KEY": "/nowhere.pem"}, "WOVE_KEY is set without WOVE_CERT"),
        ],
    )
    def test_a_workers_unusable_files(
        self, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=message):
            transport.connect("https://127.0.0.1:1")


@pytest.mark.redis
@pytest.mark.parametrize("backend", ["celery", "rq"])
async def test_real_workers_over_mutual_tls(backend: str, fleets: Fleets, certificates: Certificates) -> None:
    url, queue = fleets.redis_url(DATABASES[backend]), f"tls-{backend}"
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")])),
        "WOVE_CA": certificates.authority,
        "WOVE_CERT": certificates.certificate,
        "WOVE_KEY": certificates.key,
    }
    tls = setting(certificates, ca=certificates.authority)
    if backend == "celery":
        worker: Any = CeleryWorker(url, queue=queue, env=env)
        config: dict[str, Any] = {"broker_url": url, "queue": queue}
    else:
        worker = RqWorker(url, queues=[queue], env=env)
        config = {"redis_url": url, "queue_name": queue, "enqueue_options": {"failure_ttl": 1}}
    definition = {
        "executor": backend,
        "executor_config": {**config, "callback_tls": tls},
        "delivery_timeout": 60,
        "delivery_cancel_mode": "require_ack",
    }
    with worker:
        async with ExecutorRuntime({"secure": definition}) as runtime:
            secure = runtime["secure"]
            assert await secure.run(tasks.double, 3) == 6
            assert len(await secure.run(bytes, 2_000_000)) == 2_000_000
            with pytest.raises(ZeroDivisionError):
                await secure.run(divmod, 1, 0)
            # Longer than it takes for the open beat to be the way by which it is cancelled.
            call = asyncio.ensure_future(secure.run(asyncio.sleep, 30))
            await until(_a_beat_is_held, "a beat is held")
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await secure.run(os.getpid) != os.getpid()
            call = asyncio.ensure_future(secure.run(time.sleep, 30))
            await until(_a_beat_is_held, "a beat is held")
            os.kill(_worker_pid(), signal.SIGKILL)
            with pytest.raises(WorkerLostError):
                await call
    # RQ keeps what a killed work horse leaves for a moment; the fleets' own check does not look here.


def _worker_pid() -> int:
    pids = [run.worker["pid"] for run in _runs() if run.worker]
    assert len(pids) == 1
    pid: int = pids[0]
    return pid
