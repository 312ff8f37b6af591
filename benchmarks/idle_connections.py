"""What idle connections cost those who have something to say: callbacks beside 0 and beside 1,500 of them, in turns.

    python benchmarks/idle_connections.py --connections 1500 --callbacks 1500 --rounds 6

The listener is in this process, as in an application; a process of its own opens the connections, which never send a
byte, and reports one signed outcome after another over a connection that stays open, as a worker does. Prints p50, p99
and the slowest callback of each kind in milliseconds, by round and over all rounds, and the processor time that the guard's looks at the connections take.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import resource
import secrets
import socket
import statistics
import time
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.callback_server import hub
from wove.callback_server.guard import Guard
from wove.callback_server.runs import OpenRun
from wove.security import event_tag, find_secrets, run_key
from wove.wire import encode_value, pack_message

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ENVIRONMENT = "benchmark"
CODEC = "application/msgpack"
WARM_UP = 20
#: What is promised of p99, in milliseconds.
LIMIT = 5.0


def worker(port: int, orders: Connection) -> None:
    """Take orders: how many connections are to idle meanwhile, and the runs to report on; answer how long each took."""
    while (order := orders.recv()) is not None:
        connections, runs = order
        with contextlib.ExitStack() as stack:
            for _ in range(connections):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            orders.send(report(port, runs)[WARM_UP:])


def report(port: int, runs: list[tuple[str, bytes]]) -> list[float]:
    """Deliver an outcome for each run; return the seconds that each took from its signature to its answer."""
    secret = find_secrets().primary
    taken = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        for run_id, nonce in runs:
            attachments: list[Any] = []
            described = encode_value({"ok": True}, attachments)
            event = frames.event(frames.TASK_RESULT, run_id, "task", 1, 1, result=described)
            body = b"".join(bytes(part) for part in pack_message({"frames": [event]}, attachments))
            begun = time.perf_counter()
            key = run_key(secret, ENVIRONMENT, run_id, nonce)
            headers = {
                "Content-Type": CODEC,
                "Wove-Key": secret.kid,
                "Wove-Final": "1",
                "Wove-Signature": event_tag(key, run_id, CODEC, True, [body]).hex(),
            }
            connection.request("POST", f"/wove/v1/events/{run_id}", body, headers)
            response = connection.getresponse()
            response.read()
            taken.append(time.perf_counter() - begun)
            if response.status != 204:
                raise RuntimeError(f"a callback was answered {response.status}")
    return taken


def open_runs(lease: hub.Lease, count: int) -> list[tuple[str, bytes]]:
    """Open runs on the listener; their outcomes go nowhere."""
    opened = []
    for _ in range(count):
        run_id, nonce = secrets.token_hex(16), secrets.token_bytes(16)
        lease.open_run(
            OpenRun(
                run_id=run_id,
                task_id="task",
                environment=ENVIRONMENT,
                ring=find_secrets(),
                nonce=nonce,
                sink=_take,
                max_body=1024 * 1024,
            )
        )
        opened.append((run_id, nonce))
    return opened


def _take(batch: object) -> bool:
    return True


@contextlib.contextmanager
def timed_looks() -> Any:
    """Collect how long each look of the guard at its connections takes, and how many there were."""
    real = Guard._look
    looks: list[tuple[int, float]] = []

    def measured(self: Guard, server: Any) -> list[Any]:
        begun = time.thread_time()  # on a busy machine the clock on the wall tells of others
        doomed = real(self, server)
        looks.append((self.connections, time.thread_time() - begun))
        return doomed

    Guard._look = measured
    try:
        yield looks
    finally:
        Guard._look = real


def summary(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and the slowest, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {
        name: round(1e3 * value, 2)
        for name, value in (("p50", cuts[49]), ("p99", cuts[98]), ("max", max(seconds)))
    }


def measure(connections: int, callbacks: int, rounds: int) -> dict[str, Any]:
    """Take turns, so that what else this machine does falls on both."""
    kinds = (0, connections)
    taken: dict[int, list[list[float]]] = {kind: [] for kind in kinds}
    with timed_looks() as looks:
        lease = hub.acquire("127.0.0.1", 0)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=worker, args=(lease.port, theirs))
        process.start()
        try:
            for number in range(rounds):
                for kind in kinds if number % 2 else reversed(kinds):
                    ours.send((kind, open_runs(lease, callbacks + WARM_UP)))
                    taken[kind].append(ours.recv())
        finally:
            ours.send(None)
            process.join(30)
            lease.release()
    crowded = [seconds for count, seconds in looks if count > connections // 2]
    over_all = {kind: summary([seconds for round_ in taken[kind] for seconds in round_]) for kind in kinds}
    return {
        "milliseconds_per_callback": {f"beside {kind} idle": over_all[kind] for kind in kinds},
        "p99_by_round": {f"beside {kind} idle": [summary(it)["p99"] for it in taken[kind]] for kind in kinds},
        "p99_ratio": round(over_all[connections]["p99"] / over_all[0]["p99"], 2),
        "milliseconds_per_look_at_the_crowd": summary(crowded) if len(crowded) > 1 else None,
        "verdict": verdict(over_all[0]["p99"], over_all[connections]["p99"]),
    }


def verdict(alone: float, crowded: float) -> str:
    """Say whether the promise holds, given two p99 in milliseconds."""
    if crowded < LIMIT:
        return f"holds: p99 is under {LIMIT:g} ms"
    if alone >= LIMIT:
        return f"none: this machine is too busy, p99 is over {LIMIT:g} ms without idle connections too"
    return f"fails: p99 is not under {LIMIT:g} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=1_500)
    parser.add_argument("--callbacks", type=int, default=1_500, help="per round and kind")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    # The listener takes a quarter of this process's descriptors at most, and the worker inherits the limit.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * arguments.connections
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )
    print(json.dumps(measure(arguments.connections, arguments.callbacks, arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
