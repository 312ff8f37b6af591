"""P17's load: idle connections do not keep a legitimate callback waiting, nor take the application's descriptors.

FLOOD_CONNECTIONS (200) says how many; the figures are printed (pytest -s), and only generous bounds are asserted.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

from wove_tests.callbacks import Sink, event, events_path, listening, open_run, packed, signed

from wove import frames

if TYPE_CHECKING:
    import pytest

    from wove.callback_server.hub import Lease

CONNECTIONS = int(os.environ.get("FLOOD_CONNECTIONS", "200"))
CALLBACKS = 300


def test_idle_connections(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * CONNECTIONS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * CONNECTIONS), hard))
    try:
        with listening() as lease, contextlib.ExitStack() as stack:
            sink = Sink()
            run = open_run(lease, sink)
            for _ in range(CONNECTIONS):
                idle = stack.enter_context(socket.create_connection((lease.host, lease.port), timeout=20))
                idle.setblocking(False)
            kept = _latencies(lease, run, keep=True)
            fresh = _latencies(lease, run, keep=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with capsys.disabled():
        if "FLOOD_CONNECTIONS" in os.environ:
            for name, taken in (("kept", kept), ("fresh", fresh)):
                print(
                    f"\n{CONNECTIONS} idle, a callback on a {name} connection: p50 {1e3 * taken[len(taken) // 2]:.2f} ms, "
                    f"p99 {1e3 * taken[int(len(taken) * 0.99)]:.2f} ms, max {1e3 * taken[-1]:.2f} ms"
                )
    assert len(sink.of(run.run_id)) == 2 * CALLBACKS
    for taken in (kept, fresh):
        assert taken[int(len(taken) * 0.99)] < 1.0


def _latencies(lease: Lease, run: Any, *, keep: bool) -> list[float]:
    taken = []
    connection = http.client.HTTPConnection(lease.host, lease.port, timeout=20)
    for seq in range(1, CALLBACKS + 1):
        body = packed([event(run, frames.HEARTBEAT, seq)])
        headers = signed(run, body, final=False)
        begun = time.perf_counter()
        connection.request("POST", events_path(run), body, headers)
        assert connection.getresponse().read() == b""
        taken.append(time.perf_counter() - begun)
        if not keep:
            connection.close()
    connection.close()
    return sorted(taken)
