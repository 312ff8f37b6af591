"""What the callback server answers with."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from wove.callback_server.guard import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Tells a worker whether anything was withdrawn since a payload was made.
WITHDRAWN = "Wove-Withdrawn"
#: Tells a worker that a run is over, and not merely of no interest here.
ENDED = {"Wove-Ended": "1"}


class Answer(NamedTuple):
    """What is answered to events that were taken, or are not wanted."""

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    text: str = ""


def reply(status: int, headers: dict[str, str] | None = None, text: str | None = None) -> web.Response:
    """Return an answer that tells our clock."""
    return web.Response(status=status, headers={**clock(), **(headers or {})}, text=text)


def clock() -> dict[str, str]:
    """Return the header that tells our clock: by it workers know how long a payload has waited."""
    return {"Wove-Time": f"{time.time():.6f}"}


def gone(request: web.Request, *, ended: bool = False) -> web.HTTPException:
    """Return 410: the run is closed, or was never open here."""
    # Work that is kept when its submitter goes has to know whether it is over.
    answer = web.HTTPGone(headers=ENDED if ended else None)
    return refusal(answer) if request.body_exists else answer


def unauthorized(request: web.Request) -> web.HTTPException:
    """Return 401, the same for whatever is wrong with a signature."""
    return refusal(web.HTTPUnauthorized())
