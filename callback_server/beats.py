"""The open beat: a request that says which runs a worker is at, and is held until there is news for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from wove import frames
from wove.callback_server.batches import OpenBatch
from wove.callback_server.decoding import MAX_EXECUTION
from wove.callback_server.guard import Guard, refusal
from wove.callback_server.replies import gone, reply, unauthorized
from wove.security import beat_tag, cancel_tag, same

if TYPE_CHECKING:
    from wove.callback_server.contacts import Contacts
    from wove.callback_server.run_table import OpenRuns
    from wove.callback_server.runs import Execution, OpenRun

#: Largest body, in bytes: it is read before anything of it can be verified.
MAX_BODY = 64 * 1024
#: Seconds a beat is held at most, whatever the worker asks for.
MAX_HOLD = 30.0
MAX_RUNS_IN_BEAT = 256


@dataclass(slots=True)
class _Beat:
    """One verified line of a beat."""

    run: OpenRun
    name: str
    execution: Execution
    count: int
    key: bytes
    told: bool
    #: Of a batch: how many withdrawals its worker has heard of.
    heard: int = 0

    @property
    def to_cancel(self) -> bool:
        if isinstance(self.run, OpenBatch):
            return len(self.run.withdrawn) > self.heard
        # What an earlier attempt does is of no use any more, either.
        return (self.run.cancelled or self.execution.attempt < self.run.attempt) and not self.told

    def cancel_line(self) -> str:
        if isinstance(self.run, OpenBatch):
            places = self.run.withdrawn[self.heard :]
            text = " ".join(map(str, (len(self.run.withdrawn), *places)))
            tag = cancel_tag(self.key, self.run.run_id, f"{self.name} {text}", self.count)
            return f"withdrawn {self.name} {tag.hex()} {text}"
        tag = cancel_tag(self.key, self.run.run_id, self.name, self.count)
        return f"cancel {self.name} {tag.hex()}"


class Beats:
    """Handles the beats of one listener."""

    def __init__(self, runs: OpenRuns, guard: Guard, contacts: Contacts) -> None:
        self._runs = runs
        self._guard = guard
        self._contacts = contacts

    async def hold(self, request: web.Request) -> web.Response:
        """Hold the request until a run of it is cancelled, all are closed, or its time is up."""
        body = await self._guard.read_body(request, MAX_BODY)
        hold, beating = self._read_beat(request, body)
        wake = asyncio.Event()
        for beat in beating:
            beat.run.watch(wake)
            self._contacts.heard(request.protocol, beat.run, beat.execution)
            if not beat.execution.over and beat.execution.attempt >= beat.run.attempt:
                beat.run.sink([beat.run.event(frames.HEARTBEAT)])
        try:
            async with asyncio.timeout(hold):
                while not any(beat.to_cancel for beat in beating) and self._any_open(beating):
                    await wake.wait()
                    wake.clear()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            # The worker's end of the connection is closed.
            self._contacts.lost(request.protocol)
            raise
        finally:
            for beat in beating:
                beat.run.watch(wake, ends=True)
        return reply(200, text="\n".join(beat.cancel_line() for beat in beating if beat.to_cancel))

    def _any_open(self, beating: list[_Beat]) -> bool:
        return any(self._runs.get(beat.run.run_id) is beat.run for beat in beating)

    def _read_beat(self, request: web.Request, body: bytearray) -> tuple[float, list[_Beat]]:
        """Read ``hold SECONDS`` and ``run|stopping ID EXECUTION ATTEMPT COUNT KID TAG`` lines, verified.

        A batch has ``batch`` instead, and at the end of its line how many withdrawals its worker has heard of.
        """
        hold = MAX_HOLD
        beating = []
        named = False
        refused = False
        for line in bytes(body).decode("ascii", "replace").split("\n")[: MAX_RUNS_IN_BEAT + 1]:
            words = line.split(" ")
            if words[0] == "hold" and len(words) == 2:
                hold = _seconds(words[1])
            elif (words[0] in ("run", "stopping") and len(words) == 7) or (
                words[0] == "batch" and len(words) == 8
            ):
                beat = self._verified_beat(*words[:7])
                if beat is not None:
                    beat.heard = _count(words[7]) if words[0] == "batch" else 0
                    beating.append(beat)
                else:
                    refused = refused or self._runs.get(words[1]) is not None
                named = True
        if not beating:
            # Only what is closed is gone: a repeated beat, or a wrong one, says nothing of its run.
            raise (
                unauthorized(request)
                if refused
                else gone(request)
                if named
                else refusal(web.HTTPBadRequest())
            )
        return hold, beating

    def _verified_beat(
        self, word: str, run_id: str, name: str, attempt: str, count: str, kid: str, tag: str
    ) -> _Beat | None:
        run = self._runs.get(run_id)
        key = run.key(kid) if run is not None else None
        if run is None or key is None or not all(n.isdecimal() and len(n) < 12 for n in (attempt, count)):
            return None
        number = int(count)
        expected = beat_tag(key, run_id, name, int(attempt), number).hex().encode()
        if len(name) > MAX_EXECUTION or not same(expected, tag.encode("utf-8", "replace")):
            return None
        execution = run.execution(name, int(attempt))
        if execution is None or number <= execution.beats:
            return None
        execution.beats = number
        return _Beat(run, name, execution, number, key, told=word == "stopping")


def _count(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 12 else 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return MAX_HOLD
    return min(MAX_HOLD, max(0.1, value)) if value == value else MAX_HOLD
