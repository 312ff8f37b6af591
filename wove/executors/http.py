"""The http and https executors."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, ClassVar

from wove.errors import ConfigurationError, MissingDispatchFeatureError
from wove.exchange import chunked
from wove.executors.network import SILENCE_SECONDS
from wove.executors.policy import TLS_KEYS, Endpoint, check_policy, client_tls, read_endpoint, read_headers
from wove.executors.requests import IN_THREAD_FROM, Request, RequestExecutor, refused
from wove.executors.settings import whole_number
from wove.network_security import NetworkSecurityError, Seal
from wove.threads import in_thread

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
    from types import ModuleType

    from aiohttp import BaseConnector, ClientResponse, ClientSession
    from typing_extensions import Buffer

#: Requests that are open at once; each may hold several runs.
CONNECTIONS = 1000
#: Seconds that an idle connection is kept; less than a service keeps it.
KEEP_ALIVE = 30.0
#: Bytes that are written at once, and read ahead of an answer.
CHUNK = 256 * 1024
READ_AHEAD = 512 * 1024


class HttpEnvironmentExecutor(RequestExecutor):
    """Sends tasks to a worker service over HTTP; events come back as they happen.

    ``executor_config``: ``url`` (``http://``, ``https://``, or ``unix:///path``), ``security``, ``headers``,
    ``timeout`` (seconds to connect, to get an answer, and of silence: 30), ``connections`` (requests open at
    once: 1000), ``max_message`` (largest result in bytes: 256 MiB), ``insecure``, and for TLS
    ``root_certificates``, ``client_certificate``, ``client_key`` (paths of PEM files).

    Args:
        require_https: insist on ``https://`` URLs, as the name ``https`` does.
    """

    transport = "http"
    config_keys: ClassVar[tuple[str, ...]] = ("connections", "headers", "url", *TLS_KEYS)

    def __init__(self, *, require_https: bool = False) -> None:
        super().__init__()
        self.require_https = require_https
        self._session: ClientSession | None = None
        self._urgent: ClientSession | None = None

    @property
    def where(self) -> str:
        """The service's address."""
        return self._endpoint.where

    async def open(self, config: Mapping[str, Any]) -> None:
        """Check the settings; see :meth:`NetworkExecutor.open`."""
        self._endpoint = self._read_endpoint(config)
        self._headers = read_headers(config)
        self._connections = whole_number(config, "connections", CONNECTIONS) or CONNECTIONS
        check_policy(
            config, self.security, where=self.where, secure=self._endpoint.secure, local=self._endpoint.local
        )
        self._aiohttp = require_aiohttp()
        from yarl import URL  # aiohttp's own

        self._url = URL(self._endpoint.url)
        tls = await in_thread(client_tls, config) if self._endpoint.secure else None
        # Cancellations have connections of their own: they never wait behind requests that hang.
        self._session = self._new_session(tls, self._connections)
        self._urgent = self._new_session(tls, max(8, self._connections // 4))

    def _read_endpoint(self, config: Mapping[str, Any]) -> Endpoint:
        endpoint = read_endpoint(config, self.transport, ("http", "https"))
        if self.require_https and not endpoint.secure:
            raise ConfigurationError(
                f'executor_config["url"]: the https executor insists on https://, and got {endpoint.url!r}; use '
                '{"executor": "http"} where plain text is meant'
            )
        return endpoint

    def _new_session(self, tls: ssl.SSLContext | None, connections: int) -> ClientSession:
        aiohttp = self._aiohttp
        connector: BaseConnector
        if self._endpoint.socket_path is not None:
            connector = aiohttp.UnixConnector(
                self._endpoint.socket_path, limit=connections, keepalive_timeout=KEEP_ALIVE
            )
        else:
            connector = aiohttp.TCPConnector(
                limit=connections, keepalive_timeout=KEEP_ALIVE, ssl=tls if tls is not None else True
            )
        # No proxies or credentials from the environment: work goes where the definition says.
        session: ClientSession = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=READ_AHEAD,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        return session

    async def close(self) -> None:
        """Close the connections; see :meth:`RequestExecutor.close`."""
        sessions = (self._session, self._urgent)
        self._session = self._urgent = None
        for session in sessions:
            if session is not None:
                await session.close()

    async def exchange(self, request: Request, *, urgent: bool) -> AsyncGenerator[bytes, None]:
        """Send a request; see :meth:`RequestExecutor.exchange`."""
        session = self._urgent if urgent else self._session
        if session is None:
            raise RuntimeError("the http executor is not started")
        response = await self._send(session, request)
        try:
            request.accept()
            async for chunk in response.content.iter_any():
                yield chunk
        except (self._aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise ConnectionError(explain(exc, self.timeout)) from exc
        finally:
            # One that was not read to its end is closed, and does not serve the next request.
            response.release() if response.content.at_eof() else response.close()

    async def _send(self, session: ClientSession, request: Request) -> ClientResponse:
        """Send; once more where a kept connection had ended, or the service's clock is another."""
        learnt = False
        for attempt in range(3):
            headers = await self._sign(request)
            try:
                response = await self._post(session, request, headers)
            except (self._aiohttp.ClientError, TimeoutError, OSError) as exc:
                ended = isinstance(exc, (self._aiohttp.ServerDisconnectedError, ConnectionResetError))
                if ended and attempt == 0:
                    continue  # a service executes a run once, however often it is sent
                raise ConnectionError(explain(exc, self.timeout)) from exc
            if response.status == 200:
                request.seal = Seal(self.security.answer_key(headers), "answer")
                return response
            if response.status == 401 and not learnt and self.security.learn_clock(headers, response.headers):
                learnt = True
                response.release()
                continue
            raise await self._refusal(response, headers)
        raise ConnectionError("it answered three times that the request's clock is wrong")

    async def _sign(self, request: Request) -> dict[str, str]:
        def sign() -> dict[str, str]:
            return self.security.headers_for(
                method="POST", host=self._endpoint.host, target=self._endpoint.target, body=request.body
            )

        signed: dict[str, str] = sign() if request.size < IN_THREAD_FROM else await in_thread(sign)
        return signed

    async def _post(self, session: ClientSession, request: Request, signed: dict[str, str]) -> ClientResponse:
        aiohttp = self._aiohttp
        patience = request.patience(self.timeout)
        data: Any = b"".join(request.body) if request.size < CHUNK else _slices(request.body)
        headers = {
            **self._headers,
            **signed,
            "Host": self._endpoint.host,
            "Content-Length": str(request.size),
        }
        headers["Content-Type"] = "application/vnd.wove.packets"
        silence = max(self.timeout, SILENCE_SECONDS)
        posting = session.post(
            self._url,
            data=data,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self.timeout, sock_read=max(patience, silence)
            ),
        )
        # Waiting for a free connection counts too: one that never comes free is as bad as none.
        async with asyncio.timeout(patience):
            return await posting

    async def _refusal(self, response: ClientResponse, headers: dict[str, str]) -> Exception:
        try:
            async with asyncio.timeout(self.timeout):
                body = await response.content.read(4096)
        except (self._aiohttp.ClientError, TimeoutError, OSError):
            body = b""
        finally:
            response.close()
        if response.status == 401:
            return NetworkSecurityError(
                f"it does not accept this side's credentials ({self.security.source}): give both sides the same secret; "
                "the service's log says what is wrong"
            )
        tag = Seal(self.security.answer_key(headers), "answer").tag([body]).hex()
        trusted = not self.security.signs_answers or response.headers.get("Wove-Signature") == tag
        return refused(
            f"{response.status} {response.reason}", body.decode("utf-8", "replace"), trusted=trusted
        )


def require_aiohttp() -> ModuleType:
    """Return aiohttp.

    Raises:
        MissingDispatchFeatureError: it is not installed; names the command.
    """
    try:
        import aiohttp
    except ImportError:
        raise MissingDispatchFeatureError(
            'The http and websocket executors need aiohttp: pip install "wove[dispatch]"'
        ) from None
    return aiohttp


def explain(exc: BaseException, timeout: float) -> str:
    """Say in plain words why a request failed."""
    if isinstance(exc, TimeoutError):
        return f'nothing came from it for {timeout:g} s (executor_config["timeout"])'
    if isinstance(exc, OSError) and exc.errno == errno.ECONNREFUSED:
        return "nobody listens there: is `wove worker` running?"
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


async def _slices(pieces: Sequence[Buffer]) -> AsyncIterator[bytes | memoryview]:
    # In chunks, so that the loop has turns in between.
    for chunk in chunked(pieces, CHUNK):
        yield chunk
