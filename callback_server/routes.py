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
import logging
import time
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from wove import frames
from wove.callback_server.batches import OpenBatch
from wove.callback_server.beats import Beats
from wove.callback_server.decoding import BatchNews, decode_batch, decode_news, open_parked, open_parked_news
from wove.callback_server.guard import LARGE_FROM, send_guarded
from wove.callback_server.replies import ENDED, WITHDRAWN, Answer, clock, gone, reply, unauthorized
from wove.errors import ProtocolError, cut, lost, normalize_exception
from wove.security import (
    event_mac,
    event_tag,
    fetch_tag,
    part_tag,
    reply_tag,
    same,
    webhook_token,
)
from wove.shared_parts import size_of
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from wove.callback_server.contacts import Contacts
    from wove.callback_server.express import Report
    from wove.callback_server.guard import Guard
    from wove.callback_server.run_table import OpenRuns
    from wove.callback_server.runs import Execution, OpenRun
    from wove.frames import Frame

logger = logging.getLogger("wove.callback_server")

#: Largest body, in bytes, of a request without an outcome.
MAX_NEWS = 256 * 1024
#: Seconds after which a worker may ask again for leave to start.
ASK_AGAIN = 0.5
#: The answer to events that were taken.
TAKEN = Answer(204)
#: Seconds that an outcome gets to arrive after a backend has said that the run failed.
FAILURE_GRACE = 1.0


class Routes:
    """The request handlers of one listener."""

    def __init__(self, runs: OpenRuns, guard: Guard, contacts: Contacts) -> None:
        self._runs = runs
        self._guard = guard
        self._contacts = contacts

    def table(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.post("/wove/v1/events/{run_id}", self.events),
            web.post("/wove/v1/beats", Beats(self._runs, self._guard, self._contacts).hold),
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
        answer = self._take_in(connection, run, key, tag, batch)
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
        answer = self._take_in(connection, run, key, report.tag, batch)
        return Answer(answer.status, {**answer.headers, WITHDRAWN: str(self._runs.count())}, answer.text)

    def _take_in(
        self, connection: Any, run: OpenRun, key: bytes, tag: bytes, batch: list[Frame] | BatchNews
    ) -> Answer:
        if isinstance(batch, BatchNews):
            return self._take_news(connection, cast(OpenBatch, run), reply_key(key, tag), batch)
        return self._take(connection, run, key, tag, batch)

    def _take(self, connection: Any, run: OpenRun, key: bytes, tag: bytes, batch: list[Frame]) -> Answer:
        """Take verified events in; ``connection`` is None where it is closed after this."""
        last = batch[-1]
        if last["type"] in frames.TERMINAL:
            return self._end(run, batch)
        name = last.get("execution", "")
        if last.get("fence"):
            refusal = self._check_leave(run, run.executions.get(name), last)
            if refusal is not None:
                return refusal
        execution = self._runs.execution(run, name, last["attempt"])
        if execution is not None:
            if last.get("fence"):
                execution.retry = _whole(last.get("retry"))
            # Who does not name its execution, or closes its connection, is not known by it.
            self._contacts.heard(connection if name else None, run, execution)
            if execution.over and last["type"] == frames.TASK_RETRY:
                return TAKEN  # the next execution is at work already
        if last["attempt"] >= run.attempt and not (execution is not None and execution.over):
            run.worker = last.get("worker", run.worker)
        if last["type"] == frames.TASK_RETRY and execution is not None:
            # The next execution may be long in coming, and anywhere.
            execution.over = True
            run.worker = {}
        run.sink(batch)
        if run.cancelled or last["attempt"] < run.attempt:
            return Answer(200, {"Wove-Cancel": reply_tag(key, tag, b"cancel").hex()})
        return TAKEN

    def _end(self, run: OpenRun, batch: list[Frame]) -> Answer:
        last = batch[-1]
        if last["type"] != frames.TASK_RESULT and last["attempt"] < run.attempt:
            return TAKEN  # a newer attempt is at work
        if last["type"] == frames.TASK_ERROR and last["error"].get("source") == "backend":
            # A lost worker is no outcome before the run has no attempt left.
            if run.lost < run.attempt:
                run.lost = run.attempt
                run.forsake()
                run.sink(batch)
        else:
            self._close_with(run, batch)
        return TAKEN

    # --- events of a batch ------------------------------------------------------

    def _take_news(
        self, connection: Any, batch: OpenBatch, sign: Callable[[bytes], str], news: BatchNews
    ) -> Answer:
        last = news.frames[-1] if news.frames else None
        if last is not None and last["type"] in frames.TERMINAL:
            return self._end_batch(batch, last)
        speaker = last or {"execution": news.execution, "worker": news.worker}
        fence = last is not None and bool(last.get("fence"))
        if fence and last is not None:
            refusal = self._check_leave(batch, batch.executions.get(news.execution), last)
            if refusal is not None:
                return refusal
        execution = self._runs.execution(batch, news.execution, 1)
        if execution is not None:
            if fence:
                execution.retry = _whole(speaker.get("retry"))
            self._contacts.heard(connection if news.execution else None, batch, execution)
            if not execution.over:
                batch.worker = batch.last_worker = news.worker or batch.worker
            if last is not None and last["type"] == frames.TASK_RETRY:
                execution.over = True
                batch.worker = {}
        self._hand_over(batch, news, quietly=fence)
        return self._answer_news(batch, news, sign, fence=fence)

    def _hand_over(self, batch: OpenBatch, news: BatchNews, *, quietly: bool) -> None:
        """Pass on what a worker says of members; those it has ended are closed."""
        if news.frames and not quietly:
            batch.sink(f for f in news.frames if f["run_id"] == batch.run_id or f["run_id"] in batch.pending)
        ended = [frame for frame in news.outcomes if self._runs.close_member(batch, frame["run_id"])]
        for run_id in news.returned:
            cancelled = (known := self._runs.known(run_id)) is not None and known.cancelled
            if self._runs.close_member(batch, run_id):
                # Nobody has begun it: a cancelled one never will be, another is to be submitted again.
                kind = frames.TASK_CANCELLED if cancelled else frames.TASK_RETURNED
                ended.append(frames.event(kind, run_id, batch.task_id, 1, 2**31))
        if ended:
            batch.sink(ended)
        if news.timing is not None:
            batch.on_timing(*news.timing)

    def _answer_news(
        self, batch: OpenBatch, news: BatchNews, sign: Callable[[bytes], str], *, fence: bool
    ) -> Answer:
        if fence:
            unwanted = self._refuse_members(batch)
        else:
            unwanted = batch.withdrawn[news.heard :]
        if not unwanted:
            return TAKEN
        text = " ".join(map(str, (len(batch.withdrawn), *unwanted)))
        return Answer(200, {"Wove-Unwanted": sign(text.encode())}, text)

    def _refuse_members(self, batch: OpenBatch) -> list[int]:
        """Return the places of members that may not be started; cancelled ones end here."""
        over: list[Frame] = []
        for place in tuple(batch.withdrawn):
            run_id = batch.run_ids[place]
            if self._runs.close_member(batch, run_id):
                over.append(frames.event(frames.TASK_CANCELLED, run_id, batch.task_id, 1, 2**31))
        if over:
            batch.sink(over)
        return [place for place, run_id in enumerate(batch.run_ids) if run_id not in batch.pending]

    def _end_batch(self, batch: OpenBatch, last: Frame) -> Answer:
        if last["type"] == frames.TASK_ERROR and last["error"].get("source") == "backend":
            if not batch.lost:
                batch.lost = 1
                batch.forsake()
                batch.sink([last])
        else:
            batch.sink([last])
            self._runs.close(batch.run_id, outcome=True)
        return TAKEN

    def _check_leave(self, run: OpenRun, asking: Execution | None, frame: Frame) -> Answer | None:
        """A worker asks before it starts: say why it may not, or nothing."""
        if frame["attempt"] < run.attempt:
            return Answer(410, ENDED)
        if run.cancelled:
            # The run ends here, and never starts.
            self._close_with(
                run,
                [
                    frames.event(
                        frames.TASK_CANCELLED, run.run_id, run.task_id, frame["attempt"], frame["seq"]
                    )
                ],
            )
            return Answer(410, ENDED)
        now = time.monotonic()
        since = run.asked(frame.get("execution", ""), now)
        retry = _whole(frame.get("retry"))
        for other in run.living():
            if other is asking:
                continue
            if retry > other.retry:
                other.over = True  # the backend itself has given that one up
            elif other.last_contact > since:
                # It has spoken while this one waited: it is alive.
                return Answer(409)
            elif not other.seems_dead(now):
                run.asked_at = now
                return Answer(503, {"Retry-After": str(ASK_AGAIN)})
        run.asks = {}
        return None

    def _close_with(self, run: OpenRun, batch: list[Frame]) -> None:
        self._runs.close(run.run_id)
        run.sink(batch)

    async def take_parked(self, run_id: str, blob: bytes) -> None:
        """Take an outcome in that a worker has left with the backend.

        Raises:
            ProtocolError: it is not signed with the run's key, or malformed.
        """
        run = self._runs.get(run_id)
        if run is None:
            return
        if isinstance(run, OpenBatch):
            news = await in_thread(open_parked_news, run, blob)
            if self._runs.get(run_id) is run:
                self._hand_over(run, news, quietly=True)
                if news.frames and news.frames[-1]["type"] in frames.TERMINAL:
                    self._end_batch(run, news.frames[-1])
            return
        # Its size is a backend's, not a request's: the listener stays free meanwhile.
        batch = await in_thread(open_parked, run, blob)
        if self._runs.get(run_id) is run:
            self._end(run, batch)

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
        asyncio.get_running_loop().call_later(FAILURE_GRACE, self._lose, run, attempt, reason)
        return reply(204)

    def _lose(self, run: OpenRun, attempt: int, reason: str) -> None:
        if self._runs.get(run.run_id) is not run or run.attempt != attempt:
            return  # its outcome has arrived, or another attempt is at work
        last_line = reason.strip().rsplit("\n", 1)[-1]
        message = f"the backend says that the job failed before it reported an outcome: {last_line}"
        if run.on_suspect is None:
            self._end(run, [run.event(frames.TASK_ERROR, error=lost(message, reason))])
            return
        # An outcome may have been left with the job: it is looked for first.
        run.obituary = lost(message, reason)
        run.on_suspect(run)

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


def reply_key(key: bytes, request_tag: bytes) -> Callable[[bytes], str]:
    """Return what signs a reply to that request."""
    return lambda body: reply_tag(key, request_tag, b"unwanted " + body).hex()


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


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
