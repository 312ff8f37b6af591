"""What workers can ask of a listener.

``POST /wove/v1/events/{run_id}``    events of a run, signed with its key
``POST /wove/v1/beats``              the open beat: held until a run is cancelled, or its time is up
``GET  /wove/v1/payloads/{run_id}``  a message that was too large for the broker
``GET  /wove/v1/parts/{run_id}``     what the run shares with other runs
``POST /wove/v1/failed/{job_id}``    a backend's own word that the run failed (RQ's webhook)
``GET  /healthz``                    answers while the listener is alive

The order of checks is: is the run open (410), is the key known (401), is the length
allowed (413), is the signature right (401); only then are bytes decoded (400). A worker that
asks for leave to start gets 204 (go), 410 (not wanted), 409 (another worker is at it) or
503 (another one may be: ask again).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from wove import frames
from wove.callback_server.batches import OpenBatch
from wove.callback_server.decoding import BatchNews, decode_batch, decode_news
from wove.callback_server.guard import LARGE_FROM, send_guarded
from wove.callback_server.replies import WITHDRAWN, Answer, clock, gone, reply, unauthorized
from wove.errors import ProtocolError, cut, normalize_exception
from wove.security import event_mac, event_tag, fetch_tag, part_tag, same, webhook_token
from wove.shared_parts import size_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from wove.callback_server.beats import Beats
    from wove.callback_server.events import Events
    from wove.callback_server.express import Report
    from wove.callback_server.guard import Guard
    from wove.callback_server.run_table import OpenRuns
    from wove.callback_server.runs import OpenRun
    from wove.frames import Frame

#: Largest body, in bytes, of a request without an outcome.
MAX_NEWS = 256 * 1024
#: Seconds that an outcome gets to arrive after a backend has said that the run failed.
FAILURE_GRACE = 1.0


class Routes:
    """The request handlers of one listener."""

    def __init__(self, runs: OpenRuns, guard: Guard, beats: Beats, events: Events) -> None:
        self._runs = runs
        self._guard = guard
        self._beats = beats
        self._events = events

    def table(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.post("/wove/v1/events/{run_id}", self.events),
            web.post("/wove/v1/beats", self._beats.hold),
            web.get("/wove/v1/payloads/{run_id}", self.payload),
            web.get("/wove/v1/parts/{run_id}", self.part),
            web.post("/wove/v1/failed/{job_id}", self.failed),
            web.get("/healthz", self.health),
        ]

    async def health(self, request: web.Request) -> web.Response:
        """Answer that the listener is alive; workers learn our clock from it."""
        return web.json_response({"status": "ok"}, headers=clock())

    # --- events ---------------------------------------------------------------

    async def events(self, request: web.Request) -> web.Response:
        """Take signed events of one run in."""
        run = self._open_run(request)
        key = _known_key(request, run)
        final = request.headers.get("Wove-Final") == "1"
        tag = _given_tag(request)
        body: bytearray | memoryview
        if final and (request.content_length or 0) >= LARGE_FROM:
            # Verified while it comes in, and decoded in a thread of its own.
            mac = event_mac(key, run.run_id, request.content_type, final)
            body = await self._guard.read_large(request, run.max_body, mac)
            if not same(mac.digest(), tag):
                raise unauthorized(request)
            loop = asyncio.get_running_loop()
            batch = await loop.run_in_executor(None, _decode, request, run, final, body)
        else:
            body = await self._guard.read_body(request, run.max_body if final else MAX_NEWS)
            if not same(event_tag(key, run.run_id, request.content_type, final, [body]), tag):
                raise unauthorized(request)
            batch = _decode(request, run, final, body)
        if self._runs.get(run.run_id) is not run:  # closed while the body came in
            raise self._gone(request)
        connection = request.protocol if request.keep_alive else None
        answer = self._events.take(connection, run, key, tag, batch)
        return reply(
            answer.status, {**answer.headers, WITHDRAWN: str(self._runs.count())}, answer.text or None
        )

    def take_report(self, connection: Any, report: Report) -> Answer | None:
        """Take in a report that has come in one piece, by the same checks in the same order.

        Args:
            connection: by which it came.
            report: the request.

        Returns:
            The answer; None for a report that is to go the ordinary way, because something is wrong with it.
        """
        run = self._runs.get(report.run_id)
        key = run.key(report.kid) if run is not None else None
        if run is None or key is None:
            return None
        size = memoryview(report.body).nbytes
        if size > (run.max_body if report.final else MAX_NEWS) or size >= LARGE_FROM:
            return None
        codec, final = report.codec, report.final
        if not same(event_tag(key, run.run_id, codec, final, [report.body]), report.tag):
            return None
        try:
            batch = _decode_events(report.body, codec, run, final=final)
        except ProtocolError:
            return None
        answer = self._events.take(connection, run, key, report.tag, batch)
        return Answer(answer.status, {**answer.headers, WITHDRAWN: str(self._runs.count())}, answer.text)

    # --- large payloads ---------------------------------------------------------

    async def payload(self, request: web.Request) -> web.StreamResponse:
        """Send a worker the message that was too large for the broker."""
        run = self._open_run(request)
        key = _known_key(request, run)
        if not same(fetch_tag(key, run.run_id), _given_tag(request)):
            raise unauthorized(request)
        return await self._hand_out(request, run, run.message)

    async def part(self, request: web.Request) -> web.StreamResponse:
        """Send a worker what the run shares with other runs."""
        run = self._open_run(request)
        key = _known_key(request, run)
        if not same(part_tag(key, run.run_id), _given_tag(request)):
            raise unauthorized(request)
        return await self._hand_out(request, run, run.part.message if run.part is not None else None)

    async def _hand_out(
        self, request: web.Request, run: OpenRun, message: list[Buffer] | None
    ) -> web.StreamResponse:
        if message is None or run.cancelled:
            raise self._gone(request)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = size_of(message)
        await response.prepare(request)
        if await send_guarded(request, response, message):
            await response.write_eof()
        return response

    # --- the backend's own word -------------------------------------------------

    async def failed(self, request: web.Request) -> web.Response:
        """Take the backend's word that a run has failed, proven by the run's token."""
        job, attempt = _split_job_id(request.match_info["job_id"])
        run = self._runs.get(job)
        if run is None:
            # RQ also tells of failures that were reported long before; that is no mistake.
            await self._guard.read_body(request, MAX_NEWS)
            return reply(204)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        key = run.key(run.ring.primary.kid)
        if (
            key is None
            or scheme != "Bearer"
            or not same(
                webhook_token(key, request.match_info["job_id"]).encode(), token.encode("utf-8", "replace")
            )
        ):
            raise unauthorized(request)
        reason = _failure_text(await self._guard.read_body(request, MAX_NEWS))
        asyncio.get_running_loop().call_later(FAILURE_GRACE, self._events.lose, run, attempt, reason)
        return reply(204)

    # --- shared -----------------------------------------------------------------

    def _open_run(self, request: web.Request) -> OpenRun:
        run = self._runs.get(request.match_info["run_id"])
        if run is None:
            raise self._gone(request)
        return run

    def _gone(self, request: web.Request) -> web.HTTPException:
        return gone(request, ended=self._runs.has_ended(request.match_info["run_id"]))


def _known_key(request: web.Request, run: OpenRun) -> bytes:
    key = run.key(request.headers.get("Wove-Key", ""))
    if key is None:
        raise unauthorized(request)
    return key


def _given_tag(request: web.Request) -> bytes:
    try:
        return bytes.fromhex(request.headers.get("Wove-Signature", ""))
    except ValueError:
        return b""


def _decode(
    request: web.Request, run: OpenRun, final: bool, body: bytearray | memoryview
) -> list[Frame] | BatchNews:
    try:
        return _decode_events(body, request.content_type, run, final=final)
    except ProtocolError as exc:
        if not final:
            raise web.HTTPBadRequest(text=cut(str(exc), 500)) from None
        # An outcome that nobody can read is an outcome all the same: nothing else will come.
        return [run.event(frames.TASK_ERROR, error=normalize_exception(exc, source="worker"))]


def _decode_events(body: Buffer, codec: str, run: OpenRun, *, final: bool) -> list[Frame] | BatchNews:
    if isinstance(run, OpenBatch):
        return decode_news(body, codec, run, final=final)
    return decode_batch(body, codec, run.run_id, final=final, plain=run.plain)


def _split_job_id(job_id: str) -> tuple[str, int]:
    """Return run and attempt of a job's id as :func:`wove.backend.job_id` makes it."""
    run_id, _, number = job_id.partition("-")
    return run_id, int(number) if number.isdecimal() and len(number) < 9 else 1


def _failure_text(body: bytearray) -> str:
    try:
        text = json.loads(bytes(body)).get("exc_info")
    except (ValueError, AttributeError, RecursionError):
        text = None
    return cut(text) if isinstance(text, str) and text.strip() else "no reason given"
