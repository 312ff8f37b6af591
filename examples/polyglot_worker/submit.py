"""Await the Node.js worker's functions: python submit.py redis://127.0.0.1:6379/0 node."""

from __future__ import annotations

import asyncio
import sys

import jobs
from redis import Redis
from rq import Queue

from wove import ExecutorRuntime


async def main(url: str, name: str) -> None:
    """Count the words of a sentence, and the squares of some numbers."""
    queue = Queue(name, connection=Redis.from_url(url), serializer="json")
    environments = {
        "node": {
            "executor": "rq",
            # Functions by name, plain data only: what any language understands.
            "executor_config": {"queue": queue, "pickle": False},
            "delivery_timeout": 30,
        },
    }
    async with ExecutorRuntime(environments) as runtime:
        node = runtime["node"]
        print(await node.run(jobs.word_count, "to be or not to be"))
        print(await node.run(jobs.sum_of_squares, [1, 2, 3], scale=2))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
