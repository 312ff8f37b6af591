"""What signing costs: unbatched no-op calls with signatures and without, in turns within one run.

    python benchmarks/signing.py --calls 4000

Runs the memory adapter: everything real but the broker, which would only hide the difference. "Without" replaces the one
function that all signatures come from, on both sides, which are in this process; keys are derived either way. Both kinds
of calls go by turns, a few at a time, through one environment. Prints the median call of each kind as calls per second, the share of signing by
their difference, and within what bounds that is certain; the share by the time spent in that function, its own wrapping included; and the
cost of one signature by size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from wove import ExecutorRuntime, security

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The share of a call's time that signing may take.
LIMIT = 0.10
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


class Calls(NamedTuple):
    """What calls took that were made one after another, in seconds each."""

    signed: list[list[float]]
    unsigned: list[list[float]]
    own: list[float]


async def in_turns(blocks: int, size: int) -> Calls:
    """Make blocks of calls with signatures and without, by turns, in one environment; then time the signatures.

    Blocks are short, so that what else this machine does falls on both alike.
    """
    calls = Calls([], [], [])
    async with ExecutorRuntime(
        {"memory": {"executor": "memory", "executor_config": {"threads": 1}}}
    ) as runtime:
        memory = runtime["memory"]

        async def block(taken: list[list[float]]) -> None:
            times = []
            for _ in range(size):
                begun = time.perf_counter()
                await memory.run(abs, -1)
                times.append(time.perf_counter() - begun)
            taken.append(times)

        await block([])
        for number in range(blocks):
            turns = [(calls.signed, contextlib.nullcontext), (calls.unsigned, unsigned)]
            for taken, how in turns if number % 2 else reversed(turns):
                with how():
                    await block(taken)
        with timed() as spent:
            await block([])
        calls.own.extend(spent)
    return calls


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


def share(signed: list[float], unsigned: list[float]) -> float:
    """Return the share of signing in the time of the median call."""
    return 1 - statistics.median(unsigned) / statistics.median(signed)


def interval(calls: Calls, dice: random.Random) -> tuple[float, float]:
    """Return between what the share lies in 95 of 100 draws from the pairs of blocks."""
    pairs = list(zip(calls.signed, calls.unsigned, strict=True))
    shares = []
    for _ in range(200):
        drawn = dice.choices(pairs, k=len(pairs))
        shares.append(share([t for on, _ in drawn for t in on], [t for _, off in drawn for t in off]))
    shares.sort()
    return shares[5], shares[-6]


def measure(calls: int, size: int) -> dict[str, Any]:
    """Measure, and say whether signing costs less than LIMIT of a call."""
    taken = asyncio.run(in_turns(max(2, calls // size), size))
    signed, unsigned_ = ([t for block in kind for t in block] for kind in (taken.signed, taken.unsigned))
    low, high = interval(taken, random.Random(1))
    verdict = "holds" if high < LIMIT else "fails" if low > LIMIT else "none: too noisy, make more calls"
    return {
        "calls": len(signed),
        "calls_per_second": {
            "signed": round(1 / statistics.median(signed)),
            "unsigned": round(1 / statistics.median(unsigned_)),
        },
        "share_of_signing": round(share(signed, unsigned_), 4),
        "share_95_percent": [round(low, 4), round(high, 4)],
        "share_by_its_own_time": round(sum(taken.own) / size / statistics.median(signed), 4),
        "signatures_per_call": round(len(taken.own) / size, 1),
        "microseconds_per_signature": {size: round(1e6 * seconds_per_signature(size), 1) for size in SIZES},
        "verdict": f"{verdict} (less than {LIMIT:.0%} of an unbatched call)",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=4_000, help="of each kind")
    parser.add_argument(
        "--block", type=int, default=20, help="calls of one kind before the other has its turn"
    )
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.calls, arguments.block), indent=2))


if __name__ == "__main__":
    main()
