"""A submitter of its own process: many calls with one key. Prints what they return.

Arguments: the environment's definition as JSON, how many calls, the file that counts executions, the one
that they wait for.
"""

import asyncio
import json
import sys
from typing import Any

from wove import ExecutorRuntime
from wove_tests import tasks


async def main() -> None:
    """Make the calls, all at once."""
    definition, count, counter, release = json.loads(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    async with ExecutorRuntime({"shared": definition}) as runtime:
        calls: list[Any] = [
            runtime["shared"].run(tasks.count_and_wait, counter, release, "value") for _ in range(count)
        ]
        print(json.dumps(await asyncio.gather(*calls)))


if __name__ == "__main__":
    asyncio.run(main())
