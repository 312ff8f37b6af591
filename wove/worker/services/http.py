"""The HTTP worker service: commands in a request's body, events in the answer, as they happen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from wove.callback_server.guard import Guard, refusal
from wove.errors import ProtocolError
from wove.exchange import Packet, chunked, split_packets
from wove.network_security import NetworkSecurityError, Seal
from wove.worker.services.hub import Listener
from wove.worker.services.service import (
    CUT_SECONDS,
    PING_SECONDS,
    QUICK_SECONDS,
    Service,
    maybe_in_thread,
    sealed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from typing_extensions import Buffer

    from wove.network_security import Verified

CONTENT_TYPE = "application/vnd.wove.packets"
#: Answers up to this size, in bytes, leave in one piece.
_SMALL = 64 * 1024
#: Bytes that are written at once.
CHUNK = 1024 * 1024

GUARD: web.AppKey[Guard] = web.AppKey("wove_guard", Guard)


def http_application(service: Service | None = None, **options: Any) -> web.Application:
    """Return an aiohttp application that runs tasks, for ``app.add_subapp("/wove", ...)``.

    Args:
        service: what runs the tasks; without one it is made of the options.
        options: those of :class:`Service`: ``security``, ``threads``, ``processes``, ``allow``, ...

    Raises:
        ConfigurationError: an option cannot be used.
    """
    routes = Routes(service or Service(name="http", **options))
    # Bodies are read by the guard, which has limits of its own.
    app = web.Application(middlewares=[routes.guard.middleware], client_max_size=0)
    app[GUARD] = routes.guard
    app.add_routes([web.post("/", routes.send), web.get("/healthz", routes.healthz)])
    app.cleanup_ctx.append(routes.life)
    return app


class Routes:
    """The routes of a service over HTTP."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.guard = Guard()

    async def life(self, app: web.Application) -> AsyncIterator[None]:
        """Start the service with the application, and stop it with it."""
        await self.service.start()
        yield
        await self.service.stop()

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        """Tell a load balancer whether new runs are taken."""
        status = self.service.status()
        code = 200 if status["status"] == "ok" else 503
        return web.Response(body=json.dumps(status).encode(), status=code, content_type="application/json")

    async def send(self, request: web.Request) -> web.StreamResponse:
        """Take commands and answer with their events."""
        body = await self.guard.read_body(request, self.service.max_request)
        verified = await verify(self.service, request, body)
        seal = Seal(verified.key, "answer")
        listener = Listener()
        try:
            for raw in split_packets(body):
                self.service.hub.take(Packet(raw), listener)
        except ProtocolError as exc:
            # Signed, and still not understood: another release, which the caller has to know.
            self.service.hub.detach(listener, retention=CUT_SECONDS)
            raise signed_refusal(web.HTTPBadRequest, str(exc), seal) from None
        try:
            response = await _answer(request, listener, seal)
        except BaseException:
            self.service.hub.detach(listener, retention=CUT_SECONDS)
            raise
        # Each of its runs has ended: there is nothing else to be detached.
        self.service.hub.delivered(listener.ended)
        return response


async def verify(service: Service, request: web.Request, body: Buffer = b"") -> Verified:
    """Verify a request before anything of it is decoded.

    Raises:
        HTTPException: 401, in the same words whatever is wrong; the reason is in the service's log.
    """

    def check() -> Verified:
        return service.security.verify_headers(
            request.headers, method=request.method, host=request.host, target=request.raw_path, body=body
        )

    try:
        verified: Verified = await maybe_in_thread(memoryview(body).nbytes, check)
    except NetworkSecurityError as exc:
        service.refuse(exc, str(request.remote))
        raise refusal(web.HTTPUnauthorized(text="not authenticated", headers=exc.clock)) from None
    return verified


def signed_refusal(kind: type[web.HTTPException], text: str, seal: Seal) -> web.HTTPException:
    """Return a refusal whose words the caller can trust."""
    tag = seal.tag([text.encode()]).hex()
    return refusal(kind(text=text, headers={"Wove-Signature": tag} if tag else {}))


async def _answer(request: web.Request, listener: Listener, seal: Seal) -> web.StreamResponse:
    """Write events until every run of the request has its outcome."""
    pieces = await sealed(await listener.take_quick(QUICK_SECONDS), seal)
    if listener.done:
        if sum(memoryview(piece).nbytes for piece in pieces) < _SMALL:
            return web.Response(body=b"".join(pieces), content_type=CONTENT_TYPE)
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
    await response.prepare(request)
    await _write(response, pieces)
    while not listener.done:
        await _write(response, await sealed(await listener.take(PING_SECONDS), seal))
    await _write(response, await sealed(await listener.take_within(0), seal))
    await response.write_eof()
    return response


async def _write(response: web.StreamResponse, pieces: list[Buffer]) -> None:
    # In chunks, so that a slow reader holds up no more than one of them.
    for chunk in chunked(pieces, CHUNK):
        await response.write(chunk)
