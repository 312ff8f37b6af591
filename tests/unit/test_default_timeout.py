"""Dropping broken connections leaves the process's default timeout as it was."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest
from kombu import Connection

from wove.adapters.default_timeout import keep_default_timeout

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, params=[None, 77.0])
def default(request: pytest.FixtureRequest) -> Iterator[float | None]:
    """What the application has set."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(request.param)
    yield request.param
    socket.setdefaulttimeout(before)


def test_threads_that_drop_connections_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, default: float | None
) -> None:
    keep_default_timeout()
    keep_default_timeout()
    first_in, second_in, second_out = (threading.Event() for _ in range(3))

    def close(connection: Connection) -> None:
        if connection.userid == "first":
            first_in.set()
            assert second_in.wait(10)
        else:
            second_in.set()
            assert second_out.wait(10)

    monkeypatch.setattr(Connection, "_do_close_self", close)
    first = threading.Thread(target=Connection("memory://", userid="first").collect, args=(5.0,))
    second = threading.Thread(target=Connection("memory://", userid="second").collect, args=(5.0,))
    first.start()
    assert first_in.wait(10)
    second.start()
    first.join(10)
    second_out.set()
    second.join(10)
    assert socket.getdefaulttimeout() == default
