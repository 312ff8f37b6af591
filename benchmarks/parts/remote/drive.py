"""Drives one contender from the caller's side; runs in that contender's own environment.

Takes a JSON object a line on standard input, ``{"do": "throughput", "count": 100}``, and answers with one a line:
figures, or ``{"error": ...}``. Only one of all contenders is asked at a time.
"""

import asyncio
import json
import os
import sys
import time
import traceback
from functools import partial


def make(options):
    """Return the contender that ``options`` describe."""
    kind = options["kind"]
    if kind in ("wove", "peer"):
        import drive_wove

        return (drive_wove.Wove if kind == "wove" else drive_wove.Peer)(options["definition"])
    import drive_raw

    return (drive_raw.Celery if kind == "raw-celery" else drive_raw.Rq)(options)


class Clock:
    """Measures a piece of work: seconds, and this process's processor seconds, all its threads together."""

    def __enter__(self):
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc_info):
        self.figures = {
            "seconds": time.perf_counter() - self.begun,
            "cpu": time.process_time() - self.cpu_begun,
        }


def percentiles(taken):
    """Return what a sequence of calls took, in milliseconds."""
    taken = sorted(1000 * seconds for seconds in taken)
    return {"p50": taken[len(taken) // 2], "p99": taken[min(len(taken) - 1, len(taken) * 99 // 100)]}


async def main(replies):
    """Answer until standard input ends."""
    contender = make(json.loads(sys.argv[1]))
    await contender.open()
    while line := await asyncio.to_thread(sys.stdin.readline):
        ask = json.loads(line)
        try:
            answer = await getattr(contender, ask.pop("do"))(**ask)
        except Exception as exc:
            traceback.print_exc()
            answer = {"error": f"{type(exc).__name__}: {exc}"[:300]}
        # Not the figure's business: an answer is written between two measurements.
        await asyncio.to_thread(partial(print, json.dumps(answer), file=replies, flush=True))
    # What is still connected goes with the process: whoever asks has all figures.
    os._exit(0)


if __name__ == "__main__":
    # What a library may print is no answer.
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        asyncio.run(main(stream))
