"""What signing costs of the throughput on a Celery fleet: unbatched no-op calls with signatures and without.

    python benchmarks/signing_throughput.py --rounds 16

Two fleets on two Redis servers, one whose workers sign and verify and one where neither side does; they are called by turns,
in pairs. Prints the rates, and the share of signing as the median of the pairs with its quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import time
from pathlib import Path

from wove import ExecutorRuntime, security
from wove.demo.processes import CeleryWorker, RedisServer

PARTS = Path(__file__).parent / "signing_parts"
MAC = {"signed": security.mac, "unsigned": lambda key, fields, parts=(): bytes(security.TAG_SIZE)}


async def rate(runtime: ExecutorRuntime, kind: str, calls: int) -> float:
    """Return how many calls a second are made at once."""
    security.mac = MAC[kind]
    begun = time.perf_counter()
    await asyncio.gather(*(runtime["fleet"].run(abs, -1) for _ in range(calls)))
    took = time.perf_counter() - begun
    await asyncio.sleep(0.05)  # what is still on its way belongs to this kind
    return calls / took


async def measure(brokers: dict[str, str], secret: str, rounds: int, calls: int) -> dict[str, object]:
    """Call both fleets by turns."""
    runtimes = {}
    for kind, broker in brokers.items():
        security.mac = MAC[kind]
        config = {"broker_url": broker, "security": secret}
        runtimes[kind] = ExecutorRuntime({"fleet": {"executor": "celery", "executor_config": config}})
        await runtimes[kind].start()
        await rate(runtimes[kind], kind, calls)
    rates: dict[str, list[float]] = {kind: [] for kind in brokers}
    for number in range(rounds):
        for kind in sorted(brokers, reverse=bool(number % 2)):
            rates[kind].append(await rate(runtimes[kind], kind, calls))
    for kind, runtime in runtimes.items():
        security.mac = MAC[kind]
        await runtime.stop()
    shares = [1 - on / off for on, off in zip(rates["signed"], rates["unsigned"], strict=True)]
    return {
        "calls_per_second": {kind: round(statistics.median(found)) for kind, found in rates.items()},
        "share_of_signing": round(statistics.median(shares), 4),
        "quartiles": [round(share, 4) for share in statistics.quantiles(shares)[::2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--calls", type=int, default=400)
    arguments = parser.parse_args()
    secret = secrets.token_hex(16)
    env = {"WOVE_SECRET": secret}
    bare = {**env, "PYTHONPATH": str(PARTS)}
    include = ("without_signatures", "wove.worker.celery")
    with (
        RedisServer() as one,
        RedisServer() as other,
        CeleryWorker(one.url, env=env),
        CeleryWorker(other.url, env=bare, include=include),
    ):
        brokers = {"signed": one.url, "unsigned": other.url}
        print(json.dumps(asyncio.run(measure(brokers, secret, arguments.rounds, arguments.calls)), indent=2))


if __name__ == "__main__":
    main()
