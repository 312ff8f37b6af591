"""What signing costs: unbatched no-op calls with signatures and without, in turns within one run.

    python benchmarks/signing.py --calls 2000 --rounds 6

Runs the memory adapter: everything real but the broker, which would only hide the difference. "Without" replaces the one
function that all signatures come from, on both sides, which are in this process; keys are derived either way. Prints
calls per second of each round, the share of signing in the time of a call, by the difference of the two and, because that drowns in the
noise of a busy machine, by the time spent in that function; and the cost of one signature by size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

from wove import ExecutorRuntime, security

if TYPE_CHECKING:
    from collections.abc import Iterator

WARM_UP = 20
SIZES = (1_024, 65_536, 1_048_576)
_FIXED = bytes(security.TAG_SIZE)


@contextlib.contextmanager
def unsigned() -> Iterator[None]:
    """Sign nothing within the block; keys of runs are made by the same function, and are no secrets then."""
    real = security.mac
    security.mac = lambda key, fields, parts=(): _FIXED
    try:
        yield
    finally:
        security.mac = real


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Collect how long each signature within the block takes."""
    real = security.mac
    taken: list[float] = []

    def measured(*args: Any, **kwargs: Any) -> bytes:
        begun = time.perf_counter()
        tag = real(*args, **kwargs)
        taken.append(time.perf_counter() - begun)
        return tag

    security.mac = measured
    try:
        yield taken
    finally:
        security.mac = real


async def seconds_per_call(calls: int) -> float:
    """Return how long one call takes, one after another; each round has an environment of its own."""
    async with ExecutorRuntime(
        {"memory": {"executor": "memory", "executor_config": {"threads": 1}}}
    ) as runtime:
        memory = runtime["memory"]
        for _ in range(WARM_UP):
            await memory.run(abs, -1)
        begun = time.perf_counter()
        for _ in range(calls):
            await memory.run(abs, -1)
        return (time.perf_counter() - begun) / calls


def seconds_per_signature(size: int) -> float:
    """Return how long one event of that size takes to sign, its key included."""
    secret = security.find_secrets().primary
    body = bytes(size)
    rounds = max(10, 20_000_000 // (size + 10_000))
    begun = time.perf_counter()
    for _ in range(rounds):
        key = security.run_key(secret, "benchmark", "a" * 32, b"n" * 16)
        security.event_tag(key, "a" * 32, "application/msgpack", True, [body])
    return (time.perf_counter() - begun) / rounds


def measure(calls: int, rounds: int) -> dict[str, Any]:
    """Take turns, so that what else this machine does falls on both."""
    times: dict[str, list[float]] = {"signed": [], "unsigned": []}
    for number in range(rounds):
        order = ("signed", "unsigned") if number % 2 else ("unsigned", "signed")
        for kind in order:
            with unsigned() if kind == "unsigned" else contextlib.nullcontext():
                times[kind].append(asyncio.run(seconds_per_call(calls)))
    with timed() as taken:
        timed_call = asyncio.run(seconds_per_call(calls))
    medians = {kind: statistics.median(taken) for kind, taken in times.items()}
    shares = [1 - off / on for on, off in zip(times["signed"], times["unsigned"], strict=True)]
    return {
        "calls_per_second": {kind: [round(1 / taken) for taken in all_] for kind, all_ in times.items()},
        "share_by_difference": round(1 - medians["unsigned"] / medians["signed"], 4),
        "share_by_its_own_time": round(sum(taken) / (calls + WARM_UP) / timed_call, 4),
        "signatures_per_call": round(len(taken) / (calls + WARM_UP), 1),
        "share_by_round": [round(share, 3) for share in shares],
        "microseconds_per_signature": {size: round(1e6 * seconds_per_signature(size), 1) for size in SIZES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000, help="per round and kind")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.calls, arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
