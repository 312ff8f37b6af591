"""What the events of workers do to the runs of a listener: who is at what, who may start, and what has ended.

Events come here verified and decoded, whichever way they came; the answer is for others to send.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from wove import frames
from wove.callback_server.batches import OpenBatch
from wove.callback_server.decoding import BatchNews, open_parked, open_parked_news
from wove.callback_server.replies import ENDED, Answer
from wove.errors import lost
from wove.security import reply_tag
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.callback_server.contacts import Contacts
    from wove.callback_server.run_table import OpenRuns
    from wove.callback_server.runs import Execution, OpenRun
    from wove.frames import Frame

#: Seconds after which a worker may ask again for leave to start.
ASK_AGAIN = 0.5
#: The answer to events that were taken.
TAKEN = Answer(204)


class Events:
    """Takes in what is said of the runs of one listener; in its thread."""

    def __init__(self, runs: OpenRuns, contacts: Contacts) -> None:
        self._runs = runs
        self._contacts = contacts

    def take(
        self, connection: Any, run: OpenRun, key: bytes, tag: bytes, batch: list[Frame] | BatchNews
    ) -> Answer:
        """Take verified events in.

        Args:
            connection: by which they came; None where it is closed after this.
            run: whose they are.
            key: the run's key.
            tag: the request's signature.
            batch: the events, or what is said of a batch.
        """
        if isinstance(batch, BatchNews):
            return self._take_news(connection, cast(OpenBatch, run), _reply_key(key, tag), batch)
        return self._take_events(connection, run, key, tag, batch)

    def _take_events(
        self, connection: Any, run: OpenRun, key: bytes, tag: bytes, batch: list[Frame]
    ) -> Answer:
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

    def _close_with(self, run: OpenRun, batch: list[Frame]) -> None:
        self._runs.close(run.run_id)
        run.sink(batch)

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

    # --- leave to start ---------------------------------------------------------

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

    # --- what comes by way of the backend -----------------------------------------

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

    def lose(self, run: OpenRun, attempt: int, reason: str) -> None:
        """Take the backend's word that an attempt has failed, unless its outcome has arrived."""
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


def _reply_key(key: bytes, request_tag: bytes) -> Callable[[bytes], str]:
    """Return what signs a reply to that request."""
    return lambda body: reply_tag(key, request_tag, b"unwanted " + body).hex()


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
