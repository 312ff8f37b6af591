"""How many events a callback listener takes in, from 8 connections that wait for their answers.

    .venv/bin/python benchmarks/ingest.py [--frames 1] [--requests 20000] [--ordinary]

Each request is signed with the key of a run of its own, and ends it (with more than one frame: after so many
lines of log). ``--ordinary`` sends requests in a form that goes through aiohttp.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from typing import Any

CONNECTIONS = 8


def requests(lease: Any, count: int, frames_each: int, *, ordinary: bool) -> list[bytes]:
    """Open runs and return the requests that end them."""
    import secrets

    from wove import frames
    from wove.callback_server.runs import OpenRun
    from wove.security import event_tag, find_secrets
    from wove.wire import encode_value, pack_message
    from wove.worker.plain_http import head_of

    ring = find_secrets()
    made = []
    for _ in range(count):
        run = OpenRun(
            run_id=secrets.token_hex(16),
            task_id="bench.noop",
            environment="bench",
            ring=ring,
            nonce=secrets.token_bytes(16),
            sink=lambda batch: True,
            max_body=1 << 20,
        )
        lease.open_run(run)
        attachments: list[Any] = []
        described = encode_value(1, attachments)
        batch = [
            frames.event(frames.LOG, run.run_id, run.task_id, 1, seq + 1, message="a line of text")
            for seq in range(frames_each - 1)
        ]
        batch.append(
            frames.event(frames.TASK_RESULT, run.run_id, run.task_id, 1, frames_each + 1, result=described)
        )
        worker = {"host": "bench", "pid": 1, "backend": "bench", "job": run.run_id}
        body = b"".join(
            bytes(part)
            for part in pack_message(
                {"v": 1, "execution": "0" * 16, "worker": worker, "frames": batch}, attachments
            )
        )
        key = run.key(ring.primary.kid)
        headers = {
            **({"X-Ordinary": "1"} if ordinary else {}),
            "Content-Type": "application/msgpack",
            "Wove-Key": ring.primary.kid,
            "Wove-Signature": event_tag(key, run.run_id, "application/msgpack", True, [body]).hex(),
            "Wove-Final": "1",
        }
        head = head_of("POST", f"/wove/v1/events/{run.run_id}", "127.0.0.1", headers, len(body))
        made.append(head + body)
    return made


def client(port: int, made: list[bytes], outcome: Any) -> None:
    lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for line in lines:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    begun = time.perf_counter()
    for at in range(0, len(made), CONNECTIONS):
        group = list(zip(lines, made[at : at + CONNECTIONS], strict=False))
        for line, request in group:
            line.sendall(request)
        for line, _ in group:
            if not (reply := line.recv(4096)).startswith(b"HTTP/1.1 204"):
                raise RuntimeError(reply)
    outcome.put(time.perf_counter() - begun)


def measure(count: int, frames_each: int, *, ordinary: bool = False) -> dict[str, float]:
    """Return requests/s, frames/s, and the listener's CPU microseconds per request."""
    os.environ.setdefault("WOVE_SECRET", "bench:" + "s" * 40)
    from wove.callback_server import hub

    lease = hub.acquire("127.0.0.1", 0)
    try:
        made = requests(lease, count, frames_each, ordinary=ordinary)
        context = multiprocessing.get_context("spawn")
        outcome = context.Queue()
        peer = context.Process(target=client, args=(lease.port, made, outcome))
        peer.start()
        begun = time.process_time()
        took = outcome.get(timeout=300)
        used = time.process_time() - begun
        peer.join()
    finally:
        lease.release()
    return {
        "requests/s": count / took,
        "frames/s": count * frames_each / took,
        "us of CPU/request": used / count * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--ordinary", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.requests, arguments.frames, ordinary=arguments.ordinary)
    print(json.dumps({key: round(value, 1) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
