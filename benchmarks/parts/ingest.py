"""How many frames a second the callback server takes in from many connections."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from parts.figures import Row
from parts.processes import REMOTE, Child

if TYPE_CHECKING:
    from parts.fleets import Bench

CLIENTS, CONNECTIONS = 2, 4
MANY = 32


def ingest_rows(bench: Bench) -> list[Row]:
    """Post signed requests from other processes, over connections that are kept where the server keeps them."""
    group = f"Callback server, {CLIENTS * CONNECTIONS} connections from {CLIENTS} processes"
    one = Row("ingest-1", group, "frames/s, one a request: an outcome each", "/s")
    many = Row(f"ingest-{MANY}", group, f"frames/s, {MANY} a request: progress", "/s")
    cost = Row("ingest-1-cpu", group, "the server's processor time for a request with one frame", "us")
    requests = bench.scale.requests
    for _ in range(bench.scale.light_rounds):
        for name in ["peer", "wove"] if bench.peer_python else ["wove"]:
            seconds, cpu = _measure(bench, name, requests, 1)
            one.add(name, requests / seconds)
            cost.add(name, 1e6 * cpu / requests)
        fewer = max(CLIENTS * CONNECTIONS, requests // 4)
        seconds, _ = _measure(bench, "wove", fewer, MANY)
        many.add("wove", fewer * MANY / seconds)
    many.failures["peer"] = "takes one frame a request"
    return [one, many, cost]


def _measure(bench: Bench, name: str, requests: int, frames: int) -> tuple[float, float]:
    """Return the seconds that the requests take, and the server's processor seconds."""
    python = bench.peer_python if name == "peer" else sys.executable
    with ExitStack() as stack:
        server = stack.enter_context(
            Child([python or sys.executable, str(REMOTE / "ingest_server.py"), name], f"{name}'s server")
        )
        opened = server.ask("open", count=requests)
        clients = [
            stack.enter_context(Child([sys.executable, str(REMOTE / "ingest_client.py")], "a client"))
            for _ in range(CLIENTS)
        ]
        runs = opened.pop("runs")
        for number, client in enumerate(clients):
            client.tell(
                do="prepare",
                kind=name,
                runs=runs[number::CLIENTS],
                frames=frames,
                connections=CONNECTIONS,
                **opened,
            )
        for client in clients:
            client.listen("prepare")
        server.ask("reset")
        for client in clients:
            client.tell(do="go")
        spans: list[dict[str, Any]] = [client.listen("go") for client in clients]
        took = max(span["end"] for span in spans) - min(span["begin"] for span in spans)
        return took, float(server.ask("counted", frames=requests * frames)["cpu"])
