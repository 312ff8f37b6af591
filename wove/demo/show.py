"""``wove demo``: brings the fleets up, plays the acts or serves, and takes everything down again."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wove.errors import WoveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from wove.demo.fleets import Fleet

SERVE_PORT = 6390

_NEEDED = ("rich", "redis", "cloudpickle", "msgpack", "aiohttp")
# Celery lets these win over every configuration.
_BROKER_VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")
_POLL_SECONDS = 0.2
_LOG_TAIL_LINES = 10

_PROGRAM = """\
import asyncio
from wove import ExecutorRuntime

ENVIRONMENTS = {environments}

def score(row):
    return row * row

async def main():
    async with ExecutorRuntime(ENVIRONMENTS) as runtime:
        print(await runtime["{first}"].run(score, 7))
        async for result in runtime["{last}"].map(score, range(10)):
            print(result)

asyncio.run(main())
"""


class DemoError(RuntimeError):
    """The demo cannot go on; the message is for its reader."""


def run(
    *,
    redis_url: str | None = None,
    only: str | None = None,
    modules: int | None = None,
    serve: bool = False,
) -> int:
    """Run the demo and return its exit code: 0 all as it should be, 1 not, 128 + n ended by signal n.

    ``redis_url`` names a Redis to use instead of starting one, ``only`` one of the two fleets, ``modules``
    how many files to analyse at most; with ``serve`` the fleets only wait for somebody to use them.
    """
    from wove.demo.processes import ProcessError

    with _interruptible() as received:
        try:
            _check_installed(only)
            return _serve(redis_url, only) if serve else _play(redis_url, only, modules)
        except (DemoError, ProcessError) as exc:
            print(f"wove demo: {exc}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nwove demo: interrupted; everything it started is stopped and removed", file=sys.stderr)
            return 128 + received[-1]


def _play(redis_url: str | None, only: str | None, modules: int | None) -> int:
    from wove.demo import acts, fleets
    from wove.demo.screen import Screen, python_name

    screen = Screen()
    began = time.perf_counter()
    screen.title(f"Wove demo on {python_name()}: plain functions, awaited on real fleets")
    with _own_environment(), fleets.running(_names(only), redis_url) as running:
        screen.fleets(running.url, running.fleets)
        try:
            passed = asyncio.run(acts.play(screen, running.fleets, modules))
        except Exception as exc:
            raise DemoError(_with_logs(exc, running.fleets)) from exc
    left = running.left_behind()
    screen.title(f"Done in {time.perf_counter() - began:.1f} s")
    screen.check(not left, f"left behind: {', '.join(left) or 'no process, no file'}")
    return 0 if passed and not left else 1


def _serve(redis_url: str | None, only: str | None) -> int:
    from wove.demo import fleets
    from wove.demo.screen import Screen

    screen = Screen()
    # A port that can be foreseen, so a program written before the demo was started fits.
    port = fleets.port_or_free(SERVE_PORT)
    with fleets.running(_names(only), redis_url, port) as running:
        screen.title("Wove demo: real fleets, at your service until Ctrl-C")
        screen.fleets(running.url, running.fleets)
        if redis_url is None and port != SERVE_PORT:
            screen.title(f"Port {SERVE_PORT} is taken: programs written for it need {port} instead")
        screen.title("A program for them, to run in another terminal:")
        screen.program(_program(running.fleets))
        try:
            _wait_for_the_end(running.fleets)
        except KeyboardInterrupt:
            screen.title("Stopping")
    return 0


def _wait_for_the_end(fleets: list[Fleet]) -> None:
    while True:
        for fleet in fleets:
            if not fleet.worker.running:
                raise DemoError(_with_logs(DemoError(f"the {fleet.name} worker ended"), [fleet]))
        time.sleep(_POLL_SECONDS)


def _program(fleets: list[Fleet]) -> str:
    lines = [f'    "{fleet.name}": {json.dumps(fleet.environment)},\n' for fleet in fleets]
    environments = "{\n" + "".join(lines) + "}"
    return _PROGRAM.format(environments=environments, first=fleets[0].name, last=fleets[-1].name)


def _names(only: str | None) -> Sequence[str]:
    from wove.demo.fleets import FLEETS

    return (only,) if only else FLEETS


def _check_installed(only: str | None) -> None:
    needed = (*_NEEDED, *_names(only))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'it needs {", ".join(missing)}, not installed here: pip install "wove[demo]"')


def _with_logs(exc: Exception, fleets: list[Fleet]) -> str:
    if isinstance(exc, (WoveError, DemoError)):
        parts = [f"{type(exc).__name__}: {exc}", *getattr(exc, "__notes__", ())]
    else:
        parts = ["it broke:", *traceback.format_exception(exc)]
    for fleet in fleets:
        tail = "\n".join(fleet.worker.log_text().splitlines()[-_LOG_TAIL_LINES:])
        parts.append(f"the end of the {fleet.name} worker's log:\n{tail}")
    return "\n".join(parts)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Share a secret with the workers, and keep Celery's variables from naming another broker.

    The per-user cookie file would do for the secret as well, but it would be a file that stays behind.
    """
    before = dict(os.environ)
    for name in _BROKER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.setdefault("WOVE_SECRET", secrets.token_hex(32))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let SIGTERM end the block as Ctrl-C does, with KeyboardInterrupt; yield the signals received.

    Also where Ctrl-C was switched off, as shells do for background jobs: clean-up has to happen either way.
    """
    received = [signal.SIGINT.value]

    def on_terminate(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        # Through SIGINT, because asyncio.run turns that one into an orderly cancellation.
        signal.raise_signal(signal.SIGINT)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
