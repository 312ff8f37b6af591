"""The worker services as people meet them: the command line, applications of one's own, strangers at the door."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from wove_tests import tasks
from wove_tests.recorder import DECODERS, record_calls
from wove_tests.services import Certificates, WorkerService, make_certificates
from wove_tests.waiting import until

from wove import ExecutorRuntime, SubmitError, WorkerLostError
from wove.exchange import Packet, encode_cancel, encode_run, framed, split_packets
from wove.network_security import NetworkExecutorSecurity
from wove.worker.services import grpc_handler, http_application, websocket_application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

KINDS = ("http", "grpc", "websocket")
QUIET = ("--processes", "0", "--log-level", "warning")
STRANGER = "somebody-elses-secret-of-16-bytes"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority and what it has signed."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module", params=KINDS)
def service(request: pytest.FixtureRequest) -> Iterator[WorkerService]:
    """A service in one process."""
    with WorkerService(request.param, *QUIET) as running:
        yield running


async def run_double(definition: dict[str, Any]) -> int:
    """Run one task."""
    async with ExecutorRuntime({"service": definition}) as runtime:
        result: int = await runtime["service"].run(tasks.double, 21)
        return result


class TestCommandLine:
    """``wove worker``."""

    def test_help_names_the_services(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "wove.cli", "worker", "--help"], capture_output=True, text=True, check=True
        )
        assert all(kind in done.stdout for kind in (*KINDS, "stdio"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--host", "0.0.0.0"], "plain text can be read on the way: give --tls-cert and --tls-key"),
            (["--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1"),
            (["--security", "a-secret-on-the-command-line"], "does not belong on the command line"),
            (["--security", "env:NOT_SET"], "'NOT_SET', which is not set"),
            (["--bearer", "token"], "--bearer is env:VARIABLE"),
            (["--allow", "everything"], "an allowed function is written module:name"),
            (["--tls-cert", "/no/such.pem"], "--tls-cert /no/such.pem"),
            (["--tls-key", "/no/such.pem"], "--tls-key needs --tls-cert"),
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_cannot_be_is_said_in_one_line(self, kind: str, arguments: list[str], message: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "wove.cli", "worker", kind, "--port", "0", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"wove worker {kind}:")]
        assert message in line
        assert "Traceback" not in done.stderr

    def test_other_hosts_need_a_secret_that_they_can_have(
        self, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("WOVE_SECRET")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        tls = ["--tls-cert", certificates.certificate, "--tls-key", certificates.key]
        for security in ([], ["--security", "none"]):
            done = subprocess.run(
                [sys.executable, "-m", "wove.cli", "worker", "http", "--host", "0.0.0.0", *tls, *security],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 2
            assert "whoever reaches it could run code: set WOVE_SECRET" in done.stderr

    def test_a_port_that_is_taken(self, service: WorkerService) -> None:
        command = [
            sys.executable,
            "-m",
            "wove.cli",
            "worker",
            service.kind,
            "--port",
            str(service.port),
            *QUIET,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {service.port}" in done.stderr

    @pytest.mark.parametrize("kind", ["http", "websocket"])
    async def test_healthz(self, kind: str) -> None:
        with WorkerService(kind, *QUIET) as service:
            await run_double(service.definition())
            url = f"http://127.0.0.1:{service.port}/healthz"
            with urllib.request.urlopen(url, timeout=10) as answer:
                status = json.load(answer)
            assert status == {"status": "ok", "open": 0, "finished": 1}
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://127.0.0.1:{service.port}/elsewhere", timeout=10)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_unix_socket(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "wove.sock"
        with WorkerService(kind, "--unix", str(path), *QUIET) as service:
            address = service.address
            assert str(path) in address
            config = {"target": address} if kind == "grpc" else {"url": address}
            assert await run_double({"executor": kind, "executor_config": config}) == 42

    @pytest.mark.parametrize("kind", KINDS)
    async def test_only_clients_with_a_certificate(self, kind: str, certificates: Certificates) -> None:
        with WorkerService(
            kind, "--tls-client-ca", certificates.authority, *QUIET, certificates=certificates
        ) as service:
            own = {"client_certificate": certificates.certificate, "client_key": certificates.key}
            assert await run_double(service.definition(executor_config=own)) == 42
            with pytest.raises((SubmitError, ConnectionError, WorkerLostError)):
                await run_double(service.definition(executor_config={"timeout": 3, **_short(kind)}))

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_certificate_of_somebody_else(
        self, kind: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        other = make_certificates(tmp_path)
        with WorkerService(kind, *QUIET, certificates=certificates) as service:
            config = {"root_certificates": other.authority, "timeout": 3, **_short(kind)}
            with pytest.raises((SubmitError, ConnectionError), match=r"(?i)certificate|UNAVAILABLE"):
                await run_double(service.definition(executor_config=config))

    @pytest.mark.parametrize("kind", KINDS)
    async def test_bearer_tokens(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        token = secrets.token_urlsafe(24)
        with WorkerService(kind, "--bearer", "env:THE_TOKEN", *QUIET, env={"THE_TOKEN": token}) as service:
            monkeypatch.setenv("THE_TOKEN", token)
            good = {"mode": "bearer", "token": "env:THE_TOKEN"}
            assert await run_double(service.definition(executor_config={"security": good})) == 42
            bad = {"mode": "bearer", "token": token[::-1]}
            with pytest.raises(
                (SubmitError, PermissionError), match="does not accept this side's credentials"
            ):
                await run_double(service.definition(executor_config={"security": bad}))

    @pytest.mark.parametrize("processes", ["0", "1"])
    async def test_no_pickles_with_a_list(self, processes: str) -> None:
        options = ("--allow", "wove_tests.tasks:*", "--processes", processes)
        with WorkerService("http", *options) as service:
            async with ExecutorRuntime({"service": service.definition()}) as runtime:
                handle = runtime["service"]
                assert await handle.run(tasks.double_async, 21) == 42
                assert await handle.run(tasks.echo, {"a": (1, {2})}) == {"a": (1, {2})}
                with pytest.raises(Exception, match=r"tasks:os\.getpid|posix:getpid is not allowed"):
                    await handle.run(tasks.os.getpid)
                with pytest.raises(Exception, match="takes functions by name only"):
                    await handle.run(lambda: 1)
                with pytest.raises(Exception, match="plain data only"):
                    await handle.run(tasks.echo, tasks.Point(1, 2))
                with pytest.raises(Exception, match="only plain data travels here"):
                    await handle.run(tasks.make_point, 1, 2)
                with pytest.raises(Exception, match="a builtin problem") as caught:
                    await handle.run(tasks.fail_builtin)
                assert "in fail_builtin" in str(caught.value.__cause__)


def _short(kind: str) -> dict[str, Any]:
    return {"open_timeout": 3} if kind == "websocket" else {}


class TestStrangers:
    """Whoever does not hold the secret gets nothing decoded, and nothing told."""

    async def test_another_secret(self, service: WorkerService) -> None:
        with pytest.raises((SubmitError, PermissionError), match="does not accept this side's credentials"):
            await run_double(service.definition(executor_config={"security": STRANGER}))
        assert "a secret that is not known here" in service.log_text()

    async def test_no_secret(self, service: WorkerService) -> None:
        with pytest.raises((SubmitError, PermissionError), match="does not accept this side's credentials"):
            await run_double(service.definition(executor_config={"security": "none"}))

    async def test_a_service_without_the_secret_is_not_believed(self) -> None:
        """One that takes everything, and answers what it likes."""
        with WorkerService("http", "--security", "none", *QUIET) as service:
            async with ExecutorRuntime({"service": service.definition()}) as runtime:
                with pytest.raises(WorkerLostError, match="signature is wrong"):
                    await runtime["service"].run(tasks.double, 1)
        with (
            WorkerService("websocket", "--security", "none", *QUIET) as service,
            pytest.raises((ConnectionError, PermissionError), match="signature is wrong"),
        ):
            await run_double(service.definition(executor_config={"open_timeout": 2}))

    @pytest.fixture
    async def url(self) -> AsyncIterator[str]:
        """A service in this process, so that its decoders can be watched."""
        async with _served(http_application()) as base:
            yield f"{base}/wove/"

    async def test_nothing_of_a_strangers_request_is_decoded(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = _command()
        host, target = url.split("/")[2], "/wove/"
        request = {"method": "POST", "host": host, "target": target, "body": body}
        headers = NetworkExecutorSecurity.from_config().headers_for(**request)
        stranger = NetworkExecutorSecurity.from_config(STRANGER).headers_for(**request)
        replies = []
        async with aiohttp.ClientSession() as session:

            async def post(body: bytes, headers: dict[str, str]) -> None:
                async with session.post(url, data=body, headers=headers) as answer:
                    replies.append((answer.status, (await answer.read()).decode("utf-8", "replace")))

            calls = record_calls(monkeypatch, *DECODERS)
            await post(body, {})
            await post(body, stranger)
            for place in range(0, len(body), 7):
                changed = bytearray(body)
                changed[place] ^= 1
                await post(bytes(changed), headers)
            for name in headers:
                await post(body, {**headers, name: headers[name][::-1] + "0"})
                await post(body, {key: value for key, value in headers.items() if key != name})
            assert calls == []
            assert {status for status, _ in replies} == {401}
            assert {text for _, text in replies} == {"not authenticated"}
            await until_fresh(post, body, request, replies)

    @pytest.mark.parametrize(
        ("body", "status"),
        [(b"\x00", 400), (b"".join(map(bytes, framed([b"junk"]))), 400), (b"", 200)],
    )
    async def test_signed_nonsense_is_refused_in_words(self, url: str, body: bytes, status: int) -> None:
        security = NetworkExecutorSecurity.from_config()
        request = {"method": "POST", "host": url.split("/")[2], "target": "/wove/", "body": body}
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                headers = security.headers_for(**request)
                async with session.post(url, data=body, headers=headers) as answer:
                    if answer.status != 401:
                        break
                    assert security.learn_clock(headers, answer.headers)
            assert answer.status == status
            assert (status == 200) == ("Wove-Signature" not in answer.headers)

    async def test_a_body_over_the_limit_is_not_read(self) -> None:
        async with _served(http_application(max_request=1_000)) as base, aiohttp.ClientSession() as session:
            async with session.post(f"{base}/wove/", data=bytes(2_000)) as answer:
                assert answer.status == 413


async def until_fresh(
    post: Callable[[bytes, dict[str, str]], Any], body: bytes, request: dict[str, Any], replies: list[Any]
) -> None:
    """Send until the service, which has just started, takes a request."""
    security = NetworkExecutorSecurity.from_config()
    deadline = asyncio.get_running_loop().time() + 10
    while asyncio.get_running_loop().time() < deadline:
        await post(body, security.headers_for(**request))
        if replies[-1][0] == 200:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(replies[-1])


def _command() -> bytes:
    frame = {"run_id": "ab" * 16, "task_id": "t", "callable": abs, "args": {}, "positional": (-1,)}
    return b"".join(bytes(part) for part in framed(encode_run(frame)))


class _served:
    """An application of somebody's own with ours below ``/wove``."""

    def __init__(self, application: web.Application) -> None:
        self._app = web.Application()
        self._app.add_subapp("/wove", application)

    async def __aenter__(self) -> str:
        self._runner = web.AppRunner(self._app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()


#: A service that refuses after the head of its answer has arrived, as gRPC may well deliver an error.
LATE_REFUSAL = """
class Refuses(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method == "/my.Service/Run":
            return grpc.unary_stream_rpc_method_handler(self.refuse)

    async def refuse(self, request, context):
        await context.send_initial_metadata(())
        await asyncio.sleep(0.3)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not today")
        yield b""
"""


@asynccontextmanager
async def _grpc_server(
    setup: str, handler: str, last: str = "asyncio.sleep(0)"
) -> AsyncIterator[dict[str, Any]]:
    """Serve a handler in a process of its own; what it is given is the config of an executor that calls it."""
    program = f"""
import asyncio, grpc
{setup}

async def main():
    server = grpc.aio.server()
    handler = {handler}
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(input)
    await server.stop(0.5)
    await {last}

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        yield {"target": f"127.0.0.1:{port}", "method": "/my.Service/Run"}
    finally:
        await process.communicate(b"\n")
    assert process.returncode == 0


class TestEmbedded:
    """In a server that is there already."""

    async def test_http(self) -> None:
        async with _served(http_application(threads=2)) as base:
            assert await run_double({"executor": "http", "executor_config": {"url": f"{base}/wove/"}}) == 42

    async def test_websocket(self) -> None:
        async with _served(websocket_application(threads=2)) as base:
            url = base.replace("http", "ws", 1) + "/wove/"
            assert await run_double({"executor": "websocket", "executor_config": {"url": url}}) == 42

    async def test_grpc_in_a_process_of_its_own(self) -> None:
        """grpcio's loops do not like company: the server has a process, as it would in earnest."""
        made = (
            "from wove.worker.services import grpc_handler",
            'grpc_handler(method="/my.Service/Run", threads=2)',
        )
        async with _grpc_server(*made, last="handler.stop()") as config:
            async with ExecutorRuntime({"g": {"executor": "grpc", "executor_config": config}}) as runtime:
                assert await runtime["g"].run(abs, -42) == 42

    async def test_a_grpc_error_that_comes_after_its_head_is_a_refusal(self) -> None:
        async with _grpc_server(LATE_REFUSAL, "Refuses()") as config:
            async with ExecutorRuntime({"g": {"executor": "grpc", "executor_config": config}}) as runtime:
                with pytest.raises(SubmitError, match="not today"):
                    await runtime["g"].run(abs, -42)

    def test_options_are_checked_at_once(self) -> None:
        for make in (http_application, websocket_application, grpc_handler):
            with pytest.raises(ValueError, match="module:name"):
                make(allow=["everything"])
            with pytest.raises(ValueError, match="at least 16 bytes"):
                make(security="short")

    async def test_a_cancellation_of_an_unknown_run_is_nothing(self) -> None:
        async with _served(http_application(security="none")) as base, aiohttp.ClientSession() as session:

            async def post(body: bytes) -> list[str]:
                async with session.post(f"{base}/wove/", data=body) as answer:
                    assert answer.status == 200
                    return [Packet(raw).kind for raw in split_packets(await answer.read())]

            assert await post(b"".join(map(bytes, framed(encode_cancel("cd" * 16))))) == []
            assert (await post(_command()))[-1] == "task_result", "the service is well"


class TestOneRunOnce:
    """A command that is sent twice, because its connection broke, is executed once."""

    async def test_while_it_runs_and_afterwards(self, tmp_path: Path) -> None:
        marks = tmp_path / "marks"
        frame = {
            "run_id": "cd" * 16,
            "task_id": "t",
            "callable": tasks.leave_a_mark,
            "positional": (str(marks), 0.3),
            "args": {},
        }
        body = b"".join(bytes(part) for part in framed(encode_run(frame)))
        async with _served(http_application(security="none")) as base, aiohttp.ClientSession() as session:

            async def post() -> list[str]:
                async with session.post(f"{base}/wove/", data=body) as answer:
                    return [Packet(raw).kind for raw in split_packets(await answer.read())]

            first = asyncio.ensure_future(post())
            await until(marks.exists, "it runs")
            second = await post()
            first.cancel()
            assert second == ["task_started", "task_result"]
            assert await post() == ["task_error"]
        assert marks.read_text() == "x"
